"""`rewrite`: SERE in a graph that was traced ahead of time (torch.export, make_fx, symbolic_trace)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from .compiler import gate_options
from .compiler.gate_matrices import of_first, unprobed
from .compiler.gate_plan import GatePlan, refuse_shared_routers
from .compiler.missing_gates import describe_nearest_miss
from .compiler.program import Program
from .compiler.rewrite_gate import rewrite_gate
from .config import SPEED_PASSES, SereConfig, given_config
from .errors import ConfigError, GateNotFoundError, LoweringError, ProbeError, ProfileError, expect
from .experts.experts_module import find_experts
from .experts.probe import Probed, probe_gate
from .passes import Gate, Skip, extract_dispatch, find_gates
from .passes.proof.region import router_of_the_call
from .report import REWRITTEN
from .rewrite_mark import mark_as_seen
from .similarity.fit import check_size, required_projection
from .similarity.profile import SimilarityProfile
from .similarity.threshold import matrix_in_graph

log = logging.getLogger(__name__)

Traced = TypeVar("Traced", GraphModule, ExportedProgram)


# The options that say what re-routing is in a program, and those that only say how a graph is
# captured and compiled.
_USED = frozenset(
    {"select_top_k", "threshold", "min_active", "max_active", "max_tokens", "substitution", "per_gate", "strict"}
)
_OF_THE_COMPILER = frozenset({"inner", "capture", *SPEED_PASSES})

_NO_SHAPES = (
    "Its nodes carry no shapes, as symbolic_trace leaves them: "
    "torch.fx.passes.shape_prop.ShapeProp(graph_module).propagate(*example_inputs) records them"
)


def rewrite(traced: Traced, *, profile: SimilarityProfile | None = None, config: SereConfig | None = None) -> Traced:
    """Re-route every gate of a traced graph. Similarity matrices become buffers of the result.

    Args:
        traced: an `ExportedProgram`, or a `GraphModule` whose nodes carry shapes. It is not
            changed.
        profile: a matrix for every gate, by the name of its router weight (in the live model, or as
            make_fx names it). Without one the experts are probed: in the graph where its batch size
            is fixed, else in the model it was traced from, which has to be there still.
        config: S, threshold, min_active, max_active, max_tokens, substitution, per_gate and strict;
            the backend's defaults otherwise. `inner` has no meaning here.

    Returns:
        A rewritten copy that shares the weights.

    Raises:
        ArgumentError: `traced` is neither.
        GateNotFoundError: no gate was found or every gate was refused; the message says why. Without a
            profile a gate is refused whose experts cannot be run.
        ConfigError: `config` is no SereConfig; max_tokens is given, and the program takes batches on both
            sides of it; or collect_stats is.
        ProfileError: `profile` is none, has no matrix for a gate, or one of another size, or lacks
            projections that are asked for.
        ProbeError: without a profile, a gate cannot be filled, and its experts could not be run.
    """
    _check_traced(traced, profile)
    return _rewritten(Program(traced), profile, given_config(config))[0]


def _check_traced(traced: object, profile: object) -> None:
    made = ", which torch.export.export(model, args) makes of a model"
    expect(traced, (ExportedProgram, GraphModule), f"rewrite takes a GraphModule or an ExportedProgram{made}")
    if profile is not None and not isinstance(profile, SimilarityProfile):
        raise ProfileError(f"rewrite takes a SimilarityProfile, got {type(profile).__name__}")


def rewrite_with_one_operator_for_experts(
    traced: ExportedProgram, profile: SimilarityProfile | None, config: SereConfig | None
) -> ExportedProgram:
    """`rewrite`, and the experts of every gate become one `sere::expert_mlp`: for lowerings that make something of it.

    Raises:
        LoweringError: the experts of a gate are none that this operator computes; the message says which, and why.
    """
    _check_traced(traced, profile)
    rewritten, plans = _rewritten(Program(traced, fuses_experts=True), profile, given_config(config))
    for plan in plans:
        if plan.unfused is not None:
            raise LoweringError(f"the experts of {plan.name} are not known to be stacked layers: {plan.unfused}")
    return rewritten


def _rewritten(program: Program, profile: SimilarityProfile | None, config: SereConfig) -> tuple[Any, list[GatePlan]]:
    """The rewritten graph, and what was done to each gate."""
    _check_options(config)
    findings = find_gates(program.module)
    if not findings.gates:
        why = describe_nearest_miss(findings.nearest_miss) if program.has_shapes() else _NO_SHAPES
        raise GateNotFoundError(f"no MoE gate in the traced graph. {why}")
    plans = _plan_gates(findings.gates, config, program)
    # The matrices of a profile first: one that does not fit is an error before anything is changed.
    matrices = [_needed(plan, profile, program) for plan in plans]
    refused = []
    for plan, found in zip(plans, matrices, strict=True):
        # A weight that comes with each call: the gate was refused, or there is nothing to do.
        weight, find = plan.constant, partial(_find, plan, found)
        refusal = plan.refusal if weight is None else rewrite_gate(plan, program, found, weight, program.owners, find)
        if refusal is not None:
            log.warning("%s is not re-routed: %s", plan.name, refusal)
            refused.append(refusal)
    if refused and (config.strict or len(refused) == len(plans)):
        raise GateNotFoundError(f"{len(refused)} of {len(plans)} gates were refused: {refused[0]}")
    for plan in plans:
        mark_as_seen(plan.gate, plan.status == REWRITTEN)
    return program.finish(), plans


def _check_options(config: SereConfig) -> None:
    """Refuse an option that would be ignored here; those of the compiler behind us have nothing to act on."""
    if config.collect_stats:
        raise ConfigError(
            "collect_stats counts in models that torch.compile compiled; a program traced ahead of time keeps no "
            "counters. Use config.replace(collect_stats=False) here, and count with backend='sere'"
        )
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if option.name not in _USED | _OF_THE_COMPILER and value != option.default:
            raise ConfigError(
                f"{option.name}={value!r} is for backend='sere'; a program traced ahead of time takes "
                f"{', '.join(sorted(_USED))}"
            )


def _plan_gates(gates: Sequence[Gate], config: SereConfig, program: Program) -> list[GatePlan]:
    names = [program.weight_name(gate) for gate in gates]
    if config.per_gate:
        gate_options.tell_unknown(config, names, "the program")
    plans = []
    for gate, name in zip(gates, names, strict=True):
        own, weight = config.for_gate(name), program.value_of(gate.router_weight)
        plans.append(GatePlan(gate, name, own, config, extract_dispatch(gate), constant=weight))
        plans[-1].decide(program.has_more_tokens)
        if weight is None and plans[-1].is_to_reroute:
            plans[-1].refuse(router_of_the_call(gate))
    refuse_shared_routers(plans, program.value_of)
    return plans


class _Late(dict[str, torch.Tensor]):
    """The matrices of a gate, made when the first of them is asked for."""

    def __init__(self, make: Callable[[], dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, kind: str) -> torch.Tensor:
        self.update(self._make())
        return self[kind]


def _needed(plan: GatePlan, profile: SimilarityProfile | None, program: Program) -> dict[str, torch.Tensor]:
    if not plan.is_to_reroute:
        return {}
    if profile is None or plan.config.substitution == "fill":
        # Nobody probes the experts of a gate that is refused; only a gate that cannot be filled has a use for them.
        return _Late(lambda: _matrices(plan, profile, program))
    return _matrices(plan, profile, program)


def _find(plan: GatePlan, matrices: dict[str, torch.Tensor]) -> Skip | None:
    """Why a gate that is proven has no matrix, or None."""
    try:
        matrices["similarity"]
    except ProbeError as error:
        return unprobed(plan, error)
    return None


def _matrices(plan: GatePlan, profile: SimilarityProfile | None, program: Program) -> dict[str, torch.Tensor]:
    """What the gate's re-routing reads, by kind, on its weight's device."""
    config, device = plan.config, plan.weight(()).device
    if profile is None:
        probed = of_first(plan, lambda one: _probe(one, program))
        similarity: torch.Tensor = probed.similarity
        projection: torch.Tensor | None = probed.projection
    else:
        similarity, projection = _of_profile(plan, profile)
    found = {"similarity": matrix_in_graph(similarity, config.threshold)}
    if config.substitution == "projection":
        found["projection"] = required_projection(projection, plan.name).fill_diagonal_(1.0)
    return {kind: value.to(device=device, dtype=torch.float32, copy=True) for kind, value in found.items()}


def _of_profile(plan: GatePlan, profile: SimilarityProfile) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Similarity and, where the profile has them, projection coefficients of a gate."""
    given = str(plan.gate.router_weight.target)  # make_fx has names of its own, which a profile may go by
    known = plan.name if plan.name in profile else given
    if known not in profile:
        raise ProfileError(f"the profile has no matrix for the gate {plan.name}; it has {', '.join(profile)}")
    check_size(profile[known], plan.name, plan.gate.num_experts)
    return profile[known], profile.projection(known)


def _probe(plan: GatePlan, program: Program) -> Probed:
    """How alike a gate's experts are: run in the graph, else in the live model that owns the router weight."""
    log.info("no profile is given: probing the experts of %s on random hidden states", plan.name)
    weight, gate = plan.weight(()), plan.gate
    return probe_gate(
        gate,
        plan.region,
        plan.name,
        weight,
        lambda: find_experts(program.owners.find(weight), gate.num_experts),
        program.value_of,
        "Give a profile, or rewrite while that model is there",
    )
