"""Run a rewritten graph with each gate's own similarity matrix."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch.fx import Node

from ..errors import ProbeError, ProfileError
from ..experts.hidden_states import scale_at
from ..experts.module_tree import find_experts, find_owner
from ..experts.probe import MODULE_ROWS, PROBE_TOKENS, Probed, module_dispatch, probe_experts, region_dispatch
from ..passes import DispatchRegion, Skip
from ..passes.graph import nodes
from ..report import REWRITTEN, SKIPPED, GateRow
from ..similarity import binding
from ..similarity.profile import attach_from_owner
from ..similarity.threshold import resolve_threshold
from . import gate_options, missing_gates
from .gate_plan import AppendedInput, GatePlan, attribute

log = logging.getLogger(__name__)


class BoundGraph:
    """A compiled graph that gets each gate's matrix by the identity of the weight that a call passes."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        appended: list[AppendedInput],
        plans: list[GatePlan],
        watch: Callable[[list[torch.Tensor]], bool] | None = None,
    ) -> None:
        self._compiled = compiled
        self._watch = watch  # told which gates run until it has nothing left to tell
        self._appended = appended
        self._plans = plans
        # What the last call bound: version of the registry, weights, extra inputs. One tuple, so that threads that
        # share the graph never see one call's weights with another's matrices.
        self._last: tuple[int, list[Callable[[], torch.Tensor | None]], list[torch.Tensor]] = (-1, [], [])

    def __call__(self, *arguments: Any) -> Any:
        """Run the compiled graph with what Dynamo passes and the gates' own inputs behind it."""
        if self._watch is not None and self._watch([plan.weight(arguments) for plan in self._plans]):
            self._watch = None
        missing_gates.gate_runs.count += 1
        return self._compiled(*arguments, *self.bind(arguments))

    def bind(self, arguments: Sequence[Any]) -> list[torch.Tensor]:
        """The appended inputs for a call with these arguments; the same list while the weights stay the same."""
        weights = [plan.weight(arguments) for plan in self._plans]
        version, last, extra = self._last
        if version == binding.version() and all(ref() is weight for ref, weight in zip(last, weights, strict=True)):
            return extra
        for plan, weight in zip(self._plans, weights, strict=True):
            _resolve(plan, weight, arguments)
        version = binding.version()
        extra = [_value(item, item.plan.weight(arguments)) for item in self._appended]
        self._last = (version, [weakref.ref(weight) for weight in weights], extra)
        return extra


class ObservedGraph:
    """A graph as it was traced, that reports its gates and refused selections to `observer` whenever it runs."""

    def __init__(
        self, original: Callable[..., Any], plans: list[GatePlan], skips: Sequence[Skip], *, whole_call: bool
    ) -> None:
        self._original = original
        self._plans = plans
        self._skips = skips
        self._whole_call = whole_call

    def __call__(self, *arguments: Any) -> Any:
        """Report, then run the original graph."""
        report = observer.get()
        if self._whole_call:
            on_whole_call.get()()
        for plan in self._plans:
            report(_row(plan, _named_entry(plan, plan.weight(arguments))))
        for skip in self._skips:
            report(_skip_row(skip))
        return self._original(*arguments)


# Where `explain` collects rows. Not part of a backend: two explaining backends have to be equal, or each would leave
# a compiled version of its own in Dynamo's cache.
observer: ContextVar[Callable[[GateRow], None]] = ContextVar("observer", default=lambda row: None)
# ... and is told that one graph was all of the call, so that nothing ran outside.
on_whole_call: ContextVar[Callable[[], None]] = ContextVar("on_whole_call", default=lambda: None)


def _value(item: AppendedInput, weight: torch.Tensor) -> torch.Tensor:
    entry = binding.lookup(weight)
    assert entry is not None
    if item.kind == "counts":
        return entry.counts_on(weight.device)
    if item.kind == "projection":
        return entry.projection_on(weight.device)
    return entry.matrix_on(weight.device, item.plan.config.threshold)


def _named_entry(plan: GatePlan, weight: torch.Tensor) -> binding.GateEntry:
    """The weight's entry, named at first sight, with the matrix of the profile attached to its model."""
    entry = binding.lookup(weight)
    if entry is None or entry.matrix is None:
        owner = find_owner(weight)
        entry = binding.name(weight, owner.name if owner is not None else plan.fallback_name)
        if owner is not None and entry.matrix is None:
            attach_from_owner(weight, owner)
            entry = binding.name(weight, owner.name)
    if entry.matrix is not None and entry.matrix.shape[0] != plan.gate.num_experts:
        raise ProfileError(
            f"the matrix attached for {entry.name} is {list(entry.matrix.shape)}, but its gate selects from "
            f"{plan.gate.num_experts} experts"
        )
    return entry


