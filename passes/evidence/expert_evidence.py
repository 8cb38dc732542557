"""Evidence of experts behind ids: weights stacked over experts, or each expert named by its number."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..graph import nodes
from ..graph.columns import constant
from ..graph.state import computed_of_state
from ..graph.walk import walk

# How far ahead of a consumer experts are looked for; the whole dispatch of the largest known one is
# 60 nodes.
_HORIZON = 200
_SHARED = frozenset({"linear", "matmul", "addmm", "scaled_dot_product_attention"}) | {
    "embedding",
    "embedding_bag",
    "_embedding_bag",
}
_STEPS = 12  # from a mask of one expert's tokens to its weights
_BELOW = {"ge": 0, "lt": 0, "gt": 1, "le": 1, "eq": 0, "ne": 0}


def reaches_experts(start: Node, num_experts: int | None) -> bool:
    """Whether weights stacked over the experts, [E, .., ..], are read somewhere behind `start`.

    A matrix that all tokens share ends a path: what lies behind it is another part of the model. So
    does what becomes part of the hidden states: an embedding of the ids that is added to them meets
    experts in a later layer.

    Args:
        start: a consumer of the ids.
        num_experts: E; None for any number.
    """
    pending, seen, steps = [start], {start}, 0
    while pending and steps < _HORIZON:
        node = pending.pop(0)
        # One for each expert, where counts become the sizes of a split: they are no distance.
        steps += nodes.kind(node) != "item"
        if any(_is_stacked(source, num_experts) for source in nodes.operands(node)) and not _convolves(node):
            return True
        if _projects_all_tokens(node):
            continue
        fresh = [user for user in nodes.followers(node) if user not in seen and not _asserts(user)]
        fresh = [user for user in fresh if not _becomes_data(user, node, start, num_experts)]
        seen.update(fresh)
        pending.extend(fresh)
    return False


_ADDS = frozenset({"add", "sub", "cat", "concat", "concatenate", "lerp"})
_SCALES = frozenset({"mul", "div", "where", "addcmul"})


def _becomes_data(mixing: Node, made_of_ids: Node, start: Node, num_experts: int | None) -> bool:
    """Whether numbers made of the ids become part of earlier data: added to it, or scaling it.

    A mask over the experts may be added to, and a token's own number may mask its hidden states.
    """
    name = nodes.kind(mixing)
    if name not in _ADDS | _SCALES or not nodes.is_floating(mixing) or num_experts is None:
        return False
    before = [source for source in nodes.operands(mixing) if source < start and nodes.shape(source) != ()]
    sizes = nodes.shape(made_of_ids) or ()
    if not before or num_experts in sizes:
        return False
    tokens = (nodes.shape(before[0]) or ())[:1]
    return name in _ADDS or [str(size) for size in sizes[:1]] != [str(size) for size in tokens]


def _asserts(node: Node) -> bool:
    """Whether a node only checks a size: torch.export guards each count that becomes one."""
    names = ("_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")
    return isinstance(nodes.value(node), torch.SymBool) or nodes.raw_name(node) in names


_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "linear", "grouped_mm"})
_REARRANGES = nodes.VALUE_PRESERVING | {"transpose", "permute", "slice", "select", "narrow", "chunk", "split", "item"}


def is_multiplied(gathered: Node) -> bool:
    """Whether gathered weights meet hidden states in a product, unlike rows of a prompt pool.

    On the way they may be viewed, taken apart or scaled (dequantised).
    """
    kept = _REARRANGES | {"mul", "sub"}
    weights = walk([gathered], lambda node: [user for user in node.users if nodes.kind(user) in kept])
    products = ((user, node) for node in weights for user in node.users if nodes.kind(user) in _PRODUCTS)
    return any(not _only_with_weights(user, node) for user, node in products)


_MOVES = _REARRANGES | {"repeat", "repeat_interleave"}
_JOINS_SLOTS = frozenset({"scatter", "scatter_add", "index_put", "index_add", "index_copy", "cat", "stack"})
_REDUCES = frozenset({"sum", "mean", "prod", "amax", "amin", "max", "min", "norm", "topk", "sort", "argmax"})


def scales_experts(look_up: Node) -> bool:
    """Whether one number per expert, looked up by the ids, scales weights or outputs of experts.

    There it belongs to the expert (a scale of packed weights). Multiplied with the routing weights
    it does not.
    """

    def calculates(user: Node) -> bool:  # whole numbers are shifted as well
        return nodes.is_floating(user) or nodes.kind(user) in ("sub", "add", "mul")

    def stays_single(user: Node) -> bool:
        return nodes.kind(user) in _MOVES or (calculates(user) and _looked_up(user))

    def meets_many(user: Node) -> bool:
        joins = nodes.kind(user) in _JOINS_SLOTS | _REDUCES or stays_single(user)
        return calculates(user) and not joins and nodes.count(user) != nodes.count(look_up)

    single = walk([look_up], lambda node: filter(stays_single, node.users))
    return any(meets_many(user) for node in single for user in node.users)


def _looked_up(node: Node) -> bool:
    """Whether a tensor is made of constants and of look-ups in tables with one number per expert."""
    pending, seen = [node], {node}
    while pending:
        source = pending.pop()
        table = nodes.operand(source) if nodes.kind(source) == "index" else None
        is_look_up = (
            table is not None and nodes.parameter_root(table) is not None and len(nodes.shape(table) or ()) == 1
        )
        if is_look_up or nodes.count(source) == 1:
            continue
        sources = list(nodes.operands(source))
        if not sources or len(seen) > _STEPS:
            return False
        fresh = [other for other in sources if other not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return True


def _only_with_weights(product: Node, gathered: Node) -> bool:
    """Whether all that a product multiplies with the gathered weights is the model's own."""
    others = [source for source in nodes.operands(product) if source is not gathered]
    roots = [nodes.parameter_root(source) for source in others]
    return all(root is not None and nodes.is_model_state(root) for root in roots)


