"""Which MoE layers an engine's worker has, and with which options and matrices each of them is re-routed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...compiler.gate_options import tell_unknown
from ...config import SereConfig
from ...errors import ConfigError
from ...similarity.fit import required_projection
from .engine import EngineMismatchError, fused_experts
from .matrices import agree, find_profile, match_layers, probe_layer
from .options import VllmOptions
from .routing import cannot_fill

log = logging.getLogger("vllm.sere_compile")


@dataclass(frozen=True)
class LayerPlan:
    """One MoE layer that is re-routed.

    Attributes:
        runner: vLLM's layer.
        config: the options of this layer.
        top_k: K.
        similarity: float32 [E, E]; None where slots are filled.
        projection: float32 [E, E] where `substitution="projection"` asks for it, else None.
    """

    runner: Any
    config: SereConfig
    top_k: int
    similarity: Tensor | None
    projection: Tensor | None


def find_runners(vllm_config: Any, model: nn.Module) -> dict[str, Any]:
    """The MoE layers of this worker by name, without those of a draft model.

    A draft proposes tokens and the model decides, so a draft that is left alone changes no token;
    and a profile, which knows layers by their numbers, says nothing of it.

    Args:
        vllm_config: the engine's configuration, which lists the layers.
        model: what the worker serves.

    Raises:
        EngineMismatchError: there is none, or one whose kernel routes by itself.
        ConfigError: a parallel layout in which ranks would not agree on the mapping.
    """
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    layers = vllm_config.compilation_config.static_forward_context
    routed, own = {n: layer for n, layer in layers.items() if isinstance(layer, MoERunner)}, set(model.modules())
    runners = {name: runner for name, runner in routed.items() if runner in own}
    if len(runners) < len(routed):
        log.info("SERE: %d MoE layers of the draft model are left alone", len(routed) - len(runners))
    if not runners:
        raise EngineMismatchError(
            f"{vllm_config.model_config.model} has no MoE layer that goes through vLLM's router "
            f"(architecture {vllm_config.model_config.architecture}); take 'sere' out of additional_config"
        )
    for name, runner in runners.items():
        if runner.is_monolithic:
            kernel = type(runner._quant_method).__name__
            raise EngineMismatchError(
                f"{name}: the expert kernel of {kernel} ({_backend(runner)}) routes by itself and never asks vLLM's "
                f"router; choose a backend that asks it: {_other_backends(kernel)}"
            )
        if not isinstance(runner.router, BaseRouter):
            raise EngineMismatchError(f"{name}: a router of the kind {type(runner.router).__name__} cannot be hooked")
        if runner.do_naive_dispatch_combine or runner.moe_config.pcp_size > 1:
            raise ConfigError(
                f"{name}: in this parallel layout every rank routes the gathered tokens of all ranks, and knows the "
                "phase and the padding of its own alone; choose a quantisation whose kernel is modular (vLLM then "
                "routes before it gathers), or do without data and prefill context parallelism"
            )
    return runners


def _backend(runner: Any) -> str:
    experts = fused_experts(runner._quant_method)
    return type(experts).__name__ if experts is not None else "of no known class"


def _other_backends(kernel: str) -> str:
    """What to put after --moe-backend, by the class of the quantisation method."""
    if "mxfp4" in kernel.lower():
        return "--moe-backend marlin, or triton_unfused"
    return "--moe-backend triton, or marlin for weights of 4 bits"


def plan_layers(
    runners: Mapping[str, Any], options: VllmOptions, vllm_config: Any, device: torch.device
) -> tuple[dict[str, LayerPlan], str]:
    """A plan for each layer with S < K, and where the matrices come from.

    Args:
        runners: of `find_runners`.
        options: what the user wrote.
        vllm_config: the engine's configuration.
        device: of the experts.

    Raises:
        ConfigError, ProfileError, ProbeError: see `matrices`; with `strict`, a pattern of per_gate
            that fits no layer.
    """
    profile = find_profile(options.profile, vllm_config.model_config.model)
    complete = vllm_config.parallel_config.pipeline_parallel_size == 1
    experts = {name: int(runner.moe_config.num_logical_experts) for name, runner in runners.items()}
    gates = {} if profile is None else match_layers(profile, experts, complete)
    if complete:
        tell_unknown(options.config, [*runners, *gates.values()], "this model")
    plans: dict[str, LayerPlan] = {}
    probing = False
    for name, runner in runners.items():
        config, top_k = options.config.for_gate(name, gates.get(name, name)), int(runner.router.top_k)
        if config.resolved_top_k(top_k) >= top_k:
            log.info("SERE: %s is not re-routed: S = K = %d", name, top_k)
            continue
        if config.substitution == "fill":
            reason = cannot_fill(runner.router)
            if not reason:
                plans[name] = LayerPlan(runner, config, top_k, None, None)
                continue
            if config.strict:
                raise ConfigError(f'{name}: substitution="fill" is out of reach: {reason}')
            log.warning("SERE: %s is re-routed, not filled: %s", name, reason)
            config = config.replace(substitution="reroute", threshold=0.0)
        projects = config.substitution == "projection"
        if profile is not None:
            similarity = profile[gates[name]]
            projection = required_projection(profile.projection(gates[name]), gates[name]) if projects else None
        else:
            if not probing:
                probing = True
                log.info("SERE: no similarity profile given; the experts are probed on random hidden states")
            probed = probe_layer(runner, vllm_config, device)
            similarity = agree(probed.similarity)
            projection = agree(probed.projection) if projects else None
        plans[name] = LayerPlan(runner, config, top_k, similarity, projection)
    if plans and all(plan.similarity is None for plan in plans.values()):
        return plans, "none, filled by the tokens' own scores"
    return plans, "probed at start" if profile is None else profile.source