def _resolve(plan: GatePlan, weight: torch.Tensor, arguments: Sequence[Any]) -> None:
    """Find or measure the matrix of the weight that a call passes."""
    gate_options.check(plan.given, plan.config, weight, plan.fallback_name)
    # A gate that is not rewritten never gets a matrix: looking for its owner would scan the heap on each call.
    if plan.status != REWRITTEN:
        return
    entry = _named_entry(plan, weight)
    if entry.matrix is None:
        probed = _probe(plan, weight, arguments, entry.name)
        binding.assign(
            weight, entry.name, probed.similarity, "probed", from_profile=False, projection=probed.projection
        )


def _probe(plan: GatePlan, weight: torch.Tensor, arguments: Sequence[Any], name: str) -> Probed:
    """Measure the similarity of a gate's experts, in the graph where its dispatch is there, else beside its router."""
    gate = plan.gate
    log.info("no similarity attached for %s: probing its %d experts on random hidden states", name, gate.num_experts)
    warn_of_probing()
    experts = find_experts(weight, gate.num_experts)
    values = {node: _number(value) for node, value in zip(plan.inputs, arguments, strict=False)}

    def value(node: Node) -> Any:
        return attribute(plan.graph, node) if node.op == "get_attr" else values[node]

    if isinstance(plan.region, DispatchRegion):
        values |= {node: value(node) for node in plan.region.inputs if node.op == "get_attr"}
        scales = [scale_at(node, gate.router_input, name) for node in plan.region.activations]
        dispatch, rows = region_dispatch(plan.region, values, scales, value)
        # A graph for a small batch takes one run for every few (expert, token) pairs: thousands.
        if experts is None or rows >= PROBE_TOKENS:
            return probe_experts(dispatch, rows, gate.num_experts, gate.top_k, weight.device)
    if experts is None:
        raise ProbeError(
            f"no similarity is attached for the gate {name}, and its experts cannot be probed: {plan.region}, and no "
            f"experts module stands beside the router. Attach a profile: sere_compile.attach(model, profile)"
        )
    hidden = weight.shape[1] if weight.shape[0] == gate.num_experts else weight.shape[0]
    scale = scale_at(gate.router_input, gate.router_input, name)
    dispatch = module_dispatch(experts, hidden, weight.dtype, weight.device, scale, value)
    return probe_experts(dispatch, MODULE_ROWS, gate.num_experts, gate.top_k, weight.device)


def _number(value: Any) -> Any:
    return value.node.hint if isinstance(value, torch.SymInt) else value


class _ProbingWarning:
    """Says once in a process, whichever thread comes first, that there is no profile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given = False

    def __call__(self) -> None:
        with self._lock:
            if self._given:
                return
            self._given = True
        log.warning(
            "no similarity profile is attached: experts are probed with random hidden states, once per gate. "
            "A calibrated profile is better: sere_compile.attach(model, SimilarityProfile.load(path))"
        )

    def reset(self) -> None:
        """Say it again the next time."""
        self._given = False


warn_of_probing = _ProbingWarning()


def _row(plan: GatePlan, entry: binding.GateEntry) -> GateRow:
    gate = plan.gate
    rewritten = plan.status == REWRITTEN
    return GateRow(
        name=entry.name,
        num_experts=gate.num_experts,
        top_k=gate.top_k,
        select_top_k=plan.select_top_k if rewritten else gate.top_k,
        scoring=gate.scoring,
        is_sorted=gate.is_sorted,
        dispatch=gate.dispatch + (", merged" if rewritten and gate.needs_merge else ""),
        status=plan.status,
        reason=plan.reason,
        similarity=(entry.source or "none attached: probed at compile time") if rewritten else "",
        threshold=_threshold(plan, entry) if rewritten else 0.0,
        substitution=plan.config.substitution if rewritten else "reroute",
        kernels=plan.kernels,
        proof=plan.proof if rewritten else "",
    )


def _threshold(plan: GatePlan, entry: binding.GateEntry) -> float | str:
    """The threshold of a gate, as a number where its matrix is known."""
    threshold = plan.config.threshold
    return threshold if entry.matrix is None else resolve_threshold(threshold, entry.matrix)


def _skip_row(skip: Skip) -> GateRow:
    """A refused selection as a line of a report."""
    place = nodes.source_line(skip.node)
    name = f"{skip.node.name} ({place})" if place else skip.node.name
    return GateRow(name, None, None, None, "", None, "", SKIPPED, str(skip))
