"""All options of sere-compile, validated in one place."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from .errors import ConfigError

SUBSTITUTIONS = ("reroute", "projection", "fill")
# The switches of what gains time and rounds otherwise.
SPEED_PASSES = ("fuse_router", "lower_experts", "pack_gqa")
# The options that may differ from gate to gate.
PER_GATE = ("select_top_k", "threshold", "min_active", "max_active", "max_tokens", "substitution")
# {pattern: {option: value}} as a value that can be hashed, order of patterns kept.
PerGate = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]


@dataclass(frozen=True)
class SereConfig:
    """How expert re-routing is done. Immutable, compared and hashed by value.

    Attributes:
        select_top_k: S, how many of a token's K experts, best first, always stay and are open as targets to the
            rest of the batch. None means min(2, K - 1). S >= K changes nothing. "auto": per forward, the largest S
            whose primary experts are at most `max_active`, at least 1.
        max_active: with select_top_k="auto", a gate's budget of primary experts.
        threshold: rho in the similarity's own unit. An expert less similar than this to its substitute stays
            ("critical"). 0.0 means that no expert is critical. "q0.2": the least similar 20 % of each
            gate's experts are critical, see `sere_compile.similarity.threshold`.
        min_active: with fewer primary experts than this in a batch, S grows until they are reached. None means K,
            so that a batch of one token is never changed, or `max_active` where that is less; 0 switches the rule off
            (the paper's behaviour).
        max_tokens: forwards with more tokens than this are left alone (prefill gains nothing). None: no limit.
        inner: the backend that compiles the rewritten graph: a name that torch.compile knows, or a callable
            taking (graph_module, example_inputs).
        strict: raise `GateNotFoundError` where a warning would say that a gate is not re-routed, also where its
            rewrite was not proven.
        capture: "default", or "auto": try Dynamo's dynamic-shape capture first. Only `sere_compile.compile` and
            `explain` can do so; a backend gets graphs that are captured already.
        fuse_router: replace scoring, top-k and normalising of up to 256 tokens by one kernel, where the graph is on
            CUDA and needs no gradients. "always": on a CPU as well.
        lower_experts: replace dispatches of up to 256 tokens, and 32 slots per expert on average, by kernels that read
            only the active experts, where the graph is on CUDA and needs no gradients. They round like any fusing
            compiler. "always": on a CPU as well, by C++ compiled at first use. `explain` and the log say what stayed,
            and why.
        pack_gqa: in graphs with a gate, attention of one query token reads keys and values once per group of query
            heads, where the model copies them per head, if the graph is on CUDA. "always": on a CPU as well, where
            kernels may round differently. The log (level INFO) says how many calls changed, and why others stayed.
        substitution: "reroute" is the paper's rule, weights unchanged. "projection" multiplies a re-routed slot's
            weight by a(u, v) = <A_u, A_v> / <A_v, A_v>, how much of expert u its substitute v reproduces; needs a
            profile with projections. "fill" keeps the experts that some token puts first, then those with the
            largest sum of squared routing weights in the batch, as many as the first S slots name (with "auto"
            `max_active`, at least K); lost slots go to kept experts by the token's own router scores, at new
            weights. It needs no profile, and mostly loses least (docs/quality.md; not where experts are copies of
            each other). `threshold` is then a share of that sum over all experts: an expert with more stays. A gate
            whose scores of all experts are out of reach is re-routed instead, and the report says so; with
            strict=True that is an error.
        per_gate: {pattern: {option: value}} for gates whose name (of the router's weight) matches the pattern, a glob
            such as "model.layers.0.*"; the options are those of `PER_GATE`. Of several that match, later ones win.
        collect_stats: count tokens, changed slots and active experts on the device; `sere_compile.stats` reads them.

    Raises:
        ConfigError: a value of the wrong type or out of range; the message names option, value and what is allowed.
    """

    select_top_k: int | str | None = None
    threshold: float | str = 0.0
    min_active: int | None = None
    max_tokens: int | None = None
    inner: str | Callable[..., Any] = "inductor"
    strict: bool = False
    collect_stats: bool = False
    max_active: int | None = None
    fuse_router: bool | str = True
    lower_experts: bool | str = True
    pack_gqa: bool | str = True
    capture: str = "default"
    substitution: str = "reroute"
    per_gate: Mapping[str, Mapping[str, Any]] | PerGate = ()

    def __new__(cls, *args: Any, **options: Any) -> SereConfig:
        """Made like any object; an unknown name raises `ConfigError` with the nearest known one."""
        known = tuple(field.name for field in dataclasses.fields(cls))
        unknown = [name for name in options if name not in known]
        if unknown:
            raise unknown_option(unknown[0], known)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        automatic = self.select_top_k == "auto"
        if not automatic:
            _check_count("select_top_k", self.select_top_k, least=1)
        _check_count("max_active", self.max_active, least=1)
        if automatic != (self.max_active is not None):
            given = f"select_top_k={self.select_top_k!r}, max_active={self.max_active!r}"
            raise ConfigError(f'select_top_k="auto" and max_active go together, got {given}')
        _check_count("min_active", self.min_active, least=0)
        if self.max_active is not None and (self.min_active or 0) > self.max_active:
            raise ConfigError(f"min_active={self.min_active} allows no budget of max_active={self.max_active} experts")
        _check_count("max_tokens", self.max_tokens, least=1)
        _check_threshold(self.threshold)
        if self.substitution not in SUBSTITUTIONS:
            raise ConfigError(f'substitution must be "reroute", "projection" or "fill", got {self.substitution!r}')
        if self.substitution == "fill" and isinstance(self.threshold, str):
            raise ConfigError(
                f'threshold={self.threshold!r} is a share of similarities, and substitution="fill" has none: give the '
                "share of a batch's squared routing weights above which an expert stays, such as 0.05"
            )
        for name in ("strict", "collect_stats"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in SPEED_PASSES:
            if getattr(self, name) not in (True, False, "always"):
                raise ConfigError(f'{name} must be True, False or "always", got {getattr(self, name)!r}')
        if self.capture not in ("default", "auto"):
            raise ConfigError(f'capture must be "default" or "auto", got {self.capture!r}')
        if not (isinstance(self.inner, str) or callable(self.inner)):
            raise ConfigError(f"inner must be the name of a backend or a callable, got {self.inner!r}")
        if self.inner == "sere":
            raise ConfigError('inner="sere" would compile with itself; name the backend to compile with after it')
        object.__setattr__(self, "per_gate", _hashable(self.per_gate))
        for pattern, options in self.gates:
            _check_per_gate(self, pattern, dict(options))

    def replace(self, **options: Any) -> SereConfig:
        """A copy with some options changed. Unknown names raise `ConfigError` with the nearest known name."""
        unknown = [name for name in options if name not in option_names()]
        if unknown:
            raise unknown_option(unknown[0], option_names())
        return dataclasses.replace(self, **options)

    @property
    def gates(self) -> PerGate:
        """`per_gate` in the form in which it is kept."""
        return cast(PerGate, self.per_gate)

    @property
    def fills_everywhere(self) -> bool:
        """Whether no gate's options ask for a similarity."""
        others = (dict(options).get("substitution", "fill") for _, options in self.gates)
        return self.substitution == "fill" and all(other == "fill" for other in others)

    def for_gate(self, *names: str) -> SereConfig:
        """The options of the gate whose router weight has this name; of several names any may match."""
        options: dict[str, Any] = {}
        for pattern, own in self.gates:
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                options.update(own)
        return self._without_gates(options)

    def _without_gates(self, options: Mapping[str, Any]) -> SereConfig:
        if options.get("select_top_k", "auto") != "auto":
            options = {"max_active": None, **options}
        return dataclasses.replace(self, per_gate=(), **options)

    def acts(self, switch: str, device: torch.device) -> bool:
        """Whether a speed pass (`SPEED_PASSES`) acts on a device: True does on CUDA alone, "always" everywhere."""
        option = getattr(self, switch)
        return option == "always" or (bool(option) and device.type == "cuda")

    def resolved_top_k(self, top_k: int) -> int:
        """S for a gate that selects K = `top_k` experts, at most K (the identity); with "auto" the smallest."""
        if isinstance(self.select_top_k, str):
            return 1  # "auto": the smallest S
        wanted = min(2, top_k - 1) if self.select_top_k is None else self.select_top_k
        # S = 0 only comes from K = 1, where there is nothing to re-route either.
        return top_k if wanted == 0 else min(wanted, top_k)

    def resolved_min_active(self, top_k: int) -> int:
        """The minimum number of primary experts for a gate that selects K = `top_k` experts."""
        if self.min_active is not None:
            return self.min_active
        return top_k if self.max_active is None else min(top_k, self.max_active)


def given_config(config: SereConfig | None) -> SereConfig:
    """The configuration that a function was given, or the default.

    Raises:
        ConfigError: it is none.
    """
    if config is not None and not isinstance(config, SereConfig):
        given = f"SereConfig(**{config!r})" if isinstance(config, Mapping) else "sere_compile.SereConfig(...)"
        raise ConfigError(f"config must be a SereConfig, got {type(config).__name__}: give {given}")
    return config or SereConfig()


def option_names() -> tuple[str, ...]:
    """The names of all options."""
    return tuple(field.name for field in dataclasses.fields(SereConfig))


def split_options(config: SereConfig, options: Mapping[str, Any] | None) -> tuple[SereConfig, dict[str, Any]]:
    """Separate `torch.compile(options=...)` into our options and those of the inner compiler.

    Raises:
        ConfigError: no mapping, or a name that is known neither to us nor to Inductor.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(f"options must be {{option: value}}, got {options!r}")
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


def _check_threshold(value: Any) -> None:
    if isinstance(value, str):
        quantile(value)
    elif not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        if isinstance(value, int) and not isinstance(value, bool):  # which may be too long to print
            raise ConfigError(f"threshold must be a finite number, got a whole number of {value.bit_length()} bits")
        raise ConfigError(f'threshold must be a finite number, or a share of experts such as "q0.2", got {value!r}')


def _hashable(per_gate: Any) -> PerGate:
    """Per-gate options from a mapping, or from what this made before."""
    pairs = per_gate.items() if isinstance(per_gate, Mapping) else per_gate
    if not isinstance(per_gate, (Mapping, tuple)):
        raise ConfigError(f"per_gate must be {{pattern: {{option: value}}}}, got {per_gate!r}")
    found = []
    for pattern, options in pairs:
        if not isinstance(pattern, str) or not isinstance(options, (Mapping, tuple)):
            raise ConfigError(f"per_gate must be {{pattern: {{option: value}}}}, got {pattern!r}: {options!r}")
        found.append((pattern, tuple(sorted(dict(options).items()))))
    return tuple(found)


def _check_per_gate(config: SereConfig, pattern: str, options: dict[str, Any]) -> None:
    for name in options:
        if name not in PER_GATE:
            near = difflib.get_close_matches(name, PER_GATE, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ConfigError(
                f"per_gate[{pattern!r}]: {name!r} is no option of a gate{hint} Those are {', '.join(PER_GATE)}"
            )
    try:
        config._without_gates(options)
    except ConfigError as error:
        raise ConfigError(f"per_gate[{pattern!r}]: {error}") from error


def quantile(threshold: float | str) -> float | None:
    """X of `"qX"`, or None of a number.

    Raises:
        ConfigError: a text of another form, or X outside of (0, 1).
    """
    if not isinstance(threshold, str):
        return None
    match = re.fullmatch(r"q(\d*\.?\d+)", threshold)
    value = float(match[1]) if match else 0.0
    if not 0 < value < 1:
        raise ConfigError(
            f'threshold must be a finite number, or a share of a gate\'s experts between "q0" and "q1" such as "q0.2", '
            f"got {threshold!r}"
        )
    return value
