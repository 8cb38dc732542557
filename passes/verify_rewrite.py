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

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._functorch import predispatch
from torch.fx import Graph, GraphModule, Node

from .gate import Evidence, Gate, Skip, SkipReason, Use, UseKind
from .graph import nodes
from .graph.run_part import ValueOf, run_graph
from .proof.expert_parameters import ExpertParameters, Told, Values
from .proof.key import region_key
from .proof.made_up import activation_values, state_values
from .proof.outside import verify_outside
from .proof.region import Region, cut_region
from .proof.sources import experts_meet_hidden
from .reroute_dispatch import Rewrite, RoutingSettings, reroute_dispatch

SHOWN = "what the original gives with the parameters of the expert that stands in"  # what a proof says
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError)
_DRAWS = 4
_TOKENS = 16  # that the draws hold together at least
_MOST_DRAWS = 12
_REMEMBERED = 512


def tolerance(dtype: torch.dtype) -> float:
    """How far results that are equal but for rounding may be apart, relative to their largest."""
    return _TOLERANCE.get(dtype, _HALF_TOLERANCE)


@dataclass(frozen=True)
class Proof:
    """How a gate is to be rewritten, and what was shown of it.

    Attributes:
        gate: with the kinds of its uses as they were proven.
        merged: whether duplicates are merged.
        readers: the consumers of the routing weights that see merged or scaled ones.
        experts: the nodes of the graph that hold the experts' parameters; empty where they are outside the graph.
        shown: in words for a report.
    """

    gate: Gate
    merged: bool
    readers: tuple[Node, ...] | None
    experts: frozenset[Node]
    shown: str


def verify_rewrite(gate: Gate, value_of: ValueOf = lambda node: None) -> Proof | Skip:
    """How a gate can be rewritten with proof, or the refusal. The graph is not changed.

    Args:
        gate: found, not yet rewritten.
        value_of: what graph inputs and attributes hold, see `graph.run_part.ValueOf`.
    """
    module = gate.selection.graph.owning_module
    if _inside_vmap(gate.selection):
        return Skip(SkipReason.ONE_TOKEN, gate.selection, evidence=Evidence.EXPERTS)
    leaving = all(use.kind is UseKind.LEAVES for use in gate.dispatch_uses)
    region = cut_region(gate, value_of)
    if isinstance(region, Skip):
        return _outside(gate, module, value_of) if leaving else region
    key = region_key(region, module)
    if key not in _verdicts:
        while len(_verdicts) >= _REMEMBERED:
            _verdicts.pop(next(iter(_verdicts)))
        _verdicts[key] = _Prover(region, module).prove()
    if leaving and _verdicts[key].without_experts:
        return _outside(gate, module, value_of)
    return _for_gate(_verdicts[key], gate, region)


def _outside(gate: Gate, module: GraphModule | None, value_of: ValueOf) -> Proof | Skip:
    """What is shown where ids and weights leave the graph, towards experts that it does not hold."""
    shown = verify_outside(gate, module, value_of)
    return shown if isinstance(shown, Skip) else Proof(gate, gate.needs_merge, None, frozenset(), shown)


@dataclass(frozen=True)
class _Verdict:
    """What was found of a region, without a node of its graph: it serves every gate with an equal one."""

    kinds: tuple[UseKind, ...] = ()
    merged: bool = False
    readers: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    refusal: str = ""
    reason: SkipReason = SkipReason.UNVERIFIED
    without_experts: bool = False

    @property
    def refused(self) -> bool:
        """Whether no way to rewrite was proven."""
        return bool(self.refusal) or self.reason is not SkipReason.UNVERIFIED


_verdicts: dict[str, _Verdict] = {}


