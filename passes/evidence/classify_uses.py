"""Say what each consumer of a gate's ids does with them.

Ids are followed through views, casts and copies; every other consumer ends a path and is given one
`UseKind`. A consumer counts as duplicate-safe only when it treats slots (token, rank)
independently: then a token that names an expert twice gets the sum of both slots, whatever follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Graph, Node

from ..gate import Use, UseKind
from ..graph import nodes
from ..graph.columns import cut_from
from ..graph.walk import walk
from .duplicate_safety import consumers, counts_ids, slots_stay_apart
from .expert_evidence import (
    is_computed_stack,
    is_multiplied,
    is_stack,
    limits_named,
    numbers_named,
    reaches_experts,
    same_for_every_expert,
    scales_experts,
    tells_experts_apart,
)
from .selections import Selection
from .token_places import MASKING

# What a step of a selection may do with its id besides choosing: mask it out of the scores of the
# next step.
_READS_SCORES = frozenset({"gather", "take_along_dim", "max", "argmax", "topk", "sort", "argsort"})
# What may happen to a mask on its way to a statistic while it has one row per token.
_KEEPS_ROWS = nodes.VALUE_PRESERVING | nodes.CLAMPS | {"sum", "any", "amax", "mul", "div"}


@dataclass(frozen=True)
class Uses:
    """Every consumer of a selection's ids.

    Attributes:
        all: the uses.
        reach: whether expert weights are seen behind a dispatch in this graph.
        compared_with: numbers of experts that comparisons of the ids would make sense of.
        entangled: a consumer that reads the ids before they are complete, and may dispatch by them.
    """

    all: list[Use]
    reach: bool
    compared_with: set[int]
    entangled: Node | None


def classify_uses(
    selection: Selection, projection: Node, num_experts: int, columns: int, leaves: Callable[[Node], bool]
) -> Uses:
    """Classify every consumer of the ids.

    Args:
        selection: what selects.
        projection: the router's projection.
        num_experts: E, of which expert weights are looked for.
        columns: number of scores that are selected from, at least E.
        leaves: whether a node's result is returned from the graph, see `Leaving`.
    """
    read = [pair for ids in selection.ids for pair in consumers(ids)]
    classified = [_classify(consumer, ids, projection, num_experts, leaves) for consumer, ids in read]
    if num_experts == columns and tells_experts_apart([use.consumer for use, _ in classified], num_experts):
        classified = [(use, reaches or bool(numbers_named(use.consumer))) for use, reaches in classified]
    inside = any(reaches for _, reaches in classified)
    counts = load_sizes(selection) | {num_experts, num_experts * selection.top_k}
    uses = [_inside(use, counts) if inside else use for use, _ in classified]
    if not inside and any(use.kind.dispatches for use in uses):
        # Sorted rows leave together with counts: experts outside the graph may split the ones by
        # the others.
        uses = [_outside(use, leaves, counts) for use in uses]
    later = (*selection.ids, *selection.unnarrowed)
    early = [pair for ids in (*selection.unnarrowed, *selection.steps) for pair in consumers(ids, later)]
    before = [_classify(consumer, ids, projection, num_experts, leaves)[0] for consumer, ids in early]
    open_ended = [use for use in before if use.kind.dispatches and not _only_masks(use.consumer, columns)]
    return Uses(
        uses + [Use(use.consumer, use.read, _kept(use)) for use in before],
        reach=any(use.kind.dispatches and reaches for use, (_, reaches) in zip(uses, classified, strict=True)),
        compared_with={number for consumer, _ in read + early for number in limits_named(consumer)},
        entangled=open_ended[0].consumer if open_ended else None,
    )


def load_sizes(selection: Selection) -> set[int]:
    """How many numbers a load over all tokens has: one, one per expert, or one per expert and rank."""
    columns = nodes.last_size(selection.scores) or 1
    return {1, columns, columns * selection.top_k}


def is_statistic(reader: Node, table: Node, sizes: set[int]) -> bool:
    """Whether all that comes of a reader of a mask, table or count is a number, or a buffer that it changes.

    Args:
        reader: of the table.
        table: of the ids, or a count of them.
        sizes: see `load_sizes`.
    """
    summed = counts_ids(table)
    step = (reader, summed or _sums_rows(reader))
    return (
        reader.op != "output"
        and _stays_a_count(step, table, summed, sizes)
        and _stay_counts([step], sizes)
        and _leaves_numbers(reader)
    )


def _kept(use: Use) -> UseKind:
    return UseKind.RANKING if use.kind.dispatches else use.kind


def _inside(use: Use, counts: set[int]) -> Use:
    """A use that reaches no experts, beside one that does: a statistic, or an unknown dispatch."""
    if use.kind is UseKind.LEAVES and use.consumer.op != "output":
        kind = UseKind.STATISTIC if _only_counts(use.consumer, counts) else UseKind.UNKNOWN
        return Use(use.consumer, use.read, kind)
    return use


def _only_counts(consumer: Node, counts: set[int]) -> bool:
    """Whether a mask or a count only becomes a load, or a loss that balances load: numbers for all tokens.

    A mask of the ids meets nothing else until its tokens are added up, and what comes of that, or
    of counting the ids, meets nothing larger.
    """
    if not counts_ids(consumer) and nodes.kind(consumer) not in MASKING:
        return False
    return _stay_counts([(consumer, counts_ids(consumer))], counts)


def _stay_counts(pending: list[tuple[Node, bool]], counts: set[int]) -> bool:
    """Whether nothing behind nodes is more than such numbers; each with whether its tokens are added up already."""
    seen = set(pending)
    while pending:
        node, summed = pending.pop()
        for user in nodes.followers(node):
            if not nodes.reads_numbers(user, node) or (summed and user.op == "output"):
                continue
            step = (user, summed or _sums_rows(user))
            if not _stays_a_count(step, node, summed, counts):
                return False
            if step not in seen:
                seen.add(step)
                pending.append(step)
    return True


def _stays_a_count(step: tuple[Node, bool], node: Node, summed: bool, counts: set[int]) -> bool:
    user, is_summed = step
    others = [source for source in nodes.operands(user) if source is not node]
    if not nodes.is_tensor(user) or (is_summed and any(nodes.count(n) not in counts for n in (user, *others))):
        return False
    return summed or (not others and (is_summed or nodes.kind(user) in _KEEPS_ROWS))


def _sums_rows(node: Node) -> bool:
    """Whether a node adds up or averages over the first dimension at least."""
    if nodes.kind(node) not in ("sum", "mean") or nodes.argument(node, 2, "keepdim", False):
        return False
    dim = nodes.argument(node, 1, "dim")
    dims = dim if isinstance(dim, (list, tuple)) else [dim]
    return not dims or None in dims or 0 in dims


def _outside(use: Use, leaves: Callable[[Node], bool], counts: set[int]) -> Use:
    """A use in a graph without experts: it may be the dispatch of those outside, or counts for a buffer."""
    if use.consumer.op != "output" and _only_counts(use.consumer, counts) and _leaves_numbers(use.consumer):
        return Use(use.consumer, use.read, UseKind.STATISTIC)
    if use.kind in (UseKind.STATISTIC, UseKind.GROUPED) and leaves(use.consumer):
        return Use(use.consumer, use.read, UseKind.LEAVES)
    return use


def _leaves_numbers(start: Node) -> bool:
    """Whether all that leaves the graph of what is made of a node is a loss, or a buffer that is changed by it."""
    made = walk([start], nodes.followers)
    returned = (node for node in made if any(user.op == "output" for user in nodes.followers(node)))
    return all(
        any(target.op in ("placeholder", "get_attr") for target in nodes.writes(node))
        or (nodes.is_floating(node) and nodes.count(node) == 1)
        for node in returned
    )


def _only_masks(consumer: Node, columns: int) -> bool:
    """Whether a consumer only shapes scores [.., columns] that are selected from or looked up."""
    if nodes.last_size(consumer) != columns:
        return False

    def scores_behind(node: Node) -> list[Node]:
        return [user for user in nodes.followers(node) if nodes.last_size(user) == columns]

    others = (
        user
        for node in walk([consumer], scores_behind)
        for user in nodes.followers(node)
        if nodes.last_size(user) != columns
    )
    return all(nodes.kind(user) in _READS_SCORES or not nodes.reads_numbers(user, consumer) for user in others)


def _classify(
    consumer: Node, read: Node, projection: Node, num_experts: int, leaves: Callable[[Node], bool]
) -> tuple[Use, bool]:
    name = nodes.kind(consumer)
    if consumer.op == "output":
        return Use(consumer, read, UseKind.LEAVES), False
    if _reads_scores(consumer, read, projection) or same_for_every_expert(consumer, num_experts):
        return Use(consumer, read, UseKind.LOOK_UP), False
    if name == "index" and read in nodes.index_tensors(consumer):
        return _classify_index(consumer, read, nodes.operand(consumer), num_experts)
    if name == "embedding":
        table = max(nodes.operands(consumer), key=lambda n: nodes.is_floating(n))
        return _classify_index(consumer, read, table, num_experts)
    weights = _taken_by_id(consumer, read)
    if weights is not None:
        return Use(consumer, read, UseKind.EXPERT_INDEX), (nodes.shape(weights) or ())[:1] == (num_experts,)
    reaches = reaches_experts(consumer, num_experts)
    if name in ("sort", "argsort") and slots_stay_apart(consumer, num_experts):
        return Use(consumer, read, UseKind.GROUPED), reaches
    if counts_ids(consumer):
        return Use(consumer, read, UseKind.GROUPED if reaches else UseKind.STATISTIC), reaches
    if not reaches and leaves(consumer):
        return Use(consumer, read, UseKind.LEAVES), False
    return Use(consumer, read, UseKind.UNKNOWN), reaches


def _taken_by_id(consumer: Node, read: Node) -> Node | None:
    """Stacked weights of which an operator takes those that the ids name."""
    name = nodes.kind(consumer)
    if name in nodes.PRODUCTS_BY_ID and read is nodes.argument(consumer, 3, "expert_ids"):
        return nodes.argument(consumer, 1, "B")
    if name == nodes.OUR_EXPERTS and read is nodes.argument(consumer, 1, "topk_ids"):
        return nodes.argument(consumer, 4, "down")
    return None


def _classify_index(consumer: Node, read: Node, source: Node | None, num_experts: int) -> tuple[Use, bool]:
    """`source[ids]`: stacked expert weights, one number per expert, or something else."""
    root = nodes.parameter_root(source) if source is not None else None
    sizes = nodes.shape(source) if source is not None else None
    computed = root is None and source is not None and is_computed_stack(source, num_experts)
    if (root is None and not computed) or sizes is None or len(nodes.index_tensors(consumer)) > 1:
        return Use(consumer, read, UseKind.UNKNOWN), reaches_experts(consumer, num_experts)
    if len(sizes) == 1 and not scales_experts(consumer):
        return Use(consumer, read, UseKind.LOOK_UP), False
    # A table with one vector a row may be expert biases or any embedding: no evidence by itself.
    return Use(consumer, read, UseKind.EXPERT_INDEX), is_stack(sizes, num_experts) and is_multiplied(consumer)


def _reads_scores(consumer: Node, read: Node, projection: Node) -> bool:
    """Whether the ids pick numbers of the router's projection along the last dimension.

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
    pending, seen, width = [source], {source}, sizes[-1]
    while pending:
        node = pending.pop()
        if node is projection:
            return True
        whole = cut_from(node)  # the columns of a router that has further ones
        sources = [whole] if whole is not None else [s for s in nodes.operands(node) if nodes.last_size(s) == width]
        width = nodes.last_size(whole) if whole is not None else width
        fresh = [source for source in sources if source not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return False


class Leaving:
    """Whether the result of a node is returned from its graph; computed once, when first asked."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._live: set[Node] = set()

    def __call__(self, node: Node) -> bool:
        """Whether some path leads from the node to the graph's output."""
        if not self._live:
            for other in reversed(self._graph.nodes):
                if other.op == "output" or any(follower in self._live for follower in nodes.followers(other)):
                    self._live.add(other)
        return node in self._live
