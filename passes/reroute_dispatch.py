"""Make the dispatch of a gate use re-routed expert ids.

Every dispatch sums duplicates (case 1), S < K:

    values, ids = topk(scores, K)                              values, ids = topk(scores, K)
    flat = view(ids, -1)                                 ->    rerouted = sere.reroute(ids, similarity, S, rho, A)
    w = gate_up_proj[flat]                                     flat = view(rerouted, -1)
                                                               w = gate_up_proj[flat]

Some dispatch is not proven to (case 2): ids and the final routing weights change together.

    return hidden, ids, weights                    ->    merged = sere.reroute_merged(ids, weights, similarity, ..)
                                                         return hidden, merged[0], merged[1]

With projection coefficients (case 6) weights change with the ids in both cases, ahead of merging:

    weights = ..                                           factor = projection[ids, rerouted]    1 where ids stay
    y = expert_outputs * weights                   ->      y = expert_outputs * (weights * factor)

A gather and a product in plain ATen, not a third result of the operator: Inductor fuses them into
what reads the weights, exporters know them, and an operator with several results can become no
TensorRT plug-in.

A dispatch that picks a token's weights out of a table [T, E] by a mask of its ids (case 7) gets the
table with each slot's number at its new expert, beside the mask of the new ids:

    mask = zeros.scatter(1, ids, 1)                        mask = zeros.scatter(1, rerouted, 1)
    picked = scores * mask                           ->    picked = moved * mask

Uses that look scores up by the ids keep the original ids (case 3). `topk(sorted=False)` becomes
sorted, because re-routing ranks by score (case 4). What an in-place operation changes after the
dispatch began is skipped (case 5).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from .. import ops as _ops  # noqa: F401  (registers torch.ops.sere)
from .evidence.routing_weights import outer_consumers
from .gate import Evidence, Gate, Skip, SkipReason
from .graph import nodes
from .graph.aliases import aliases
from .graph.arguments import update_argument
from .graph.walk import walk

# Where tracers keep a node's value.
_VALUES = ("example_value", "val", "tensor_meta")


@dataclass(frozen=True)
class RoutingSettings:
    """S, rho, and the least and greatest number of primary experts (0: no limit) of one gate."""

    select_top_k: int
    threshold: float = 0.0
    min_active: int = 0
    max_active: int = 0


@dataclass(frozen=True)
class Rewrite:
    """What was done to a gate: the re-routed ids, whether duplicates are merged, and whether slots were filled."""

    gate: Gate
    new_ids: Node
    merged: bool
    filled: bool = False


def reroute_dispatch(
    gate: Gate,
    similarity: Node,
    settings: RoutingSettings,
    projection: Node | None = None,
    *,
    merged: bool | None = None,
    readers: Sequence[Node] | None = None,
    tables: Sequence[tuple[Node, Node]] = (),
) -> Rewrite | Skip:
    """Insert the re-routing operator behind a gate and point its dispatch uses to it.

    Args:
        gate: a gate of the graph that `similarity` belongs to.
        similarity: graph input or attribute holding the gate's [E, E] matrix; it must precede the
            gate's uses.
        settings: with 0 < S < K; identities are the caller's to leave out.
        projection: graph input or attribute like `similarity`, float32 [E, E] with ones on the
            diagonal: a slot that goes from u to v has its weight multiplied by projection[u, v].
            None leaves weights unchanged.
        merged: whether a token's duplicates are merged; by the kinds of the gate's uses where it is
            not said.
        readers: the consumers of the routing weights that see merged or scaled ones; all by default.
        tables: (reader, table [.., E]): where a token's weights are picked out of a table by a mask of its ids. Only
            without `merged` and `projection`.

    Returns:
        What was done, or why nothing was changed.
    """
    merged = gate.needs_merge if merged is None else merged
    weighing = merged or projection is not None
    if projection is not None and gate.weights is None:
        return Skip(
            SkipReason.NO_SCALE, gate.ids, str(gate.weights_skip or nodes.place(gate.ids)), evidence=Evidence.EXPERTS
        )
    if merged and gate.weights is None:
        return gate.weights_skip or Skip(SkipReason.NO_WEIGHTS, gate.ids, nodes.place(gate.ids))
    if merged and settings.max_active:
        return Skip(SkipReason.BUDGET, gate.ids, f"max_active is {settings.max_active}", evidence=Evidence.EXPERTS)
    graph = gate.selection.graph
    new_ids = redirect_dispatch(
        gate,
        lambda: _insert(graph, gate, similarity, settings, projection, merged),
        with_weights=weighing,
        readers=readers,
    )
    if isinstance(new_ids, Skip):
        return new_ids
    for reader, table in tables:
        with graph.inserting_before(reader):
            reader.replace_input_with(table, _moved(graph, gate.ids, new_ids, table))
    return Rewrite(gate, new_ids, merged)


def redirect_dispatch(
    gate: Gate,
    insert: Callable[[], tuple[Node, Node | None]],
    *,
    with_weights: bool,
    readers: Sequence[Node] | None = None,
) -> Node | Skip:
    """Let the dispatch of a gate read other ids, and other weights, than the gate chose.

    Args:
        gate: a gate whose dispatch reads its own ids.
        insert: makes the new ids, and the new weights or None, at the graph's insertion point: ahead
            of the dispatch and behind the gate's ids and weights.
        with_weights: whether there are new weights, for which `gate.weights` has to be known.
        readers: the consumers of the weights that read the new ones; by default all that do not keep the ids.

    Returns:
        The new ids, or why nothing was changed.
    """
    weights = gate.weights if with_weights else None
    weight_consumers: list[Node] = []
    if weights is not None:
        # What keeps the ids, as a statistic of both does, keeps the weights.
        kept = {use.consumer for use in gate.uses} - {use.consumer for use in gate.dispatch_uses}
        found = (consumer for consumer in outer_consumers(weights, gate.ids) if consumer not in kept)
        weight_consumers = list(found if readers is None else readers)
    consumers = [use.consumer for use in gate.dispatch_uses] + weight_consumers
    first = min(consumers)
    late = _late_part(weights, first) if weights is not None else []
    stuck = _cannot_move(late, first, consumers)
    if stuck is not None:
        return Skip(SkipReason.WEIGHTS_LATE, stuck, nodes.place(stuck), evidence=Evidence.EXPERTS)
    watched = list(gate.all_ids) + ([weights] if weights is not None else [])
    changed = _changed_after(first, watched, ignoring=late)
    if changed is not None:
        return Skip(SkipReason.MUTATED, changed, nodes.place(changed), evidence=Evidence.EXPERTS)

    for node in late:
        first.prepend(node)
    if not gate.is_sorted:  # only a top-k makes no promise
        update_argument(gate.selection, 4, "sorted", True)
    with first.graph.inserting_before(first):
        new_ids, new_weights = insert()
    copies = dict.fromkeys(gate.all_ids, new_ids)
    for use in gate.dispatch_uses:
        use.consumer.replace_input_with(use.read, _rebased(use.read, copies))
    for consumer in weight_consumers:
        assert weights is not None
        assert new_weights is not None
        consumer.replace_input_with(weights, new_weights)
    _erase_unused_views(gate)
    return new_ids


def _insert(
    graph: Graph, gate: Gate, similarity: Node, settings: RoutingSettings, projection: Node | None, merged: bool
) -> tuple[Node, Node | None]:
    numbers = (settings.select_top_k, settings.threshold, settings.min_active)
    weights = gate.weights
    new_ids: Node | None = None
    if projection is not None or not merged:
        options: dict[str, Any] = {"max_active": settings.max_active} if settings.max_active else {}
        new_ids = graph.call_function(torch.ops.sere.reroute.default, (gate.ids, similarity, *numbers), options)
        describe(new_ids, gate.ids, nodes.value(gate.ids))
        if projection is not None:
            assert weights is not None
            weights = _projected(graph, gate.ids, new_ids, weights, projection)
        if not merged:
            return new_ids, weights if projection is not None else None
    assert weights is not None
    both = graph.call_function(torch.ops.sere.reroute_merged.default, (gate.ids, weights, similarity, *numbers))
    describe(both, gate.ids, (nodes.value(gate.ids), nodes.value(weights)))
    new_ids = graph.call_function(operator.getitem, (both, 0))
    describe(new_ids, gate.ids, nodes.value(gate.ids))
    new_weights = graph.call_function(operator.getitem, (both, 1))
    describe(new_weights, weights, nodes.value(weights))
    return new_ids, new_weights


def _projected(graph: Graph, ids: Node, new_ids: Node, weights: Node, projection: Node) -> Node:
    """The weights [..., K] times projection[old, new]; slots that stay read the 1 at [0, 0]."""
    aten = torch.ops.aten
    shape = nodes.shape(projection) or ()
    fake = next((v for v in (nodes.value(ids), nodes.value(weights)) if isinstance(v, FakeTensor)), None)

    def value(node: Node) -> Any:
        # The matrix may be real, or come from another fake mode than the graph's.
        if fake is not None and node is projection:
            return fake.new_empty(shape, dtype=torch.float32)
        return nodes.value(node)

    call = _caller(graph, weights, fake, value)
    moved = call(aten.ne.Tensor, new_ids, ids)
    places = [
        call(aten._to_copy.default, call(aten.where.ScalarOther, moved, chosen, 0), dtype=torch.int64)
        for chosen in (ids, new_ids)
    ]
    product = call(aten.mul.Tensor, weights, call(aten.index.Tensor, projection, places))
    return call(aten._to_copy.default, product, dtype=nodes.value(weights).dtype)


def _caller(
    graph: Graph, like: Node, fake: FakeTensor | None, value: Callable[[Node], Any] = nodes.value
) -> Callable[..., Node]:
    """Makes calls of operators, with metadata like a node's and the values that its tracer would record."""
    metadata = {key: found for key, found in like.meta.items() if key not in _VALUES}
    key = next((key for key in _VALUES[:2] if key in like.meta), None)

    def call(target: torch._ops.OpOverload, *arguments: Any, **options: Any) -> Node:
        node = graph.call_function(target, arguments, options)
        node.meta = dict(metadata)
        if key is not None:
            with fake.fake_mode if fake is not None else contextlib.nullcontext():
                node.meta[key] = target(*torch.fx.node.map_arg(arguments, value), **options)
        return node

    return call


