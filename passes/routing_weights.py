"""Find the routing weights in the form in which the dispatch consumes them.

Merging duplicate slots changes ids and weights together, so it has to happen on the weights' last form with one
number a slot: after normalising, scaling and casting, before they meet expert outputs or leave the graph.
"""

from __future__ import annotations

from torch.fx import Node

from . import nodes
from .gate import Skip, SkipReason, Use, UseKind

_REDUCTIONS = frozenset({"sum", "amax", "max", "mean", "norm"})


def find_routing_weights(ids: Node, values: Node | None, uses: list[tuple[Use, bool]]) -> Node | Skip:
    """The one tensor shaped like the ids, made from the selected scores, that later code consumes."""
    starts = [values] if values is not None and values.users else []
    starts += [use.consumer for use, _ in uses if use.kind is UseKind.LOOK_UP]
    starts = [start for start in starts if nodes.is_floating(start)]
    chain = _slot_shaped(starts, ids)
    consumed = [node for node in chain if nodes.same_shape(node, ids) and _outer_consumers(node, chain)]
    if not consumed:
        return Skip(SkipReason.NO_WEIGHTS, ids, evidence=4)
    if len(consumed) > 1:
        return Skip(SkipReason.AMBIGUOUS_WEIGHTS, ids, ", ".join(n.name for n in consumed), evidence=4)
    return consumed[0]


def _slot_shaped(starts: list[Node], ids: Node) -> dict[Node, None]:
    """Everything computed from `starts` that still has one number a slot, or one number a token to scale by."""
    chain = dict.fromkeys(starts)
    pending = list(starts)
    while pending:
        for user in pending.pop().users:
            if user not in chain and user.op != "output" and _keeps_slots(user, ids):
                chain[user] = None
                pending.append(user)
    return chain


def _keeps_slots(node: Node, ids: Node) -> bool:
    if nodes.same_shape(node, ids):
        return nodes.is_floating(node)
    per_token = nodes.last_size(node) == 1 or nodes.kind(node) in _REDUCTIONS
    # A reduction that is used for anything else than scaling the weights would not end in slot shape.
    return per_token and bool(node.users) and all(nodes.same_shape(user, ids) for user in node.users)


def _outer_consumers(node: Node, chain: dict[Node, None]) -> list[Node]:
    return [
        user
        for user in node.users
        if user not in chain and nodes.raw_name(user) not in ("size", "_assert_tensor_metadata", "sym_size", "dim")
    ]


def outer_consumers(weights: Node, ids: Node) -> list[Node]:
    """The consumers of the routing weights that lie behind their last slot-shaped form."""
    return _outer_consumers(weights, _slot_shaped([weights], ids))
