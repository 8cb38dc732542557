"""Say what each consumer of a gate's ids does with them.

Ids are followed through views, casts and copies; every other consumer ends a path and gets one `UseKind`.
A consumer counts as duplicate-safe only when it treats slots (token, rank) independently: then a token that
names an expert twice gets the sum of both slots, whatever follows.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from . import nodes
from .gate import Use, UseKind

_COUNTS = frozenset({"histc", "bincount"})
# How far ahead of a consumer experts are looked for; the whole dispatch of the largest known one is 60 nodes.
_HORIZON = 200


def classify_uses(ids: Node, projection: Node, num_experts: int) -> list[tuple[Use, bool]]:
    """Classify every consumer of the ids.

    Returns:
        Each use, and whether expert weights are seen behind it in this graph.
    """
    classified = [_classify(consumer, read, projection, num_experts) for consumer, read in _consumers(ids)]
    if _tells_experts_apart([use.consumer for use, _ in classified], num_experts):
        classified = [(use, reaches or bool(_numbers_named(use.consumer))) for use, reaches in classified]
    inside = any(reaches for _, reaches in classified)
    return [(_inside(use) if inside else use, reaches) for use, reaches in classified]


def _inside(use: Use) -> Use:
    """A use whose experts were not seen, next to one whose were: what it computes meets them later in this graph."""
    if use.kind is UseKind.LEAVES and use.consumer.op != "output":
        return Use(use.consumer, use.read, UseKind.UNKNOWN)
    return use


def _consumers(ids: Node) -> Iterator[tuple[Node, Node]]:
    """Pairs (consumer, the view or copy of the ids that it reads), in graph order of the paths."""
    for user in ids.users:
        if nodes.kind(user) in nodes.VALUE_PRESERVING and nodes.operand(user) is ids:
            yield from _consumers(user)
        elif nodes.reads_numbers(user, ids):
            yield user, ids


def _classify(consumer: Node, read: Node, projection: Node, num_experts: int) -> tuple[Use, bool]:
    name = nodes.kind(consumer)
    if consumer.op == "output":
        return Use(consumer, read, UseKind.LEAVES), False
    if _reads_scores(consumer, read, projection):
        return Use(consumer, read, UseKind.LOOK_UP), False
    if name == "index" and read in nodes.index_tensors(consumer):
        return _classify_index(consumer, read, nodes.operand(consumer), num_experts)
    if name == "embedding":
        table = max(nodes.operands(consumer), key=lambda n: nodes.is_floating(n))
        return _classify_index(consumer, read, table, num_experts)
    reaches = reaches_experts(consumer, num_experts)
    if name in ("sort", "argsort") and _slots_stay_apart(consumer):
        return Use(consumer, read, UseKind.GROUPED), reaches
    if name in _COUNTS:
        return Use(consumer, read, UseKind.GROUPED if reaches else UseKind.STATISTIC), reaches
    if not reaches and _leaves(consumer):
        return Use(consumer, read, UseKind.LEAVES), False
    return Use(consumer, read, UseKind.UNKNOWN), reaches


def _classify_index(consumer: Node, read: Node, source: Node | None, num_experts: int) -> tuple[Use, bool]:
    """`source[ids]`: stacked expert weights, a per-expert vector for the weights, or something else."""
    root = nodes.parameter_root(source) if source is not None else None
    sizes = nodes.shape(source) if source is not None else None
    if root is None or sizes is None or len(nodes.index_tensors(consumer)) > 1:
        return Use(consumer, read, UseKind.UNKNOWN), reaches_experts(consumer, num_experts)
    if len(sizes) == 1:
        return Use(consumer, read, UseKind.LOOK_UP), False
    # A table with one vector a row may be expert biases or any embedding: no evidence by itself.
    return Use(consumer, read, UseKind.EXPERT_INDEX), len(sizes) >= 3 and sizes[0] == num_experts


def _reads_scores(consumer: Node, read: Node, projection: Node) -> bool:
    """Whether the ids pick, from the last dimension, numbers that come from the router's projection.

    `scores.gather(1, ids)`, `scores.take_along_dim(ids, 1)` and `scores[rows, ids]`.
    """
    source = nodes.operand(consumer)
    sizes = nodes.shape(source) if source is not None else None
    if source is None or sizes is None:
        return False
    match nodes.kind(consumer):
        case "gather":
            position, dim = nodes.argument(consumer, 2, "index"), nodes.argument(consumer, 1, "dim")
        case "take_along_dim":
            position, dim = nodes.argument(consumer, 1, "indices"), nodes.argument(consumer, 2, "dim")
        case "index" if len(nodes.index_tensors(consumer)) == len(sizes) > 1:
            position, dim = nodes.index_tensors(consumer)[-1], -1
        case _:
            return False
    if position is not read or dim not in (-1, len(sizes) - 1):
        return False
    pending, seen = [source], {source}
    while pending:
        node = pending.pop()
        if node is projection:
            return True
        fresh = [s for s in nodes.operands(node) if s not in seen and nodes.last_size(s) == sizes[-1]]
        seen.update(fresh)
        pending.extend(fresh)
    return False


def _tells_experts_apart(consumers: list[Node], num_experts: int) -> bool:
    """Whether each expert is asked for by its number, as a loop over separate expert modules does.

    `ids == e`, or a column e of a mask or of weights made from the ids, for every e: the numbers 0 .. E-1 all occur.
    """
    named = {number for consumer in consumers for number in _numbers_named(consumer)}
    return named.issuperset(range(num_experts))


def _numbers_named(consumer: Node) -> set[int]:
    """The constants that a consumer compares the ids with, or the columns that are taken of its mask."""
    name = nodes.kind(consumer)
    if name == "eq":
        other = nodes.argument(consumer, 1, "other")
        return {int(other)} if isinstance(other, (int, float)) and other == int(other) else set()
    if name not in ("one_hot", "scatter", "scatter_add"):
        return set()
    columns: set[int] = set()
    pending = nodes.followers(consumer)
    seen = set(pending)
    while pending:
        node = pending.pop()
        picked = _picked_numbers(node)
        columns |= picked
        rearranged = nodes.kind(node) in nodes.VALUE_PRESERVING | {"transpose", "permute"}
        if not picked and (rearranged or nodes.same_shape(node, consumer)):
            fresh = [user for user in nodes.followers(node) if user not in seen]
            seen.update(fresh)
            pending.extend(fresh)
    return columns


def _picked_numbers(node: Node) -> set[int]:
    """The number in `x[.., e]` or `x.select(dim, e)`, or in a slice one wide."""
    if nodes.raw_name(node) == "select":
        parts: object = nodes.argument(node, 2, "index")
    elif nodes.raw_name(node) == "slice":
        start, stop = nodes.argument(node, 2, "start", 0), nodes.argument(node, 3, "end")
        parts = slice(start, stop)
    elif nodes.kind(node) == "slice":
        parts = node.args[1]
    else:
        return set()
    numbers = set()
    for part in parts if isinstance(parts, (tuple, list)) else (parts,):
        if isinstance(part, slice) and isinstance(part.start, int) and part.stop == part.start + 1:
            numbers.add(part.start)
        elif isinstance(part, int) and not isinstance(part, bool):
            numbers.add(part)
    return numbers


def reaches_experts(start: Node, num_experts: int) -> bool:
    """Whether weights stacked over the experts, [E, .., ..], are read somewhere behind `start`."""
    pending, seen = [start], {start}
    while pending and len(seen) < _HORIZON:
        node = pending.pop(0)
        if any(_is_stacked(source, num_experts) for source in nodes.operands(node)):
            return True
        fresh = [user for user in nodes.followers(node) if user not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return False


def _is_stacked(node: Node, num_experts: int) -> bool:
    root = nodes.parameter_root(node)
    sizes = nodes.shape(root) if root is not None else None
    return sizes is not None and len(sizes) >= 3 and sizes[0] == num_experts


def _leaves(start: Node) -> bool:
    """Whether the consumer's result is returned from the graph without meeting expert weights."""
    pending, seen = [start], {start}
    while pending:
        node = pending.pop()
        if node.op == "output":
            return True
        fresh = [user for user in nodes.followers(node) if user not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return False


def _slots_stay_apart(sort: Node) -> bool:
    """Whether everything made from the sorted order treats each (token, rank) slot on its own.

    Sorting gives a permutation of the slots. Reading rows by it, counting, and writing rows by it are safe,
    a permutation hits every row once. The token number of a slot (`order // K`) names a token K times: rows may
    be read by it and added by it, but a plain write by it keeps one slot only.
    """
    if nodes.kind(sort) == "argsort":
        return _permutation_is_safe(sort)
    picked = {user.args[1]: user for user in sort.users if nodes.kind(user) == "item"}
    if len(picked) != len(sort.users):
        return False
    sorted_ids, order = picked.get(0), picked.get(1)
    return (sorted_ids is None or _counts_only(sorted_ids)) and (order is None or _permutation_is_safe(order))


def _counts_only(sorted_ids: Node) -> bool:
    """Whether sorted ids are only counted, or index per-expert parameters row by row."""
    for consumer, read in _consumers(sorted_ids):
        name = nodes.kind(consumer)
        by_row = name == "index" and read in nodes.index_tensors(consumer)
        if not (name in _COUNTS or by_row):
            return False
    return True


def _permutation_is_safe(order: Node) -> bool:
    for consumer, read in _consumers(order):
        name = nodes.kind(consumer)
        if name == "argsort" and _permutation_is_safe(consumer):
            continue
        if name in ("index", "index_put", "scatter", "index_copy") and read is not nodes.operand(consumer):
            continue
        if name in ("floor_divide", "div") and _tokens_are_safe(consumer):
            continue
        return False
    return True


def _tokens_are_safe(tokens: Node) -> bool:
    for consumer, read in _consumers(tokens):
        name = nodes.kind(consumer)
        reads = name == "index" and read in nodes.index_tensors(consumer)
        adds = name in ("index_add", "scatter_add") or (
            name == "index_put" and bool(nodes.argument(consumer, 3, "accumulate", False))
        )
        if not (reads or adds):
            return False
    return True