def _moved(graph: Graph, ids: Node, new_ids: Node, table: Node) -> Node:
    """A table [.., E] with what stands at a slot's old expert at its new one; the rest is 0, which a mask leaves out.

    Summed over the slots in their order, which a scatter on a GPU does not promise.
    """
    aten, held = torch.ops.aten, nodes.value(table)
    call = _caller(graph, table, held if isinstance(held, FakeTensor) else None)
    old, new = (call(aten._to_copy.default, node, dtype=torch.int64) for node in (ids, new_ids))
    worth = call(aten.unsqueeze.default, call(aten.gather.default, table, -1, old), -1)
    experts = call(aten.arange.default, nodes.last_size(table), device=nodes.device(table))
    named = call(aten.eq.Tensor, call(aten.unsqueeze.default, new, -1), experts)
    return call(aten.sum.dim_IntList, call(aten.mul.Tensor, worth, named), [-2])


def describe(new: Node, like: Node, value: object) -> None:
    """Give a new node the metadata of the node it replaces, and its value under the tracer's key."""
    new.meta = dict(like.meta)
    key = next((k for k in _VALUES if k in like.meta), None)
    new.meta.pop("tensor_meta", None)
    if key is not None:
        new.meta[key] = value


def _rebased(read: Node, copies: dict[Node, Node]) -> Node:
    """The view, cast, copy or mask `read`, made from the new ids; `copies` maps old to new nodes."""
    if read not in copies:
        parent = nodes.slot_source(read)
        assert parent is not None
        source = _rebased(parent, copies)
        # A view may stand before the new ids, or need sizes that are computed after them.
        with read.graph.inserting_after(max(source, read)):
            copies[read] = read.graph.node_copy(read, lambda n: source if n is parent else n)
    return copies[read]