def _for_gate(verdict: _Verdict, gate: Gate, region: Region) -> Proof | Skip:
    if verdict.refused:
        if gate.weights is None and gate.weights_skip is not None and verdict.reason is SkipReason.UNVERIFIED:
            return replace(
                gate.weights_skip, detail=f"{gate.weights_skip.detail}; {verdict.refusal}", evidence=Evidence.EXPERTS
            )
        return Skip(verdict.reason, gate.selection, verdict.refusal, evidence=Evidence.EXPERTS)
    kinds = {
        (region.originals[use.consumer], region.originals[use.read]): kind
        for use, kind in zip(region.gate.uses, verdict.kinds, strict=True)
    }
    uses = tuple(replace(use, kind=kinds.get((use.consumer, use.read), use.kind)) for use in gate.uses)
    readers = tuple(region.originals[region.readers[number]] for number in verdict.readers)
    order = list(region.leaves.values())
    experts = frozenset(order[number].source for number in verdict.experts)
    return Proof(replace(gate, uses=uses), verdict.merged, readers, experts, SHOWN)


def _inside_vmap(selection: Node) -> bool:
    """Whether the selection is made for one example at a time, as inside `torch.func.vmap`."""

    def before(target: Any) -> int:
        return sum(node < selection for node in selection.graph.find_nodes(op="call_function", target=target))

    return before(predispatch._vmap_increment_nesting) > before(predispatch._vmap_decrement_nesting)


@dataclass(frozen=True)
class _Way:
    """One way to rewrite a region."""

    gate: Gate
    merged: bool
    readers: tuple[Node, ...]


class _Prover:
    """Tries the ways to rewrite one region."""

    def __init__(self, region: Region, module: GraphModule | None) -> None:
        self._region, self._module = region, module
        self._single = True

    def prove(self) -> _Verdict:
        """The first way that is right, or why none is."""
        try:
            return self._prove()
        except _FAILURES as error:
            first = error
        self._single = False  # an operation that takes half precision only
        try:
            return self._prove()
        except _FAILURES:
            text = (str(first).splitlines() or [""])[0][:120]
            return _Verdict(refusal=f"it could not be run: {type(first).__name__}: {text}")

    def _prove(self) -> _Verdict:
        region = self._region
        self._state = state_values(region, single=self._single)
        draws = [self._drawn(number) for number in range(2)]
        experts, sources = Told(region, self._run, draws).find()
        if not experts:
            refusal = "no parameter belongs to the experts: exchanging it changes no token, or all"
            return _Verdict(refusal=refusal, without_experts=True)
        if not experts_meet_hidden(region, sources, experts.tensors):
            return _Verdict(reason=SkipReason.FETCHED)
        refusals: list[str] = []
        reason = SkipReason.UNVERIFIED
        for way in self._ways(experts.tensors):
            wrong = self._check(way, experts)
            if wrong is None:
                return self._verdict(way, experts)
            if isinstance(wrong, Skip):
                reason = wrong.reason if not refusals else reason
                wrong = wrong.detail
            refusals.append(wrong)
        text = "; ".join(dict.fromkeys(refusals)) or "nothing of its dispatch can be re-routed"
        return _Verdict(refusal=text, reason=reason)

    def _drawn(self, number: int) -> Values:
        return self._state | activation_values(self._region, number, single=self._single)

    def _run(self, values: Values) -> Values:
        return run_graph(self._region.graph, self._module, values, single=self._single)

    def _verdict(self, way: _Way, experts: ExpertParameters) -> _Verdict:
        order = list(self._region.leaves)
        return _Verdict(
            tuple(use.kind for use in way.gate.uses),
            way.merged,
            tuple(self._region.readers.index(reader) for reader in way.readers),
            tuple(order.index(node) for node in experts.tensors),
        )

    def _ways(self, experts: set[Node]) -> Iterator[_Way]:
        """Ways to rewrite, the likeliest first."""
        gate = _with_proven_kinds(self._region, experts)
        if not gate.dispatch_uses:
            return
        inside = tuple(r for r in self._region.readers if _leads_to(r, self._region.ends[0]))
        hint = self._region.gate.needs_merge
        for merged in (hint, not hint):
            if merged and gate.weights is None:
                continue
            yield _Way(gate, merged, inside)
            if merged and len(inside) > 1:
                for left_out in inside:
                    yield _Way(gate, merged, tuple(reader for reader in inside if reader is not left_out))

    def _check(self, way: _Way, experts: ExpertParameters) -> str | Skip | None:
        """What is wrong with a way to rewrite, or None."""
        rewritten = _rewritten(self._region, way)
        if isinstance(rewritten, Skip):
            return rewritten
        moved, number = 0, 0
        name = "with merged ids" if way.merged else "with new ids"
        tokens = 0
        while number < _MOST_DRAWS and (number < _DRAWS or tokens < _TOKENS or not moved):
            values = self._drawn(number)
            if number < 2:
                same = rewritten.run(values, self._run, self._region.gate.top_k, 0.0)
                wrong = self._differs(self._run(values), same, exact=True)
                if wrong is not None:
                    return f"{name} and S = K {wrong}"
            settings = _settings(number, self._region.gate.top_k)
            new = rewritten.run(values, self._run, *settings)
            mapping = rewritten.mapping(new, *settings)
            if isinstance(mapping, str):
                return mapping
            expected = self._run(experts.swapped(values, mapping))
            wrong = self._differs(expected, new, exact=False)
            if wrong is not None:
                return f"{name} and S = {settings[0]} {wrong}"
            moved += int((mapping != torch.arange(len(mapping), device=mapping.device)).sum())
            tokens += new.ids.numel() // self._region.gate.top_k
            number += 1
        return None if moved else "made-up scores chose the same experts throughout"

    def _differs(self, expected: Values, got: _Got, exact: bool) -> str | None:
        """At which end two runs are apart, and how far."""
        for end, found in zip(self._region.ends, got.ends, strict=True):
            if end in self._region.written and self._is_scratch(end):
                continue
            distance = _distance(expected[end], found, exact)
            if distance is not None:
                original = self._region.originals.get(end, end)
                return f"{original.name} is off by {distance}"
        return None

    def _is_scratch(self, written: Node) -> bool:
        """Whether a buffer is written anew in each call, for the dispatch to read: no part of what a call leaves."""
        if self._region.ends[0] not in self._reached_from(written):
            return False
        values = self._drawn(0)
        other = values | {written: torch.ones_like(values[written])}
        first, second = self._run(values), self._run(other)
        return all(_distance(first[end], second[end], True) is None for end in (written, self._region.ends[0]))

    def _reached_from(self, start: Node) -> set[Node]:
        found, pending = {start}, [start]
        while pending:
            fresh = [node for node in nodes.followers(pending.pop()) if node not in found]
            found.update(fresh)
            pending.extend(fresh)
        return found


