"""Prove that a dispatch by sorted slots sums both slots of a token that names an expert twice."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from ..graph import nodes
from .expert_evidence import same_for_every_expert
from .token_places import is_counted

COUNTS = frozenset({"histc", "bincount"})


def counts_ids(node: Node) -> bool:
    """Whether a node counts how often each id occurs: `bincount`, `histc`, or ones added up at the ids."""
    if nodes.kind(node) == "scatter_add":
        return len(nodes.shape(nodes.operand(node) or node) or ()) == 1
    return nodes.kind(node) in COUNTS


def consumers(ids: Node, stop: tuple[Node, ...] = (), masks: bool = True) -> Iterator[tuple[Node, Node]]:
    """Pairs (consumer, what it reads of the ids) in graph order, none behind `stop`.

    Without `masks` only views, casts and copies are followed: a masked permutation is none.
    """
    for user in ids.users:
        if user in stop:
            continue
        if nodes.slot_source(user) is ids and (masks or nodes.kind(user) in nodes.VALUE_PRESERVING):
            yield from consumers(user, stop, masks)
        elif nodes.reads_numbers(user, ids):
            yield user, ids


def slots_stay_apart(sort: Node, num_experts: int) -> bool:
    """Whether everything made from the sorted order treats each (token, rank) slot on its own.

    Sorting gives a permutation of the slots. Reading rows by it, counting, and writing rows by it
    are safe, a permutation hits every row once. The token number of a slot (`order // K`) names a
    token K times: rows may be read by it and added by it, but a plain write by it keeps one slot
    only.
    """
    if nodes.kind(sort) == "argsort":
        return _permutation_is_safe(sort)
    picked = {user.args[1]: user for user in sort.users if nodes.kind(user) == "item"}
    if len(picked) != len(sort.users):
        return False
    sorted_ids, order = picked.get(0), picked.get(1)
    if sorted_ids is not None and not _counts_only(sorted_ids, num_experts):
        return False
    return order is None or _permutation_is_safe(order)


def _counts_only(sorted_ids: Node, num_experts: int) -> bool:
    """Whether sorted ids are only counted, or index per-expert parameters row by row.

    They may be compared with sentinels outside [0, E) and clamped to the experts, in place or not.
    """
    for consumer, read in consumers(sorted_ids, masks=False):
        name = nodes.kind(consumer)
        by_row = name == "index" and read in nodes.index_tensors(consumer)
        by_row = by_row and not is_counted(nodes.operand(consumer))  # such a table numbers an expert's slots
        if name in nodes.CLAMPS and nodes.same_shape(consumer, read) and _counts_only(consumer, num_experts):
            continue
        if not (name in COUNTS or by_row or same_for_every_expert(consumer, num_experts)):
            return False
    return True


def _permutation_is_safe(order: Node) -> bool:
    for consumer, read in consumers(order, masks=False):
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
    for consumer, read in consumers(tokens, masks=False):
        name = nodes.kind(consumer)
        reads = name == "index" and read in nodes.index_tensors(consumer)
        adds = name in ("index_add", "scatter_add") or (
            name == "index_put" and bool(nodes.argument(consumer, 3, "accumulate", False))
        )
        if not (reads or adds):
            return False
    return True
