"""The ways to rewrite a region, and a region as one of them rewrites it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from ..gate import Gate, Skip, Use, UseKind
from ..graph import nodes
from ..graph.arguments import update_operator_argument
from ..graph.walk import walk
from ..reroute_dispatch import Rewrite, RoutingSettings, reroute_dispatch
from .region import Region
from .sources import Sources

# Runs a graph on given values.
RunGraph = Callable[[Graph, Mapping[Node, Any]], dict[Node, Any]]


_SIMILAR = 0.05  # at least, where an expert may go to another


@dataclass(frozen=True)
class Way:
    """One way to rewrite a region.

    Attributes:
        gate: with the kinds of its uses.
        merged: whether duplicates are merged.
        readers: who reads new weights.
        tables: (reader, table): where weights are picked out of a table [T, E] by a mask of the ids.
    """

    gate: Gate
    merged: bool
    readers: tuple[Node, ...]
    tables: tuple[tuple[Node, Node], ...] = ()


@dataclass(frozen=True)
class Got:
    """What a rewritten region gives: its ends, and the map of the experts, int64 [E], behind its new ids."""

    ends: list[Any]
    mapping: torch.Tensor
    tokens: int

    @property
    def moved(self) -> set[int]:
        """The experts in whose place another stands."""
        other = self.mapping != torch.arange(len(self.mapping), device=self.mapping.device)
        return set(other.nonzero().flatten().tolist())


@dataclass(frozen=True)
class Rewritten:
    """A region as one way rewrites it; the gate is that of the region, with the kinds of its uses in this way."""

    region: Region
    gate: Gate
    graph: Graph
    done: Rewrite
    matrix: Node
    copies: dict[Node, Node]

    def run(
        self,
        values: Mapping[Node, Any],
        run: RunGraph,
        settings: RoutingSettings,
        seed: int,
        unknown: torch.Tensor | None = None,
    ) -> Got:
        """Re-route by a random matrix; `values` are those of the region as it was traced.

        `unknown`, bool [E, E], are moves that must not happen: such an expert is similar to none of these, and stays.
        """
        if unknown is not None:
            settings = replace(settings, threshold=max(settings.threshold, _SIMILAR))
        self._set(settings)
        gate = self.region.gate
        device = next(v.device for v in values.values() if isinstance(v, torch.Tensor))
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.rand(gate.num_experts, gate.num_experts, generator=generator).to(device)
        if unknown is not None:
            matrix = (_SIMILAR + matrix * (1 - _SIMILAR)).masked_fill(unknown.to(device), 0.0)
        given = {self.copies[node]: value for node, value in values.items()} | {self.matrix: matrix}
        found = run(self.graph, given)
        ids = found[self.copies[gate.ids]]
        new = torch.ops.sere.reroute.default(ids, matrix, settings.select_top_k, settings.threshold, 0)
        mapping = torch.arange(gate.num_experts, device=ids.device)
        real = (ids >= 0) & (ids < gate.num_experts)
        mapping[ids[real].long()] = new[real].long()
        return Got([found[end] for end in self._ends()], mapping, ids.numel() // gate.top_k)

    def _set(self, settings: RoutingSettings) -> None:
        routing = nodes.operand(self.done.new_ids) if self.done.merged else self.done.new_ids
        assert routing is not None
        update_operator_argument(routing, "select_top_k", settings.select_top_k)
        update_operator_argument(routing, "threshold", settings.threshold)

    def _ends(self) -> tuple[Node, ...]:
        return self.graph.output_node().args[0]  # type: ignore[return-value]


def settings_of(draw: int, top_k: int) -> RoutingSettings:
    """S and rho of a draw: mostly S = 1, which makes most duplicates; with rho some experts stay."""
    if draw % 4 == 3:
        return RoutingSettings(1, 0.5)
    return RoutingSettings(2 if draw % 4 == 1 and top_k > 2 else 1)


def rewrite_region(region: Region, way: Way) -> Rewritten | Skip:
    """A copy of a region, rewritten, or why it cannot be."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    matrix = graph.placeholder("sere_similarity")
    output = graph.graph_copy(region.graph, copies)
    copies[region.graph.output_node()] = graph.output(output)
    gate = _moved(way.gate, copies)
    readers = tuple(copies[reader] for reader in way.readers)
    tables = tuple((copies[reader], copies[table]) for reader, table in way.tables)
    done = reroute_dispatch(gate, matrix, RoutingSettings(1), merged=way.merged, readers=readers, tables=tables)
    if isinstance(done, Skip):
        return done
    return Rewritten(region, way.gate, graph, done, matrix, copies)


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


def with_proven_kinds(region: Region, experts: set[Node]) -> Gate:
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
        if use.kind.dispatches and not leads_to(use.consumer, region.ends[0]):
            return UseKind.STATISTIC
        return use.kind

    return replace(region.gate, uses=tuple(replace(use, kind=kind(use)) for use in region.gate.uses))


def picked_tables(region: Region, gate: Gate, sources: Sources) -> tuple[tuple[Node, Node], ...]:
    """(reader, table): a table [T, E] of scores that a mask made of the dispatched ids picks weights out of.

    None where a score meets what is made of these ids in another way, as where a mask leaves out a slot that weighs
    little: made-up scores may never show such a slot.
    """
    rows, exit_node = nodes.leading_count(gate.ids), region.ends[0]
    masks = set(walk([use.consumer for use in gate.dispatch_uses], nodes.followers))
    masks = {node for node in masks if leads_to(node, exit_node)}
    found = []
    for reader in sorted(masks):
        for table in nodes.numbers_behind(reader):
            if table not in sources.weighed or table in masks:
                continue
            sizes = nodes.shape(table) or ()
            counts = len(sizes) >= 2 and sizes[-1] == gate.num_experts and str(nodes.leading_count(table)) == str(rows)
            if not counts or table not in sources.scored - sources.hidden or nodes.writes(reader):
                return ()
            found.append((reader, table))
    return tuple(found)


def leads_to(start: Node, end: Node) -> bool:
    """Whether what a node gives reaches another, also by a write to its memory."""
    ends = {end, *nodes.writers(end)}
    last = max(ends)
    before_last = walk([start], lambda node: [n for n in nodes.followers(node) if not last < n])
    return any(node in ends for node in before_last)