@dataclass(frozen=True)
class _Got:
    ends: list[Any]
    ids: torch.Tensor
    new_ids: torch.Tensor


@dataclass(frozen=True)
class _Rewritten:
    """A region as one way rewrites it."""

    region: Region
    graph: Graph
    done: Rewrite
    matrix: Node
    copies: dict[Node, Node]
    module: GraphModule | None

    def run(self, values: Values, run: Any, select_top_k: int, threshold: float) -> _Got:
        """The ends under S and rho."""
        routing = self.done.new_ids if not self.done.merged else nodes.operand(self.done.new_ids)
        assert routing is not None
        numbers = 3 if self.done.merged else 2
        routing.args = (*routing.args[:numbers], select_top_k, threshold, *routing.args[numbers + 2 :])
        size = self.region.gate.num_experts
        device = next(v.device for v in values.values() if isinstance(v, torch.Tensor))
        matrix = torch.rand(size, size, generator=torch.Generator().manual_seed(1)).to(device)
        given = {self.copies[node]: value for node, value in values.items()} | {self.matrix: matrix}
        found = run_graph(self.graph, self.module, given, single=run.__self__._single)
        ends = [found[node] for node in self.graph.output_node().args[0]]
        return _Got(ends, found[self.copies[self.region.gate.ids]], found[self.done.new_ids])

    def mapping(self, got: _Got, select_top_k: int, threshold: float) -> torch.Tensor | str:
        """The map of the experts, int64 [E], that re-routing these ids stands for."""
        size = self.region.gate.num_experts
        matrix = torch.rand(size, size, generator=torch.Generator().manual_seed(1)).to(got.ids.device)
        new = torch.ops.sere.reroute.default(got.ids, matrix, select_top_k, threshold, 0)
        mapping = torch.arange(size, device=got.ids.device)
        real = (got.ids >= 0) & (got.ids < size)
        mapping[got.ids[real].long()] = new[real].long()
        if not torch.equal(mapping[got.ids[real].long()], new[real].long()):
            return "re-routing sends one expert to several"
        return mapping


