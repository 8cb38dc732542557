"""What a user wrote about SERE in vLLM's own configuration, checked."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...config import SereConfig
from ...errors import ConfigError

# The options of `SereConfig` that mean something inside a serving engine, which does its own
# compiling.
ROUTING = (
    "select_top_k", "max_active", "threshold", "substitution", "per_gate", "min_active", "max_tokens", "strict",
    "collect_stats",
)  # fmt: skip
PHASES = ("decode", "all")
EXPERTS = ("auto", "sere", "vllm")
ROUTERS = ("auto", "gate", "sere", "vllm")
ROUTING_BATCHES = ("rank", "all_ranks")
# How the reference implementation is switched on: `hf_overrides={"select_top_k": 1, "threshold":
# 0.1}`.
OVERRIDES = ("select_top_k", "threshold")


@dataclass(frozen=True)
class VllmOptions:
    """How experts are re-routed in an engine.

    Attributes:
        config: the routing options, with the meaning they have everywhere in sere-compile.
        profile: a file of `SimilarityProfile.save`, or a file or folder that the reference
            implementation calibrated.
            None: the checkpoint's own matrices where it has them, else the experts are probed at
                start.
        phase: "decode" leaves every batch alone that holds a prompt's tokens; "all" re-routes every
            batch.
        experts: who computes the experts of a small batch. "auto": `sere::expert_mlp` where it was
            measured to be faster; "sere": wherever it can; "vllm": vLLM's kernels always.
        router: who selects experts in a small batch. "sere": `sere::route`, which re-routes as well,
            where it was seen to select as vLLM's router does; "gate": the same, and it makes the logits of up to 32
            tokens too, in the same launch, instead of vLLM's gate; "auto": "gate" where that was measured to be
            faster, else "sere"; "vllm": vLLM's router always.
        routing_batch: whose tokens decide together which experts are primary, where tokens of several ranks are
            computed by the same experts (data parallelism). "rank": each rank's own; "all_ranks": those of all
            ranks, at the price of an all-reduce per layer.
    """

    config: SereConfig
    profile: str | None = None
    phase: str = "decode"
    experts: str = "auto"
    router: str = "auto"
    routing_batch: str = "rank"

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ConfigError(f"phase must be one of {', '.join(map(repr, PHASES))}, got {self.phase!r}")
        if self.experts not in EXPERTS:
            raise ConfigError(f"experts must be one of {', '.join(map(repr, EXPERTS))}, got {self.experts!r}")
        if self.router not in ROUTERS:
            raise ConfigError(f"router must be one of {', '.join(map(repr, ROUTERS))}, got {self.router!r}")
        if self.routing_batch not in ROUTING_BATCHES:
            raise ConfigError(
                f"routing_batch must be one of {', '.join(map(repr, ROUTING_BATCHES))}, got {self.routing_batch!r}"
            )
        rules = [self.config.substitution, *(dict(options).get("substitution") for _, options in self.config.gates)]
        if self.routing_batch == "all_ranks" and "fill" in rules:
            raise ConfigError(
                'routing_batch="all_ranks" re-routes, and substitution="fill" takes the tokens\' own scores, which '
                "other ranks do not have: set one of them otherwise"
            )
        if self.profile is not None and not isinstance(self.profile, str):
            raise ConfigError(f"profile must be the path of a file or folder, got {self.profile!r}")
        if limited := [pattern for pattern, options in self.config.gates if "max_tokens" in dict(options)]:
            raise ConfigError(
                f"per_gate[{limited[0]!r}] has max_tokens, which in vLLM is one limit for all layers of a batch"
            )


def read_options(vllm_config: Any) -> VllmOptions | None:
    """The options in `additional_config["sere"]` or in `hf_overrides`; None where SERE is not switched on.

    Raises:
        ConfigError: an unknown or misspelt option, a wrong value, or one option in both places.
    """
    additional = getattr(vllm_config, "additional_config", None)
    ours = additional.get("sere") if isinstance(additional, Mapping) else None
    overrides = getattr(getattr(vllm_config, "model_config", None), "hf_overrides", None)
    theirs = {k: overrides[k] for k in OVERRIDES if k in overrides} if isinstance(overrides, Mapping) else {}
    if ours is None and "select_top_k" not in theirs:
        return None
    if ours is not None and not isinstance(ours, Mapping):
        raise ConfigError(f'additional_config["sere"] must be a dict of options, got {ours!r}')
    ours = dict(ours or {})
    if both := [name for name in theirs if name in ours]:
        raise ConfigError(f'{both[0]} stands in additional_config["sere"] and in hf_overrides; keep one')
    return checked({**theirs, **ours})


def checked(options: Mapping[str, Any]) -> VllmOptions:
    """Options as they stand in `additional_config["sere"]`.

    Raises:
        ConfigError: an unknown or misspelt option, or a wrong value.
    """
    options = dict(options)
    known = (*ROUTING, *(f.name for f in dataclasses.fields(VllmOptions) if f.name != "config"))
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"unknown option {name!r} of sere; {hint}Options in vLLM: {', '.join(known)}")
    routing = {name: options.pop(name) for name in ROUTING if name in options}
    return VllmOptions(SereConfig(**routing), **options)