def _convolves(node: Node) -> bool:
    return "conv" in nodes.kind(node)


def _projects_all_tokens(node: Node) -> bool:
    if nodes.kind(node) not in _SHARED:
        return False
    roots = [(source, nodes.parameter_root(source)) for source in nodes.operands(node)]
    return any(
        root is not None and len(nodes.shape(root) or ()) == 2 and nodes.is_model_state(root) for _, root in roots
    )


def _is_stacked(node: Node, num_experts: int | None) -> bool:
    root = nodes.parameter_root(node)
    return is_computed_stack(node, num_experts) if root is None else is_stack(nodes.shape(root), num_experts)


def is_stack(sizes: tuple[Any, ...] | None, num_experts: int | None) -> bool:
    """Whether a tensor of these sizes may hold a matrix for each expert."""
    return sizes is not None and len(sizes) >= 3 and num_experts in (None, sizes[0])


def is_computed_stack(node: Node, num_experts: int | None) -> bool:
    """Whether a node computes a matrix for each expert of the model's state, as one that is dequantised whole."""
    return num_experts is not None and is_stack(nodes.shape(node), num_experts) and computed_of_state(node)


def outputs_of_all(table: Node, num_experts: int) -> bool:
    """Whether a tensor [T, E, H] (or [E, T, H]) holds what every expert gives for every token.

    It is a product with weights stacked over the experts, or a stack of as many products with weights of their own.
    """
    sizes = nodes.shape(table) or ()
    if len(sizes) < 3 or num_experts not in sizes[:-1] or not nodes.is_floating(table) or computed_of_state(table):
        return False
    return bool(_stacks_behind(table, num_experts)) or len(_weights_of([table])) >= num_experts


def picks_outputs(ids: Sequence[Node], num_experts: int) -> Node | None:
    """What every expert gives for every token, where it is picked or weighed by what is made of the ids, or None."""
    ahead, seen = list(ids), set(ids)
    for _ in range(_STEPS):
        reached = [user for node in ahead for user in nodes.followers(node) if not _asserts(user)]
        ahead = [user for user in dict.fromkeys(reached) if user not in seen]
        seen.update(ahead)
        for source in (source for user in ahead for source in nodes.operands(user) if source not in seen):
            if outputs_of_all(source, num_experts):
                return source
        ahead = [user for user in ahead if not _projects_all_tokens(user)]
    return None


def _stacks_behind(table: Node, num_experts: int) -> list[Node]:
    """Weights stacked over the experts within some steps of a tensor, of which it is made."""
    found: list[Node] = []
    ahead, seen = [table], {table}
    for _ in range(_STEPS):
        sources = dict.fromkeys(source for node in ahead for source in nodes.operands(node) if source not in seen)
        seen.update(sources)
        found += [source for source in sources if _is_stacked(source, num_experts)]
        ahead = [source for source in sources if nodes.is_floating(source)]
    return found