def _settings(number: int, top_k: int) -> tuple[int, float]:
    """S and rho of a draw: mostly S = 1, which makes most duplicates; with rho some experts stay."""
    if number % 4 == 3:
        return 1, 0.5
    return (2, 0.0) if number % 4 == 1 and top_k > 2 else (1, 0.0)


def _rewritten(region: Region, way: _Way) -> _Rewritten | Skip:
    graph = Graph()
    copies: dict[Node, Node] = {}
    matrix = graph.placeholder("sere_similarity")
    output = graph.graph_copy(region.graph, copies)
    copies[region.graph.output_node()] = graph.output(output)
    gate = _moved(way.gate, copies)
    readers = tuple(copies[reader] for reader in way.readers)
    done = reroute_dispatch(gate, matrix, RoutingSettings(1), merged=way.merged, readers=readers)
    if isinstance(done, Skip):
        return done
    return _Rewritten(region, graph, done, matrix, copies, region.gate.selection.graph.owning_module)


def _moved(gate: Gate, copies: dict[Node, Node]) -> Gate:
    """The gate in a copy of its graph."""

    def at(node: Node | None) -> Node | None:
        return None if node is None else copies[node]

    return replace(
        gate,
        selection=copies[gate.selection],
        ids=copies[gate.ids],
        values=at(gate.values),
        router_weight=copies[gate.router_weight],
        router_input=copies[gate.router_input],
        uses=tuple(Use(copies[use.consumer], copies[use.read], use.kind) for use in gate.uses),
        weights=at(gate.weights),
        all_ids=tuple(copies[node] for node in gate.all_ids),
    )


def _with_proven_kinds(region: Region, experts: set[Node]) -> Gate:
    """The gate with uses told by what they are seen to do.

    A look-up in an expert's parameters takes new ids and one in another parameter keeps the old ones; what never
    reaches the exit is no dispatch.
    """

    def kind(use: Use) -> UseKind:
        table = nodes.operand(use.consumer) if nodes.kind(use.consumer) == "index" else None
        if nodes.kind(use.consumer) == "embedding":
            table = max(nodes.operands(use.consumer), key=nodes.is_floating)
        root = nodes.parameter_root(table) if table is not None else None
        if root in region.leaves and region.leaves[root].kind == "state":
            return UseKind.EXPERT_INDEX if root in experts else UseKind.LOOK_UP
        if use.kind.dispatches and not _leads_to(use.consumer, region.ends[0]):
            return UseKind.STATISTIC
        return use.kind

    return replace(region.gate, uses=tuple(replace(use, kind=kind(use)) for use in region.gate.uses))


def _leads_to(start: Node, end: Node) -> bool:
    found, pending = {start}, [start]
    while pending:
        node = pending.pop()
        if node is end:
            return True
        fresh = [n for n in nodes.followers(node) if n not in found and not end < n]
        found.update(fresh)
        pending.extend(fresh)
    return False


def _distance(expected: Any, got: Any, exact: bool) -> str | None:
    """How far two values are apart, in words, or None where they are the same."""
    if not isinstance(expected, torch.Tensor) or not isinstance(got, torch.Tensor):
        return None if type(expected) is type(got) and expected == got else f"{got} instead of {expected}"
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return f"{list(got.shape)} {got.dtype} instead of {list(expected.shape)} {expected.dtype}"
    if torch.equal(expected, got) or not expected.numel():
        return None
    left, right = expected.double(), got.double()
    if not torch.equal(left.isfinite(), right.isfinite()):
        return "infinities or NaNs"
    error = float((left - right)[left.isfinite()].abs().max())
    scale = float(left[left.isfinite()].abs().max())
    close = not exact and expected.dtype.is_floating_point and error <= tolerance(expected.dtype) * scale
    same = error == 0 and torch.equal(left.nan_to_num(), right.nan_to_num())
    return None if close or same else f"{error:.2g} of {scale:.2g}"
