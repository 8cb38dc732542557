"""Try the ways to rewrite a region, and say which one is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..gate import Gate, Skip, SkipReason, UseKind
from ..graph import nodes
from ..graph.failures import FAILURES, short
from ..graph.nested import why_nested
from ..graph.run_part import run_graph
from ..reroute_dispatch import RoutingSettings
from .alike import unlike_code, unlike_parameters
from .changed_ids import changed_id
from .compare import changed_rows, distance
from .expert_parameters import ExpertParameters, Told, Values
from .made_up import activation_values, crowded, later_state, state_values, unevenly_sure, without
from .masks import Masks
from .more_tokens import more_tokens
from .other_numbers import other_numbers
from .region import Region
from .sources import Sources, experts_meet_hidden, unseen_function
from .ways import Got, Rewritten, Way, leads_to, picked_tables, rewrite_region, settings_of, with_proven_kinds

_UNSEEN = (
    "reads the experts' parameters, and what it does is not seen: it is under torch.compiler.allow_in_graph; let "
    "Dynamo trace it, or make it a torch.library.custom_op"
)
_DRAWS = 4
_TOKENS = 16  # that the draws hold together at least, and twice as many where weights are merged
_UNEVEN_TOKENS = 32  # that draws of routers that are sure by turns hold together
_MOST_DRAWS = 12
_MOST_TO_MOVE_ALL = 40  # draws, until each expert was re-routed once
_IDLE = 3  # draws in a row that re-route no other expert


@dataclass(frozen=True)
class Verdict:
    """What was found of a region, without a node of its graph: it serves every gate with an equal one."""

    kinds: tuple[UseKind, ...] = ()
    merged: bool = False
    readers: tuple[int, ...] = ()
    tables: tuple[tuple[int, int], ...] = ()  # (reader, table), by their places in the region's graph
    experts: tuple[int, ...] = ()
    refusal: str = ""
    reason: SkipReason = SkipReason.UNVERIFIED
    without_experts: bool = False
    tried: bool = False  # whether ways to rewrite were run, and none was right

    @property
    def refused(self) -> bool:
        """Whether no way to rewrite was proven."""
        return bool(self.refusal) or self.reason is not SkipReason.UNVERIFIED


class Prover:
    """Tries the ways to rewrite one region; with `merging` only those that change its weights."""

    def __init__(self, region: Region, module: GraphModule | None, *, merging: bool = False) -> None:
        self._region, self._module, self._merging = region, module, merging
        self._single = True
        self._masks = Masks(region)
        self._lowers_limits = True

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
            return Verdict(refusal=f"it could not be run: {short(first)}")

    def _prove(self) -> Verdict:
        region = self._region
        self._state = state_values(region, single=self._single)
        self._masks = self._masks_that_run()
        self._lowers_limits = self._takes(self._drawn(1, later=True))
        draws = [self._drawn(number) for number in range(2)]
        told = Told(region, self._run, draws, lambda n, chosen: self._drawn(2 * n, chosen=chosen))
        experts, sources = told.find()
        if not experts:
            return self._without_experts(told, experts)
        if not experts_meet_hidden(region, sources, experts.tensors):
            # What is left of an attribute that is no tensor is a graph: its products are not seen.
            nested = next((node for node in region.graph.nodes if node.op == "get_attr"), None)
            if nested is not None:
                return Verdict(refusal=why_nested(nested), reason=SkipReason.NESTED_EXPERTS)
            unseen = unseen_function(region, sources, experts.tensors)
            if unseen is not None:
                return Verdict(refusal=f"{unseen.name} {_UNSEEN}")
            return Verdict(reason=SkipReason.FETCHED)
        if self._weighs_nothing(experts.tensors, sources):
            return Verdict(reason=SkipReason.NOTHING_WEIGHED)
        refusals: list[str] = []
        reason = SkipReason.UNVERIFIED
        for way in self._ways(experts.tensors, sources):
            try:
                wrong = self._check(way, experts)
            except FAILURES as error:  # as where sizes do not fit for tokens that name an expert twice
                wrong = f"it could not be run: {short(error)}"
            if wrong is None:
                return self._verdict(way, experts)
            if isinstance(wrong, Skip):
                reason = wrong.reason if not refusals else reason
                wrong = wrong.detail
            refusals.append(wrong)
        wrong_ways = bool(refusals) and reason is SkipReason.UNVERIFIED
        if wrong_ways and (unlike := self._unlike(told, experts, sources)) is not None:
            return Verdict(refusal=unlike, reason=SkipReason.NOT_ALIKE)
        text = "; ".join(_each_once(refusals)) or "nothing of its dispatch can be re-routed"
        return Verdict(refusal=text, reason=reason, tried=True)

    def _without_experts(self, told: Told, experts: ExpertParameters) -> Verdict:
        """Why no parameters of all experts were found; where the ids leave the graph they are outside."""
        outside = all(use.kind is UseKind.LEAVES for use in self._region.gate.dispatch_uses)
        if not outside and (unlike := self._unlike_parameters(told, experts)) is not None:
            return Verdict(refusal=unlike, reason=SkipReason.NOT_ALIKE, without_experts=True)
        refusal = "no parameter belongs to the experts: exchanging it changes no token, or all"
        return Verdict(refusal=refusal, without_experts=True)

    def _unlike(self, told: Told, experts: ExpertParameters, sources: Sources) -> str | None:
        """How the experts differ, where they do and that is seen."""
        region = self._region
        if experts.unknown_moves(region.gate.num_experts) is not None:
            return None  # a rank that holds a part of them
        try:
            if (unlike := self._unlike_parameters(told, experts)) is not None:
                return unlike
            if self._masks:
                return None  # they may send tokens to an expert, which is told as it is
            everyone = range(region.gate.num_experts)
            draws = [self._drawn(2 * n, chosen=_in_turn(set(everyone), n)) for n in range(_DRAWS)]
            return unlike_code(region, self._run, draws, experts, sources.router)
        except FAILURES:  # exchanged they do not run, which tells nothing
            return None

    def _unlike_parameters(self, told: Told, experts: ExpertParameters) -> str | None:
        owners = told.owners()
        return unlike_parameters(owners, experts, self._region, {node: told.draws[0][node].shape for node in owners})

    def _masks_that_run(self) -> Masks:
        """The region's masks; what a call tells by other numbers than 0 and 1 varies where the program takes others."""
        masks = self._masks
        if masks.are_told:
            try:
                self._run(self._drawn(2))
            except FAILURES:
                return masks.as_called()
        return masks

    def _weighs_nothing(self, experts: set[Node], sources: Sources) -> bool:
        """Whether tensors are fetched by the ids, and no score weighs what comes of them, as of attended prompts."""
        uses = with_proven_kinds(self._region, experts).dispatch_uses
        fetched = bool(uses) and all(use.kind is UseKind.EXPERT_INDEX for use in uses)
        end, ids = self._region.ends[0], nodes.shape(self._region.gate.ids) or ()
        if (nodes.shape(end) or ())[: len(ids)] == ids:
            return False  # slots are apart still: weights may follow
        return fetched and self._region.gate.top_k > 1 and end not in sources.scored

    def _drawn(
        self,
        number: int,
        *,
        later: bool = False,
        chosen: Sequence[int] = (),
        sizes: Mapping[Any, int] | None = None,
        pattern: int | None = None,
    ) -> Values:
        made = activation_values(
            self._region,
            number,
            single=self._single,
            chosen=chosen,
            sizes=sizes,
            masks=self._masks,
            pattern=pattern,
        )
        values = self._state | made
        if not later:
            return values
        return values | later_state(self._region, self._state, number, lowers_limits=self._lowers_limits)

    def _run(self, values: Values) -> Values:
        return self._run_graph(self._region.graph, values)

    def _run_graph(self, graph: Graph, values: Mapping[Node, Any]) -> Values:
        return run_graph(graph, self._module, values, single=self._single)

    def _verdict(self, way: Way, experts: ExpertParameters) -> Verdict:
        order, place = list(self._region.leaves), {node: i for i, node in enumerate(self._region.graph.nodes)}
        return Verdict(
            tuple(use.kind for use in way.gate.uses),
            way.merged,
            tuple(self._region.readers.index(reader) for reader in way.readers),
            tuple((place[reader], place[table]) for reader, table in way.tables),
            tuple(order.index(node) for node in experts.tensors),
        )

    def _ways(self, experts: set[Node], sources: Sources) -> Iterator[Way]:
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
        if not self._merging:
            yield from self._ways_with_tables(gate, sources)

    def _ways_with_tables(self, gate: Gate, sources: Sources) -> Iterator[Way]:
        """Weights move within a table; of several uses one may be what the weights are made of, and keeps the ids."""
        dispatching = gate.dispatch_uses
        for kept in (None, *(dispatching if len(dispatching) > 1 else ())):
            uses = tuple(replace(use, kind=UseKind.LOOK_UP) if use is kept else use for use in gate.uses)
            other = replace(gate, uses=uses)
            if tables := picked_tables(self._region, other, sources):
                yield Way(other, False, (), tables)

    def _check(self, way: Way, experts: ExpertParameters) -> str | Skip | None:
        """What is wrong with a way to rewrite, or None."""
        rewritten = rewrite_region(self._region, way)
        if isinstance(rewritten, Skip):
            return rewritten
        wrong = self._check_draws(way, rewritten, experts)
        return None if wrong is None else f"with {'merged' if way.merged else 'new'} ids {wrong}"

    def _check_draws(self, way: Way, rewritten: Rewritten, experts: ExpertParameters) -> str | None:
        """What is wrong with S = K, or S < K in one of as many draws as it takes for each to have something to show."""
        stays = set(range(self._region.gate.num_experts))  # experts that were not re-routed so far
        needed = _TOKENS * (2 if way.merged else 1)
        # A row that is looked up serves any number; code that compares ids may have something against one of them.
        may_tell_apart = any(use.kind is not UseKind.EXPERT_INDEX for use in way.gate.dispatch_uses)
        number, tokens, told, original = 0, 0, False, Values()
        while number < _MOST_TO_MOVE_ALL:
            enough = number >= _DRAWS and tokens >= needed and told
            if (enough or number >= _MOST_DRAWS) and not (may_tell_apart and stays):
                break
            chosen = _in_turn(stays, number) if number >= _DRAWS else ()
            pattern = number % self._masks.patterns if chosen else None
            values = self._drawn(2 * number if chosen else number, later=number > 0, chosen=chosen, pattern=pattern)
            if not told:
                original = self._run(values)
            if number == 0:
                same = rewritten.run(values, self._run_graph, RoutingSettings(self._region.gate.top_k), 0)
                if (wrong := self._differs(original, same, exact=True)) is not None:
                    return f"and S = K {wrong}"
            wrong, new = self._compare(rewritten, experts, values, number)
            if wrong is not None:
                return wrong
            stays -= new.moved
            told = told or distance(original[self._region.ends[0]], new.ends[0], exact=False) is not None
            tokens, number = tokens + new.tokens, number + 1
        if len(stays) == self._region.gate.num_experts:
            return "made-up scores chose the same experts throughout"
        if not told:
            return "no token changed: its dispatch reads none of the choices that re-routing changes"
        return (
            self._wrong_in_other_calls(rewritten, experts)
            or self._wrong_with_more(rewritten, experts)
            or (self._wrong_when_unevenly_sure(rewritten, experts) if way.merged or way.tables else None)
            or (self._wrong_when_crowded(rewritten, experts) if way.tables else None)
        )

    def _wrong_in_other_calls(self, rewritten: Rewritten, experts: ExpertParameters) -> str | None:
        """What is wrong with some tokens marked and others not, or with other numbers, such as a length.

        A mask can send tokens to one expert, which only shows where that one is re-routed: each is, in every pattern.
        """
        patterns = self._masks.patterns if self._masks else 0
        for pattern in self._telling_patterns():
            if (wrong := self._wrong_throughout(rewritten, experts, pattern, {}, patterns)) is not None:
                return f"{wrong} where a mask marks some"
        for number, sizes in enumerate(other_numbers(self._region)):
            marking = number % patterns if patterns else None
            if (wrong := self._wrong_throughout(rewritten, experts, marking, sizes, 1)) is not None:
                [other] = sizes.values()
                return f"{wrong} in a call with {other} in place of another whole number"
        return None

    def _telling_patterns(self) -> list[int]:
        """The patterns that mark tokens each in its own way: one of a kind where all masks act through one tensor."""
        joined = self._masks.joined if self._masks else None
        if joined is None or self._masks.patterns <= 2:
            return list(range(self._masks.patterns if self._masks else 0))
        kinds: dict[float, int] = {}
        for pattern in range(self._masks.patterns):
            try:
                marked = self._run(self._drawn(2 * pattern, pattern=pattern))[joined]
            except FAILURES:  # the program takes no such numbers
                continue
            share = float(marked.float().mean()) if marked.numel() else 0.0
            kinds.setdefault(share if share in (0.0, 1.0) else 0.25 + 0.5 * (share > 0.5), pattern)
        return list(kinds.values())

    def _wrong_throughout(
        self,
        rewritten: Rewritten,
        experts: ExpertParameters,
        pattern: int | None,
        sizes: Mapping[Any, int],
        step: int,
    ) -> str | None:
        """What is wrong in as many draws as it takes to re-route each expert once, in one pattern of masks."""
        stays, number, idle = set(range(self._region.gate.num_experts)), pattern or 0, 0
        while stays and idle < _IDLE:
            chosen = _in_turn(stays, number)
            values = self._drawn(2 * number, later=number > 0, chosen=chosen, pattern=pattern, sizes=sizes)
            try:
                wrong, new = self._compare(rewritten, experts, values, number)
            except FAILURES:
                if self._takes(values):
                    raise
                return None
            if wrong is not None:
                return wrong
            idle = 0 if new.moved & stays else idle + 1
            stays, number = stays - new.moved, number + step
        acts = (expert for expert in sorted(stays) if self._acts_unnamed(expert, experts, pattern, sizes))
        expert = next(acts, None)
        return None if expert is None else f"expert {expert} acts on tokens that do not name it"

    def _takes(self, values: Values) -> bool:
        """Whether the program as it was traced takes such numbers."""
        try:
            self._run(values)
        except FAILURES:
            return False
        return True

    def _acts_unnamed(
        self, expert: int, experts: ExpertParameters, pattern: int | None, sizes: Mapping[Any, int]
    ) -> bool:
        """Whether another expert in the place of one changes tokens that do not name it: a mask sent them there."""
        gate, exit_node = self._region.gate, self._region.ends[0]
        mapping = torch.arange(gate.num_experts)
        mapping[expert] = (expert + 1) % gate.num_experts
        for number in range(_DRAWS):
            values = without(self._region, self._drawn(2 * number + 1, pattern=pattern, sizes=sizes), expert)
            before = self._run(values)
            after = self._run(experts.swapped(values, mapping))
            names = (before[gate.ids].reshape(-1, gate.top_k) == expert).any(-1)
            if (rows := changed_rows(before[exit_node], after[exit_node], len(names))) is None:
                return True
            if bool((rows & ~names.cpu()).any()):
                return True
        return False

    def _wrong_with_more(self, rewritten: Rewritten, experts: ExpertParameters) -> str | None:
        """What is wrong with more tokens than the traced call had, where the graph takes them."""
        sizes = more_tokens(self._region)
        for number in range(2 if sizes else 0):
            # Some of them masked, too.
            values = self._drawn(2 * number if self._masks else number, sizes=sizes)
            try:
                self._run(values)
            except FAILURES:  # sizes of made-up values that hang together in a way that is not seen
                return None
            wrong, new = self._compare(rewritten, experts, values, number)
            if wrong is not None:
                return f"{wrong} where there are {new.tokens} tokens"
        return None

    def _compare(
        self, rewritten: Rewritten, experts: ExpertParameters, values: Values, number: int
    ) -> tuple[str | None, Got]:
        """What is wrong with one draw, and what the rewritten region gave."""
        settings = settings_of(number, self._region.gate.top_k)
        unknown = experts.unknown_moves(self._region.gate.num_experts)
        new = rewritten.run(values, self._run_graph, settings, number, unknown)
        original = self._run(experts.swapped(values, new.mapping))
        wrong = self._differs(original, new, exact=False)
        if wrong is None and unknown is None:  # a rank that holds a part of the experts has numbers of its own for them
            wrong = changed_id(rewritten.gate, original)
        return None if wrong is None else f"and S = {settings.select_top_k} {wrong}", new

    def _wrong_when_unevenly_sure(self, rewritten: Rewritten, experts: ExpertParameters) -> str | None:
        """What is wrong where the router is sure of some choices, and of others not at all."""
        number, tokens = 0, 0
        while tokens < _UNEVEN_TOKENS and number < _MOST_DRAWS:
            values = unevenly_sure(self._region, self._drawn(4 * number), number)  # two first choices, apart by little
            wrong, new = self._compare(rewritten, experts, values, 4 * number)
            if wrong is not None:
                return wrong
            tokens, number = tokens + new.tokens, number + 1
        return None

    def _wrong_when_crowded(self, rewritten: Rewritten, experts: ExpertParameters) -> str | None:
        """What is wrong where one expert gets all slots: buffers with room for fewer overflow."""
        values = crowded(self._region, self._drawn(0))
        try:
            wrong, _ = self._compare(rewritten, experts, values, 0)
        except FAILURES as error:
            wrong = (str(error).splitlines() or [""])[0][:120]
        return None if wrong is None else f"with all slots at one expert {wrong}"

    def _differs(self, expected: Values, got: Got, exact: bool) -> str | None:
        """At which end two runs are apart, and how far."""
        for end, found in zip(self._region.ends, got.ends, strict=True):
            apart = distance(expected[end], found, exact)
            if apart is not None:
                original = self._region.originals.get(end, end)
                return f"{original.name} is off by {apart}"
        return None


def _each_once(refusals: Sequence[str]) -> list[str]:
    """The texts, one of those that only say by how much else the same is off."""
    told: dict[str, str] = {}
    for text in refusals:
        told.setdefault(text.partition(" is off by ")[0], text)
    return list(told.values())


def _in_turn(experts: set[int], draw: int) -> list[int]:
    """The experts in an order of each draw's own."""
    return sorted(experts, key=lambda expert: (expert + draw) % 7)