def runs_experts(node: Node, routing: Collection[Node | None]) -> bool:
    """Whether a matrix that the graph takes went into a node: a table [T, E] of routing weights alone is no output.

    Args:
        node: may be a result of experts.
        routing: ids and weights, of which tables are made.
    """

    def behind(reader: Node) -> list[Node]:
        sources = nodes.numbers_behind(reader)
        sources += [w for source in sources for w in nodes.writers(source) if w < node]
        return [source for source in sources if source not in routing]

    inputs = (reader for reader in walk([node], behind) if reader.op in ("placeholder", "get_attr"))
    return any(nodes.is_floating(found) and len(nodes.shape(found) or ()) >= 2 for found in inputs)


def tells_experts_apart(consumers: list[Node], num_experts: int) -> bool:
    """Whether each expert is named by its number, as in a loop over separate expert modules.

    `ids == e`, or a column e of a mask or of weights made from the ids, for every e: the numbers 0
    .. E-1 all occur, and as many weights are met behind. A loop over classes that counts hits meets
    no weights.
    """
    naming = {consumer: numbers for consumer in consumers if (numbers := numbers_named(consumer))}
    named = {number for numbers in naming.values() for number in numbers}
    return named.issuperset(range(num_experts)) and _weights_behind(list(naming), num_experts) >= num_experts


def _weights_behind(masks: list[Node], enough: int) -> int:
    """How many weights are multiplied, within some steps, with what is made of the masks."""
    met: set[object] = set()
    ahead, seen = list(masks), set(masks)
    for _ in range(_STEPS):
        reached: list[Node] = []
        for node in ahead:
            for user in nodes.followers(node):
                if user in seen or _asserts(user):
                    continue
                seen.add(user)
                met |= _weights_of([source for source in nodes.operands(user) if source is not node])
                if not _projects_all_tokens(user) and not _becomes_data(user, node, masks[0], enough):
                    reached.append(user)
            if len(met) >= enough:
                return len(met)
        ahead = reached
    return len(met)


def _weights_of(operands: list[Node]) -> set[object]:
    """The matrices that tensors are, are parts of, or were projected by a few steps ago."""
    met: set[object] = set()
    pending = [(operand, 0) for operand in operands]
    while pending:
        node, steps = pending.pop()
        root = nodes.parameter_root(node)
        rank = len(nodes.shape(root) or ()) if root is not None and nodes.is_model_state(root) else 0
        if rank >= 2 and root is not None and nodes.is_floating(root):
            met.add(root.target if rank == 2 else node)  # an expert's part of a stack counts for itself
        elif steps < _STEPS and nodes.is_floating(node):
            pending += [(source, steps + 1) for source in nodes.operands(node)]
    return met


def numbers_named(consumer: Node) -> set[int]:
    """The numbers that a consumer compares the ids with, or the columns taken of its mask."""
    name = nodes.kind(consumer)
    if name == "eq":
        other = nodes.argument(consumer, 1, "other")
        return {int(other)} if isinstance(other, (int, float)) and other == int(other) else set()
    if name not in ("one_hot", "scatter", "scatter_add"):
        return set()

    def ahead(node: Node) -> list[Node]:
        kept = nodes.kind(node) in nodes.VALUE_PRESERVING | {"transpose", "permute"} or nodes.same_shape(node, consumer)
        return nodes.followers(node) if kept and not _picked_numbers(node) else []

    return {number for node in walk(nodes.followers(consumer), ahead) for number in _picked_numbers(node)}


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
        elif isinstance(part, int):
            numbers.add(part)
    return numbers


def limits_named(consumer: Node) -> set[int]:
    """Numbers of experts for which a consumer's comparison or clamp of the ids makes sense."""
    name = nodes.kind(consumer)
    if name in _BELOW:
        number = constant(nodes.argument(consumer, 1, "other"))
    elif name in ("clamp", "clamp_max"):
        number = constant(nodes.argument(consumer, 2 if name == "clamp" else 1, "max"))
        number = None if number is None else number + 1
    else:
        return set()
    return set() if number is None else {int(number) + _BELOW.get(name, 0)}


def same_for_every_expert(consumer: Node, num_experts: int) -> bool:
    """Whether the consumer only separates experts from ids outside [0, E): all experts are alike."""
    name = nodes.kind(consumer)
    if name not in _BELOW:
        return False
    number = constant(nodes.argument(consumer, 1, "other"))
    if number is None:
        return False
    if name in ("eq", "ne"):
        return number < 0 or number >= num_experts
    limit = number + _BELOW[name]  # ids below the limit on one side, the others on the other
    return limit <= 0 or limit >= num_experts
