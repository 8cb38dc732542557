"""Dispatches in which a token's place depends on the ids of other tokens.

mask = one_hot(ids); place = cumsum(mask, 0); mask * (place < capacity)        an expert's buffer
sorted, order = sort(ids); arange(n) - starts[sorted] < capacity               the same
order = argsort(ids); x[order].split([3, 0, 5, ..])                            counts that tracing wrote down
"""

from __future__ import annotations

from torch.fx import Node

from ..graph import nodes
from ..graph.walk import walk

# How many nodes ahead are looked at.
_HORIZON = 200
# What masks of the ids are made by.
MASKING = frozenset({"one_hot", "scatter", "eq"})
_REORDERS = nodes.VALUE_PRESERVING | {"transpose", "permute", "select", "slice", "unbind", "item"}
# What the first row of each expert is computed from: a table made of it holds none of the model's
# numbers.
_COUNTING = frozenset({"cumsum", "histc", "bincount", "searchsorted", "one_hot", "bucketize"})
_COUNTED_WITHIN = 12
_KEEPS_MASK = nodes.VALUE_PRESERVING | {"transpose", "permute", "mul", "add", "sub", "slice", "select", "cat", "pad"}
# A slot's own place may be picked from those in every expert.
_KEEPS_NUMBERS = _KEEPS_MASK | {
    "sum",
    "max",
    "amax",
    "gather",
    "take_along_dim",
    "index",
    "where",
    "masked_fill",
    "item",
}
_COMPARES = frozenset({"lt", "le", "gt", "ge"})


def drops_tokens(consumer: Node) -> bool:
    """Whether an expert's tokens are numbered and compared with its capacity.

    By the running sum of a mask, which may be made of the ids in another order (slots in front, or
    one rank at a time), or in sorted order, counted from the expert's first row.
    """
    pending: list[tuple[Node, str]] = [(consumer, "ids")]
    seen: set[tuple[Node, str]] = set()
    while pending and len(seen) < _HORIZON:
        node, held = pending.pop()
        if (node, held) in seen:
            continue
        seen.add((node, held))
        name = nodes.kind(node)
        if held == "numbers" and _is_limited(node):
            return True
        if held == "sorted":
            if name in ("index", "gather") and is_counted(nodes.operand(node)):
                held = "numbers"
            elif name not in _REORDERS:
                continue
        elif held == "ids":
            if name not in MASKING | _REORDERS | {"sort"}:
                continue
            held = "mask" if name in MASKING else "sorted" if name == "sort" else held
        elif name == "cumsum":
            held = "numbers"
        elif name not in (_KEEPS_NUMBERS if held == "numbers" else _KEEPS_MASK):
            continue
        pending.extend((user, held) for user in nodes.followers(node))
    return False


def _is_limited(places: Node) -> bool:
    """Whether places are compared with a number above 0, or cut off at one."""
    name = nodes.kind(places)
    if name in ("clamp", "clip"):
        return nodes.argument(places, 2, "max") is not None
    limits = [argument for argument in places.args if isinstance(argument, (int, float))]
    return name in _COMPARES | {"minimum", "clamp_max"} and not any(limit <= 0 for limit in limits)


def is_counted(table: Node | None) -> bool:
    """Whether a table is computed from counts, as the first row of each expert is."""
    made_of = walk([] if table is None else [table], nodes.operands, _COUNTED_WITHIN)
    return any(nodes.kind(node) in _COUNTING for node in made_of)


_TAKES_PARTS = frozenset({"split", "split_with_sizes", "tensor_split", "chunk", "slice", "narrow"})


def split_at_fixed_places(sort: Node, slots: object) -> Node | None:
    """The node that takes a part of the slots in sorted order at constant places, or None.

    How many slots an expert has depends on the ids. make_fx and symbolic_trace write down what
    `counts.tolist()` was in the traced call, and new ids would send other slots to each expert.

    Args:
        sort: a consumer of the ids that sorts them.
        slots: number of ids; where it is symbolic nothing was written down.
    """
    if nodes.kind(sort) not in ("sort", "argsort") or not isinstance(slots, int):
        return None

    def in_order(node: Node) -> list[Node]:
        users = nodes.followers(node)
        return [user for user in users if nodes.kind(user) == "item" or _rows(user) == str(slots)]

    for node in walk([sort], in_order, _HORIZON):
        for user in nodes.followers(node):
            if _takes_fixed_part(user, node, slots):
                return user
    return None


def _takes_fixed_part(node: Node, source: Node, slots: int) -> bool:
    """Whether a node takes fewer rows than there are, from and to constant places."""
    if nodes.kind(node) not in _TAKES_PARTS or nodes.operand(node) is not source or _rows(source) != str(slots):
        return False
    parts = nodes.value(node)
    first = parts[0] if isinstance(parts, (tuple, list)) and parts else parts
    sizes = tuple(getattr(first, "shape", ()))
    return bool(sizes) and isinstance(sizes[0], int) and sizes[0] != slots and not _symbolic(node)


def _rows(node: Node) -> str:
    """How many rows there are, as written: a size that depends on the data must not be asked for its value."""
    sizes = nodes.shape(node)
    return str(sizes[0]) if sizes else ""


def _symbolic(node: Node) -> bool:
    """Whether a number among the arguments is computed in the graph."""
    return any(not nodes.is_tensor(source) for source in node.all_input_nodes)
