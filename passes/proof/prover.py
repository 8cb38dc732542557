"""Try the ways to rewrite a region, and say which one is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..gate import Skip, SkipReason, UseKind
from ..graph import nodes
from ..graph.run_part import run_graph
from ..reroute_dispatch import RoutingSettings
from .compare import distance
from .expert_parameters import ExpertParameters, Told, Values
from .made_up import activation_values, state_values
from .region import Region
from .sources import Sources, experts_meet_hidden
from .ways import Got, Way, leads_to, rewrite_region, settings_of, with_proven_kinds

# What an operation raises that does not take made-up values.
FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError)
_DRAWS = 4
_TOKENS = 16  # that the draws hold together at least
_MOST_DRAWS = 12


@dataclass(frozen=True)
class Verdict:
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


class Prover:
    """Tries the ways to rewrite one region; with `merging` only those that change its weights."""

    def __init__(self, region: Region, module: GraphModule | None, *, merging: bool = False) -> None:
        self._region, self._module, self._merging = region, module, merging
        self._single = True

    def prove(self) -> Verdict:
        """The first way that is right, or why none is."""
        try:
            return self._prove()
        except FAILURES as error:
            first = error
        self._single = False  # an operation that takes half precision only
        try:
            return self._prove()
        except FAILURES:
            text = (str(first).splitlines() or [""])[0][:120]
            return Verdict(refusal=f"it could not be run: {type(first).__name__}: {text}")

    def _prove(self) -> Verdict:
        region = self._region
        self._state = state_values(region, single=self._single)
        draws = [self._drawn(number) for number in range(2)]
        experts, sources = Told(region, self._run, draws).find()
        if not experts:
            refusal = "no parameter belongs to the experts: exchanging it changes no token, or all"
            return Verdict(refusal=refusal, without_experts=True)
        if not experts_meet_hidden(region, sources, experts.tensors):
            return Verdict(reason=SkipReason.FETCHED)
        if self._weighs_nothing(experts.tensors, sources):
            return Verdict(reason=SkipReason.NOTHING_WEIGHED)
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
        return Verdict(refusal=text, reason=reason)

    def _weighs_nothing(self, experts: set[Node], sources: Sources) -> bool:
        """Whether tensors are fetched by the ids, and no score weighs what comes of them, as of attended prompts."""
        uses = with_proven_kinds(self._region, experts).dispatch_uses
        fetched = bool(uses) and all(use.kind is UseKind.EXPERT_INDEX for use in uses)
        end, ids = self._region.ends[0], nodes.shape(self._region.gate.ids) or ()
        if (nodes.shape(end) or ())[: len(ids)] == ids:
            return False  # slots are apart still: weights may follow
        return fetched and self._region.gate.top_k > 1 and end not in sources.scored

    def _drawn(self, number: int) -> Values:
        return self._state | activation_values(self._region, number, single=self._single)

    def _run(self, values: Values) -> Values:
        return self._run_graph(self._region.graph, values)

    def _run_graph(self, graph: Graph, values: Mapping[Node, Any]) -> Values:
        return run_graph(graph, self._module, values, single=self._single)

    def _verdict(self, way: Way, experts: ExpertParameters) -> Verdict:
        order = list(self._region.leaves)
        return Verdict(
            tuple(use.kind for use in way.gate.uses),
            way.merged,
            tuple(self._region.readers.index(reader) for reader in way.readers),
            tuple(order.index(node) for node in experts.tensors),
        )

    def _ways(self, experts: set[Node]) -> Iterator[Way]:
        """Ways to rewrite, the likeliest first."""
        gate = with_proven_kinds(self._region, experts)
        if not gate.dispatch_uses:
            return
        inside = tuple(r for r in self._region.readers if leads_to(r, self._region.ends[0]))
        hint = self._region.gate.needs_merge
        for merged in (True,) if self._merging else (hint, not hint):
            if merged and gate.weights is None:
                continue
            yield Way(gate, merged, inside)
            if merged and len(inside) > 1:
                for left_out in inside:
                    yield Way(gate, merged, tuple(reader for reader in inside if reader is not left_out))

    def _check(self, way: Way, experts: ExpertParameters) -> str | Skip | None:
        """What is wrong with a way to rewrite, or None."""
        rewritten = rewrite_region(self._region, way)
        if isinstance(rewritten, Skip):
            return rewritten
        top_k, name = self._region.gate.top_k, "with merged ids" if way.merged else "with new ids"
        moved, number, tokens = 0, 0, 0
        unknown = experts.unknown_moves(self._region.gate.num_experts)
        while number < _MOST_DRAWS and (number < _DRAWS or tokens < _TOKENS or not moved):
            values, settings = self._drawn(number), settings_of(number, top_k)
            if number == 0:
                same = rewritten.run(values, self._run_graph, RoutingSettings(top_k), number)
                wrong = self._differs(self._run(values), same, exact=True)
                if wrong is not None:
                    return f"{name} and S = K {wrong}"
            new = rewritten.run(values, self._run_graph, settings, number, unknown)
            expected = self._run(experts.swapped(values, new.mapping))
            wrong = self._differs(expected, new, exact=False)
            if wrong is not None:
                return f"{name} and S = {settings.select_top_k} {wrong}"
            moved += int((new.mapping != torch.arange(len(new.mapping), device=new.mapping.device)).sum())
            tokens, number = tokens + new.tokens, number + 1
        return None if moved else "made-up scores chose the same experts throughout"

    def _differs(self, expected: Values, got: Got, exact: bool) -> str | None:
        """At which end two runs are apart, and how far."""
        for end, found in zip(self._region.ends, got.ends, strict=True):
            if end in self._region.written and self._is_scratch(end):
                continue
            apart = distance(expected[end], found, exact)
            if apart is not None:
                original = self._region.originals.get(end, end)
                return f"{original.name} is off by {apart}"
        return None

    def _is_scratch(self, written: Node) -> bool:
        """Whether a buffer is written anew in each call, for the dispatch to read: no part of what a call leaves."""
        if not leads_to(written, self._region.ends[0]):
            return False
        values = self._drawn(0)
        other = values | {written: torch.ones_like(values[written])}
        first, second = self._run(values), self._run(other)
        return all(distance(first[end], second[end], True) is None for end in (written, self._region.ends[0]))
