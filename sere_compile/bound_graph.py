"""Run a rewritten graph with each gate's own similarity matrix."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import binding, missing_gates
from .calibration.probe import module_dispatch, probe_similarity, region_dispatch
from .errors import ProbeError, ProfileError
from .gate_plan import AppendedInput, GatePlan, attribute
from .module_tree import find_experts, find_owner
from .passes import DispatchRegion, Gate
from .report import REWRITTEN, GateRow

log = logging.getLogger(__name__)

Observer = Callable[[GateRow], None]


class BoundGraph:
    """A compiled graph that gets each gate's matrix by the identity of the weight that a call passes."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        appended: list[AppendedInput],
        plans: list[GatePlan],
        observer: Observer | None = None,
    ) -> None:
        self._compiled = compiled
        self._appended = appended
        self._plans = plans
        self._observer = observer
        self._last: list[Callable[[], torch.Tensor | None]] = []
        self._version = -1
        self._extra: list[torch.Tensor] = []

    def __call__(self, *arguments: Any) -> Any:
        """Run the compiled graph with what Dynamo passes and the gates' own inputs behind it."""
        missing_gates.gate_runs.count += 1
        return self._compiled(*arguments, *self.bind(arguments))

    def bind(self, arguments: Sequence[Any]) -> list[torch.Tensor]:
        """The appended inputs for a call with these arguments; the same list while the weights stay the same."""
        weights = [plan.weight(arguments) for plan in self._plans]
        same = self._version == binding.version() and all(
            last() is weight for last, weight in zip(self._last, weights, strict=True)
        )
        if not same:
            for plan, weight in zip(self._plans, weights, strict=True):
                self._resolve(plan, weight, arguments)
            self._extra = [self._value(item, item.plan.weight(arguments)) for item in self._appended]
            self._last = [weakref.ref(weight) for weight in weights]
            self._version = binding.version()
        return self._extra

    def _value(self, item: AppendedInput, weight: torch.Tensor) -> torch.Tensor:
        entry = binding.lookup(weight)
        assert entry is not None
        return entry.counts_on(weight.device) if item.counts else entry.matrix_on(weight.device)

    def _resolve(self, plan: GatePlan, weight: torch.Tensor, arguments: Sequence[Any]) -> None:
        """Name the gate at first sight, and find or measure its matrix."""
        entry = binding.lookup(weight)
        if entry is None:
            owner = find_owner(weight)
            entry = binding.name(weight, owner.name if owner is not None else plan.fallback_name)
        _check_size(plan.gate, entry)
        if self._observer is not None:
            self._observer(_row(plan, entry))
        elif plan.status == REWRITTEN and entry.matrix is None:
            _refuse_partial_profile(weight, entry.name)
            matrix = _probe(plan, weight, arguments, entry.name)
            binding.assign(weight, entry.name, matrix, "probed", from_profile=False)


def _check_size(gate: Gate, entry: binding.GateEntry) -> None:
    if entry.matrix is not None and entry.matrix.shape[0] != gate.num_experts:
        raise ProfileError(
            f"the matrix attached for {entry.name} is {list(entry.matrix.shape)}, but its gate selects from "
            f"{gate.num_experts} experts"
        )


def _refuse_partial_profile(weight: torch.Tensor, name: str) -> None:
    """A model with a profile never falls back to probing for the gates that the profile lacks."""
    owner = find_owner(weight)
    entries = [binding.lookup(parameter) for parameter in owner.root.parameters()] if owner is not None else []
    if any(entry is not None and entry.from_profile for entry in entries):
        raise ProfileError(
            f"a similarity profile is attached to this model, but it has no matrix for the gate {name}. "
            f"Calibrate the whole model again, or call sere_compile.detach(model) to probe every gate"
        )


def _probe(plan: GatePlan, weight: torch.Tensor, arguments: Sequence[Any], name: str) -> torch.Tensor:
    """Measure the similarity of a gate's experts, in the graph where its dispatch is there, else beside its router."""
    gate = plan.gate
    log.info("no similarity attached for %s: probing its %d experts on random hidden states", name, gate.num_experts)
    _say_once_that_probing_happens()
    if isinstance(plan.region, DispatchRegion):
        values = {node: _number(value) for node, value in zip(plan.inputs, arguments, strict=False)}
        for node in plan.region.inputs:
            if node.op == "get_attr":
                values[node] = attribute(plan.graph, node)
        dispatch, rows = region_dispatch(plan.region, values)
        return probe_similarity(dispatch, rows, gate.num_experts, gate.top_k, weight.device)
    experts = find_experts(weight, gate.num_experts)
    if experts is None:
        raise ProbeError(
            f"no similarity is attached for the gate {name}, and its experts cannot be probed: {plan.region}, and no "
            f"experts module stands beside the router. Attach a profile: sere_compile.attach(model, profile)"
        )
    hidden = weight.shape[1] if weight.shape[0] == gate.num_experts else weight.shape[0]
    dispatch = module_dispatch(experts, hidden, weight.dtype, weight.device)
    return probe_similarity(dispatch, 512, gate.num_experts, gate.top_k, weight.device)


def _number(value: Any) -> Any:
    return value.node.hint if isinstance(value, torch.SymInt) else value


class _Once:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: set[str] = set()

    def __call__(self, text: str) -> bool:
        with self._lock:
            first = text not in self._done
            self._done.add(text)
            return first


_first_time = _Once()


def _say_once_that_probing_happens() -> None:
    if _first_time("probing"):
        log.warning(
            "no similarity profile is attached: experts are probed with random hidden states, once per gate. "
            "A calibrated profile is better: sere_compile.attach(model, SimilarityProfile.load(path))"
        )


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
    )