def _erase_unused_views(gate: Gate) -> None:
    """Remove the views of the old ids that only the redirected uses had."""
    for use in gate.uses:
        node = use.read
        while node is not gate.ids and not node.users:
            parent = nodes.slot_source(node)
            if node.graph is not gate.ids.graph or node._erased:
                break
            node.graph.erase_node(node)
            assert parent is not None
            node = parent


def _late_part(weights: Node, first: Node) -> list[Node]:
    """What computes the weights at or after `first`, in graph order: it has to move before it."""

    def is_late(node: Node) -> bool:
        return not node < first

    late = walk(filter(is_late, [weights]), lambda node: filter(is_late, node.all_input_nodes))
    return sorted(late)


def _cannot_move(late: list[Node], first: Node, consumers: list[Node]) -> Node | None:
    """A dispatch among the nodes that should move, or a write that one of them would cross."""
    if not late:
        return None
    blocked = next((node for node in late if node in consumers), None)
    if blocked is not None:
        return blocked
    crossed, node = [], first
    while node is not late[-1]:
        if node not in late:
            crossed.append(node)
        node = node.next
    for writers, others in ((late, crossed), (crossed, late)):
        for writer in writers:
            memory = {alias for written in nodes.writes(writer) for alias in aliases(written)}
            if any(source in memory for other in others for source in other.all_input_nodes):
                return writer
    return None


def _changed_after(first: Node, watched: list[Node], ignoring: list[Node]) -> Node | None:
    """The first node at or after `first` that writes to memory of a watched tensor."""
    for tensor in watched:
        writing = {user for alias in aliases(tensor) for user in alias.users if alias in nodes.writes(user)}
        late = [node for node in writing if not node < first and node not in ignoring]
        if late:
            return min(late)
    return None
