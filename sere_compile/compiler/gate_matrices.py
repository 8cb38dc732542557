"""What a gate of a compiled graph reads beside the graph's own inputs: found by its weight, or probed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import ProbeError
from ..experts.experts_module import find_experts
from ..experts.owner import Owners
from ..experts.probe import Probed, find_dispatch, probe_gate
from ..idle import never_reached, tell_once
from ..passes import COUNTED, Evidence, Skip, SkipReason
from ..passes.graph.run_part import ValueOf
from ..report import REWRITTEN
from ..similarity import binding
from ..similarity.attach import attach_from_owner
from ..similarity.fit import check_size
from . import gate_options
from .dynamo_graph import AppendedInput
from .gate_plan import GatePlan

log = logging.getLogger(__name__)
_Found = TypeVar("_Found")


def stand_in(plan: GatePlan, kind: str, weight: torch.Tensor) -> torch.Tensor:
    """A tensor like what an input of one kind holds, see `appended_value`."""
    if kind == "counts":
        return torch.zeros(len(COUNTED), dtype=torch.int64, device=weight.device)
    return examples(plan, weight)[kind]


def examples(plan: GatePlan, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors like the matrices that calls will bring, by kind."""
    size = plan.gate.num_experts
    matrix = torch.empty(size, size, dtype=torch.float32, device=weight.device)
    return {"similarity": matrix, "projection": matrix}


def appended_value(item: AppendedInput, weight: torch.Tensor) -> torch.Tensor:
    """What an appended input holds in a call with this router weight, which is bound."""
    entry = binding.lookup(weight)
    assert entry is not None
    if item.kind == "counts":
        return entry.counts_on(weight.device)
    if item.kind == "projection":
        return entry.projection_on(weight.device)
    return entry.matrix_on(weight.device, item.plan.config.threshold)


def named_entry(plan: GatePlan, weight: torch.Tensor, owners: Owners) -> binding.GateEntry:
    """The weight's entry, named at first sight, with the matrix of the profile attached to its model.

    Raises:
        ProfileError: the matrix is of another size than the gate, or an attached profile has none
            for it.
    """
    entry = binding.lookup(weight)
    if entry is None or entry.matrix is None:
        owner = owners.find(weight)
        entry = binding.name(weight, owner.name if owner is not None else plan.name)
        if owner is not None:
            attach_from_owner(owner)
            entry = binding.name(weight, owner.name)
    if entry.matrix is not None:
        check_size(entry.matrix, entry.name, plan.gate.num_experts)
    return entry


def find_matrix(
    plan: GatePlan, weight: torch.Tensor, value_of: ValueOf, owners: Owners, *, probing: bool = True
) -> Skip | None:
    """Find or measure the matrix of a gate that is proven, before it is rewritten; or why there is none.

    Args:
        plan: of the gate.
        weight: its router's.
        value_of: what the graph's inputs hold.
        owners: of the router weights.
        probing: whether to run the experts; else it is only asked whether they could be run.

    Raises:
        ProfileError: see `named_entry`.
    """
    if isinstance(weight, FakeTensor):  # which weight it is shows when the graph is called
        return None
    entry = named_entry(plan, weight, owners)
    if entry.matrix is not None:
        return None
    try:
        if probing:
            _probe(plan, weight, value_of, entry.name, owners)
        else:
            of_first(plan, lambda one: find_dispatch(*_to_probe(one, weight, value_of, entry.name, owners)))
    except ProbeError as error:
        return unprobed(plan, error)
    return None


def of_first(plan: GatePlan, ask: Callable[[GatePlan], _Found]) -> _Found:
    """The answer for a plan, or for the first of those with the same experts that has one.

    Raises:
        ProbeError: none has; the plan's own.
    """
    errors = []
    for one in plan.showing_experts:
        try:
            return ask(one)
        except ProbeError as error:
            errors.append(error)
    raise errors[0]


def unprobed(plan: GatePlan, error: ProbeError) -> Skip:
    """The refusal of a gate whose experts cannot be run: a program that runs without us is not stopped."""
    return Skip(SkipReason.NOT_PROBED, plan.gate.selection, str(error), evidence=Evidence.EXPERTS)


def bind_weight(plan: GatePlan, weight: torch.Tensor, value_of: ValueOf, owners: Owners) -> None:
    """Find or measure the matrix of the weight that a call passes.

    Raises:
        ConfigError: per_gate gives the weight other options than those in the graph.
        ProfileError: see `named_entry`.
        ProbeError: no matrix is attached and the experts cannot be run.
    """
    gate_options.check(plan.given, plan.config, weight, plan.name, owners)
    # A gate that is not rewritten never gets a matrix: looking for its owner would scan the heap on
    # each call.
    if plan.status != REWRITTEN:
        return
    entry = named_entry(plan, weight, owners)
    if plan.is_filled:
        return
    if entry.matrix is None:
        _probe(plan, weight, value_of, entry.name, owners)
        entry = binding.name(weight, entry.name)
    _tell_unreached(entry, plan.config.threshold)


def _tell_unreached(entry: binding.GateEntry, threshold: float | str) -> None:
    """Say that a threshold cannot act; layers that share a graph are bound at every call, so each is asked once."""
    if threshold in entry.judged:
        return
    assert entry.matrix is not None
    entry.judged.add(threshold)
    tell_once(entry.name, never_reached(threshold, entry.matrix))


def _probe(plan: GatePlan, weight: torch.Tensor, value_of: ValueOf, name: str, owners: Owners) -> None:
    count = plan.gate.num_experts
    log.info("no similarity attached for %s: probing its %d experts on random hidden states", name, count)
    found: Probed = of_first(plan, lambda one: probe_gate(*_to_probe(one, weight, value_of, name, owners)))
    warn_of_probing()
    binding.assign(weight, name, found.similarity, "probed", from_profile=False, projection=found.projection)


def _to_probe(plan: GatePlan, weight: torch.Tensor, value_of: ValueOf, name: str, owners: Owners) -> tuple[Any, ...]:
    """The arguments of `probe_gate`."""
    return (
        plan.gate,
        plan.region,
        name,
        weight,
        lambda: find_experts(owners.find(weight), plan.gate.num_experts),
        lambda node: None if isinstance(value := value_of(node), FakeTensor) else value,
        "Attach a profile: sere_compile.attach(model, profile)",
    )


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
