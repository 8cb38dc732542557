"""Prove, by running it, that a rewritten gate computes what re-routing defines, without an oracle for the model.

Re-routing by a map m gives what the *original program* gives, with its original ids and weights, when expert u's
parameters are those of expert m(u). This holds whatever the program does with duplicates, order, normalising or
statistics. So the part of the graph from the router's logits to where its tokens come together runs on made-up values,
once rewritten with new ids, and once as traced with exchanged parameters:

- with S = K the results are equal bit for bit;
- with S < K they are equal but for rounding, in tokens that name an expert twice, in such whose ids stay, and where
  masks of the graph mark padding;
- what else reads the ids or weights (a returned value, a loss, a statistic) is the same as in the original.

A way to rewrite is tried first that the kinds of the gate's uses hint at, then the other. What is found holds for every
gate with an equal region.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch._functorch import predispatch
from torch.fx import Node

from .gate import Evidence, Gate, Skip, SkipReason, UseKind
from .graph import nodes
from .graph.run_part import ValueOf
from .proof.key import region_key
from .proof.more_tokens import more_tokens
from .proof.other_numbers import other_numbers
from .proof.prover import Prover, Verdict
from .proof.region import Region, cut_region

SHOWN = "as with exchanged experts"  # what a proof says
_REMEMBERED = 512  # regions


@dataclass(frozen=True)
class Proof:
    """How a gate is to be rewritten, and what was shown of it.

    Attributes:
        gate: with the kinds of its uses as they were proven.
        merged: whether duplicates are merged.
        readers: the consumers of the routing weights that see merged or scaled ones.
        experts: the nodes of the graph that hold the experts' parameters; empty where they are outside the graph.
        shown: in words for a report.
        tables: (reader, table): where weights are picked out of a table [T, E] by a mask of the ids, and move in it.
    """

    gate: Gate
    merged: bool
    readers: tuple[Node, ...] | None
    experts: frozenset[Node]
    shown: str
    tables: tuple[tuple[Node, Node], ...] = ()


# How a gate can be rewritten whose ids leave the graph, from the gate; running what receives them is up to the caller.
OutsideProof = Callable[[Gate], "Proof | Skip"]


def _not_run(gate: Gate) -> Proof | Skip:
    detail = "its ids leave the graph, and the code that receives them was not run"
    return Skip(SkipReason.UNVERIFIED, gate.selection, detail, evidence=Evidence.EXPERTS)


def verify_rewrite(
    gate: Gate, value_of: ValueOf = lambda node: None, outside: OutsideProof = _not_run, *, weighing: bool = False
) -> Proof | Skip:
    """How a gate can be rewritten with proof, or the refusal. The graph is not changed.

    Args:
        gate: found, not yet rewritten.
        value_of: what graph inputs and attributes hold, see `graph.run_part.ValueOf`.
        outside: asked where the ids leave the graph towards experts that it does not hold, and where
            the dispatch cannot be run by itself.
        weighing: whether the weights will change: then merging has to be proven, which changes them
            and shows that the dispatch multiplies what its experts give by them.
    """
    module = gate.selection.graph.owning_module
    if _inside_vmap(gate.selection):
        return Skip(SkipReason.ONE_TOKEN, gate.selection, nodes.place(gate.selection), evidence=Evidence.EXPERTS)
    leaving = all(use.kind is UseKind.LEAVES for use in gate.dispatch_uses)
    region = cut_region(gate, value_of)
    if isinstance(region, Skip):
        # Also of a dispatch that is in the graph, but cannot be cut out of it: the caller may run more than the graph.
        shown = outside(gate)
        was_run = outside is not _not_run and isinstance(shown, Skip) and shown.evidence is Evidence.EXPERTS
        return shown if leaving or was_run or isinstance(shown, Proof) else region
    if waits := next(filter(nodes.exchanges, region.graph.nodes), None):
        name = region.originals.get(waits, waits).name
        detail = f"{name}, in the midst of its dispatch, waits for other ranks, and a trial would wait for ever"
        return Skip(SkipReason.UNVERIFIED, gate.selection, detail, evidence=Evidence.EXPERTS)
    # What the graph's guards let through is no part of the region itself.
    served = [list(numbers.values()) for numbers in (more_tokens(region), *other_numbers(region))]
    key = region_key(region, module), weighing, str(served)
    if key not in _verdicts:
        while len(_verdicts) >= _REMEMBERED:
            _verdicts.pop(next(iter(_verdicts)), None)
        _verdicts[key] = Prover(region, module, merging=weighing).prove()
    if leaving and _verdicts[key].without_experts:
        return outside(gate)
    return _for_gate(_verdicts[key], gate, region)


_verdicts: dict[tuple[str, bool, str], Verdict] = {}


def _for_gate(verdict: Verdict, gate: Gate, region: Region) -> Proof | Skip:
    if verdict.refused:
        # Merging may have been right where another way was found wrong; weights were not known for it.
        unmerged = gate.weights is None and gate.weights_skip is not None and verdict.tried
        if unmerged and gate.weights_skip is not None and verdict.reason is SkipReason.UNVERIFIED:
            detail = "; ".join(filter(None, [gate.weights_skip.detail, verdict.refusal]))
            return replace(gate.weights_skip, detail=detail, evidence=Evidence.EXPERTS)
        detail = verdict.refusal or nodes.place(gate.selection)
        return Skip(verdict.reason, gate.selection, detail, evidence=Evidence.EXPERTS)
    kinds = {
        (region.originals[use.consumer], region.originals[use.read]): kind
        for use, kind in zip(region.gate.uses, verdict.kinds, strict=True)
    }
    uses = tuple(replace(use, kind=kinds.get((use.consumer, use.read), use.kind)) for use in gate.uses)
    readers = tuple(region.originals[region.readers[number]] for number in verdict.readers)
    order = list(region.leaves.values())
    experts = frozenset(order[number].source for number in verdict.experts)
    cut = list(region.graph.nodes)
    tables = tuple((region.originals[cut[r]], region.originals[cut[t]]) for r, t in verdict.tables)
    return Proof(replace(gate, uses=uses), verdict.merged, readers, experts, SHOWN, tables)


def _inside_vmap(selection: Node) -> bool:
    """Whether the selection is made for one example at a time, as inside `torch.func.vmap`."""

    def before(target: Any) -> int:
        return sum(node < selection for node in selection.graph.find_nodes(op="call_function", target=target))

    return before(predispatch._vmap_increment_nesting) > before(predispatch._vmap_decrement_nesting)
