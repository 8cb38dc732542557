"""Every option of sere-compile, validated in one place."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError


@dataclass(frozen=True)
class SereConfig:
    """How expert re-routing is done. Immutable, compared and hashed by value.

    Attributes:
        select_top_k: S, how many of a token's K experts, best first, always stay and are open as targets to the
            rest of the batch. None means min(2, K - 1). S >= K changes nothing. "auto": per forward, the largest S
            whose primary experts are at most `max_active`, at least 1.
        max_active: with select_top_k="auto", a gate's budget of primary experts.
        threshold: rho in the similarity's own unit. An expert less similar than this to its substitute stays
            ("critical"). 0.0 means that no expert is critical.
        min_active: with fewer primary experts than this in a batch, S grows until they are reached. None means K,
            so that a batch of one token is never changed; 0 switches the rule off (the paper's behaviour).
        max_tokens: forwards with more tokens than this are left alone (prefill gains nothing). None: no limit.
        inner: the backend that compiles the rewritten graph: a name that torch.compile knows, or a callable
            taking (graph_module, example_inputs).
        strict: raise `GateNotFoundError` where a warning would tell that nothing was re-routed, and run each gate at
            compile time, as traced and re-routed, to prove the rewrite (`passes.verify_rewrite`).
        capture: "default", or "auto": try Dynamo's dynamic-shape capture first. Only `sere_compile.compile` and
            `explain` can do so; a backend gets graphs that are captured already.
        fuse_router: replace scoring, top-k and normalising of up to 256 tokens by one kernel, where the graph is on
            CUDA and needs no gradients. "always": on a CPU as well.
        lower_experts: replace dispatches of up to 256 tokens by kernels that read only the active experts, where the
            graph is on CUDA and needs no gradients. They round like any fusing compiler. "always": on a CPU as well.
        collect_stats: count tokens, changed slots and active experts on the device; `sere_compile.stats` reads them.

    Raises:
        ConfigError: a value of the wrong type or out of range; the message names option, value and what is allowed.
    """

    select_top_k: int | str | None = None
    threshold: float = 0.0
    min_active: int | None = None
    max_tokens: int | None = None
    inner: str | Callable[..., Any] = "inductor"
    strict: bool = False
    collect_stats: bool = False
    max_active: int | None = None
    fuse_router: bool | str = True
    lower_experts: bool | str = True
    capture: str = "default"

    def __post_init__(self) -> None:
        automatic = self.select_top_k == "auto"
        if not automatic:
            _check_count("select_top_k", self.select_top_k, least=1)
        _check_count("max_active", self.max_active, least=1)
        if automatic != (self.max_active is not None):
            given = f"select_top_k={self.select_top_k!r}, max_active={self.max_active!r}"
            raise ConfigError(f'select_top_k="auto" and max_active go together, got {given}')
        _check_count("min_active", self.min_active, least=0)
        _check_count("max_tokens", self.max_tokens, least=1)
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or not math.isfinite(self.threshold):
            raise ConfigError(f"threshold must be a finite number, got {self.threshold!r}")
        for name in ("strict", "collect_stats"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("fuse_router", "lower_experts"):
            if getattr(self, name) not in (True, False, "always"):
                raise ConfigError(f'{name} must be True, False or "always", got {getattr(self, name)!r}')
        if self.capture not in ("default", "auto"):
            raise ConfigError(f'capture must be "default" or "auto", got {self.capture!r}')
        if not (isinstance(self.inner, str) or callable(self.inner)):
            raise ConfigError(f"inner must be the name of a backend or a callable, got {self.inner!r}")
        if self.inner == "sere":
            raise ConfigError('inner="sere" would compile with itself; name the backend to compile with after it')

    def replace(self, **options: Any) -> SereConfig:
        """A copy with some options changed. Unknown names raise `ConfigError` with the nearest known name."""
        unknown = [name for name in options if name not in option_names()]
        if unknown:
            raise unknown_option(unknown[0], option_names())
        return dataclasses.replace(self, **options)

    def resolved_top_k(self, top_k: int) -> int:
        """S for a gate that selects K = `top_k` experts, at most K (the identity); the least one with "auto"."""
        if isinstance(self.select_top_k, str):
            return 1  # "auto": the least S
        wanted = min(2, top_k - 1) if self.select_top_k is None else self.select_top_k
        # S = 0 only comes from K = 1, where there is nothing to re-route either.
        return top_k if wanted == 0 else min(wanted, top_k)

    def resolved_min_active(self, top_k: int) -> int:
        """The least number of primary experts for a gate that selects K = `top_k` experts."""
        return top_k if self.min_active is None else self.min_active


def option_names() -> tuple[str, ...]:
    """The names of all options."""
    return tuple(field.name for field in dataclasses.fields(SereConfig))


def split_options(config: SereConfig, options: Mapping[str, Any] | None) -> tuple[SereConfig, dict[str, Any]]:
    """Separate `torch.compile(options=...)` into ours and those of the inner compiler.

    Raises:
        ConfigError: neither we nor Inductor know a name.
    """
    ours = {name: value for name, value in (options or {}).items() if name in option_names()}
    config = config.replace(**ours)
    rest = {name: value for name, value in (options or {}).items() if name not in ours}
    if rest and config.inner == "inductor":
        from torch._inductor import list_options

        known = set(list_options())
        for name in rest:
            if name.replace("-", "_") not in known:
                raise unknown_option(name, (*option_names(), *known))
    elif rest and isinstance(config.inner, str):
        raise unknown_option(next(iter(rest)), option_names())
    return config, rest


def unknown_option(name: str, known: Iterable[str]) -> ConfigError:
    """The error for a misspelt option, with the nearest known name."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ConfigError(f"unknown option {name!r}{hint} Options of sere-compile: {', '.join(option_names())}")


def _check_count(name: str, value: Any, least: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be None or an integer of at least {least}, got {value!r}")
