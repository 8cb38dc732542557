"""Every form in which a graph selects the best of the scores in its last dimension.

    topk(scores, K)                                          "top-k"
    topk(scores, K + 1), columns [:K] of both results        "top-k", narrowed
    argsort(-scores), columns [:K]                           "sort", best first as well
    sort(scores, descending) or argsort, columns [:K]        "sort"
    argmax(scores, -1) or max(scores, -1) with its indices   "max", K = 1
    max > mask what it chose > max > ..., concatenated       "steps", K columns

What is selected is judged elsewhere: this file only says what the ids are, in order of rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch.fx import Graph, Node

from ..gate import Evidence, Skip, SkipReason, Use
from ..graph import nodes
from ..graph.columns import columns_of, constant
from ..graph.walk import walk
from .token_places import drops_tokens

# What computes logits: nothing of one router's selection lies behind it.
_PROJECTING = frozenset({"linear", "matmul", "addmm", "bmm", "baddbmm", "einsum", "cdist"})
_ALIKE = 12  # operations behind two masks that are compared


@dataclass(frozen=True)
class Selection:
    """One selection over the last dimension.

    Attributes:
        node: the operation; the first of them where several select one expert each.
        form: "top-k", "sort", "max" or "steps".
        scores: [..., E], what is selected from.
        top_k: K.
        ids: the nodes that hold the selected indices [..., K], best first; of form "max" [...] or
            [..., 1].
        values: the nodes that hold the selected scores.
        is_sorted: whether descending order is promised.
        smallest: whether the smallest are selected.
        steps: of form "steps", the ids [..., 1] that each step chose.
        unnarrowed: ids before columns were cut off or a mask put numbers in place of some; their
            other consumers keep them.
    """

    node: Node
    form: str
    scores: Node
    top_k: int
    ids: tuple[Node, ...]
    values: tuple[Node, ...]
    is_sorted: bool = True
    smallest: bool = False
    steps: tuple[Node, ...] = ()
    unnarrowed: tuple[Node, ...] = ()


def find_selections(graph: Graph) -> list[Selection | Skip]:
    """Every selection in graph order; a `Skip` for one whose sizes or dimension rule it out."""
    found: list[Selection | Skip] = []
    for node in graph.nodes:
        name = nodes.kind(node)
        if name == "topk":
            found.append(_top_k(node))
        elif name in ("sort", "argsort"):
            found += _sorted(node, name)
        elif name in ("max", "argmax"):
            found += _maximum(node, name)
    return _join_steps(found)


def _top_k(node: Node) -> Selection | Skip:
    scores = nodes.operand(node)
    top_k = nodes.argument(node, 1, "k")
    dim = nodes.argument(node, 2, "dim", -1)
    sizes = nodes.shape(scores) if scores is not None else None
    if scores is None or not sizes or not isinstance(top_k, int) or not isinstance(sizes[-1], int):
        return Skip(SkipReason.SIZE_UNKNOWN, node, f"scores {sizes}, k {top_k}")
    if dim not in (-1, len(sizes) - 1):
        return Skip(SkipReason.NOT_LAST_DIM, node, f"dim {dim} of {sizes}")
    return _refined(
        Selection(
            node,
            "top-k",
            scores,
            top_k,
            tuple(ids for ids in nodes.picked(node, 1) if ids.users),
            tuple(nodes.picked(node, 0)),
            is_sorted=bool(nodes.argument(node, 4, "sorted", True)),
            smallest=not nodes.argument(node, 3, "largest", True),
        )
    )


def _sorted(node: Node, name: str) -> Iterable[Selection | Skip]:
    """A sort is a selection only if the first columns of its order are used and nothing else of it."""
    scores = nodes.operand(node)
    size = nodes.last_size(scores) if scores is not None else None
    dim = nodes.argument(node, 1, "dim", -1)
    if scores is None or size is None or not nodes.is_floating(scores) or not _is_last(dim, scores):
        return
    ids = (node,) if name == "argsort" else tuple(n for n in nodes.picked(node, 1) if n.users)
    if not nodes.argument(node, 2, "descending", False) and any(_takes_last(i, size) for i in ids):
        yield Skip(SkipReason.ASCENDING, node, nodes.place(node), evidence=Evidence.ROUTER)
        return
    cut = _cut_columns(ids, size)
    if not cut or nodes.last_size(cut[0]) in (None, size):
        return
    values = () if name == "argsort" else tuple(nodes.picked(node, 0))
    # A sort in ascending order puts the best last; only the other way is a ranking, unless the scores are negated.
    smallest = not nodes.argument(node, 2, "descending", False)
    if smallest and nodes.kind(scores) == "neg" and not any(value.users for value in values):
        negated = nodes.operand(scores)
        scores, smallest = (scores, True) if negated is None else (negated, False)
    top_k = nodes.last_size(cut[0])
    assert top_k is not None
    yield Selection(node, "sort", scores, top_k, cut, values, smallest=smallest, unnarrowed=ids)


def _takes_last(ids: Node, size: int) -> bool:
    """Whether the last columns of the order are used, or the order is turned round."""
    cut = [columns_of(user, ids) for user in ids.users]
    return any(part is not None and part[0] > 0 and part[1] == size for part in cut) or any(
        nodes.kind(user) == "flip" for user in ids.users
    )


def _maximum(node: Node, name: str) -> Iterable[Selection | Skip]:
    """`max` and `argmax` along the last dimension, where the index is used."""
    scores = nodes.operand(node)
    dim = nodes.argument(node, 1, "dim")
    if scores is None or not isinstance(dim, int) or nodes.last_size(scores) is None:
        return
    if not _is_last(dim, scores) or not nodes.is_floating(scores):
        return
    ids = (node,) if name == "argmax" else tuple(n for n in nodes.picked(node, 1) if n.users)
    if any(n.users for n in ids):
        values = () if name == "argmax" else tuple(nodes.picked(node, 0))
        yield Selection(node, "max", scores, 1, ids, values)


def _is_last(dim: object, scores: Node) -> bool:
    return dim in (-1, len(nodes.shape(scores) or ()) - 1)


def _refined(selection: Selection) -> Selection:
    """The selection with ids as consumers take them: first columns only."""
    cut = _cut_columns(selection.ids, selection.top_k)
    if not cut or cut == selection.ids:
        return selection
    width = nodes.last_size(cut[0])
    assert width is not None
    return replace(selection, ids=cut, top_k=width, unnarrowed=selection.unnarrowed + selection.ids)


def with_marked_padding(selection: Selection, uses: Iterable[Use]) -> Selection | None:
    """The selection with ids in which a mask put one number, `where(real, ids, -1)` or `masked_fill(ids, padding, 0)`.

    Where all that is dispatched reads those, what padding chose makes no primary experts. A number
    of no expert is the mark that counts. Where there is none, an expert that padding is sent to is
    one that the dispatch reads.

    Args:
        selection: with ids that mark nothing.
        uses: of its ids.

    Returns:
        None where the dispatch reads ids that mark nothing.
    """
    columns = nodes.last_size(selection.scores)
    marked = {_masked(use.read, selection.ids, columns) for use in uses if use.kind.dispatches}
    found = sorted(node for node in marked if node is not None)
    # Two sets of experts may each mask the ids that they get.
    if not found or None in marked or not all(_computes_the_same(found[0], other) for other in found[1:]):
        return None
    return replace(selection, ids=tuple(found), unnarrowed=selection.unnarrowed + selection.ids)


def _computes_the_same(left: Any, right: Any, steps: int = _ALIKE) -> bool:
    """Whether two arguments are the same, or are computed of the same by the same operations."""
    if not isinstance(left, Node) or not isinstance(right, Node):
        return type(left) is type(right) and left == right
    if left is right:
        return True
    if steps == 0 or (left.op, left.target) != (right.op, right.target) or left.op == "placeholder":
        return False
    name = nodes.kind(left)
    if "rand" in name or name in ("bernoulli", "dropout", "multinomial", "normal"):
        return False
    if nodes.writers(left) or nodes.writers(right) or left.kwargs.keys() != right.kwargs.keys():
        return False
    pairs = [*zip(left.args, right.args, strict=False), *((left.kwargs[n], right.kwargs[n]) for n in left.kwargs)]
    return len(left.args) == len(right.args) and all(_computes_the_same(a, b, steps - 1) for a, b in pairs)


def _cut_columns(ids: tuple[Node, ...], width: int) -> tuple[Node, ...]:
    """The nodes with the first columns of the ids, if only look-ups read the others."""
    cuts = [user for node in ids for user in node.users if columns_of(user, node) is not None]
    if _read_otherwise(ids, cuts):
        return ()
    ranges = {columns_of(user, nodes.operand(user)) for user in cuts}  # type: ignore[arg-type]
    if len(ranges) != 1:
        return ()
    bounds = ranges.pop()
    if bounds is None or bounds[0] != 0 or not 0 < bounds[1] < width:
        return ()
    return tuple(cuts)


def _masked(read: Node, ids: tuple[Node, ...], columns: int | None) -> Node | None:
    """The mask between the ids and a view or copy of them: the first that marks, else the last that sends elsewhere."""
    marking: list[Node] = []
    sending: list[Node] = []
    node = read
    while node not in ids:
        source = nodes.slot_source(node)
        if source is None:
            return None
        number = _masked_with(node, source) if nodes.same_shape(node, ids[0]) else None
        if number is not None and (number < 0 or (columns is not None and number >= columns)):
            marking.append(node)
        elif number is not None and not _is_read_off(node, source, ids):
            sending.append(node)
        node = source
    return marking[-1] if marking else next(iter(sending), None)


def _read_otherwise(ids: tuple[Node, ...], known: list[Node]) -> bool:
    """Whether other consumers than the known ones and gathers (classified later) read the ids."""
    others = [user for node in ids for user in node.users if user not in known and nodes.reads_numbers(user, node)]
    return any(nodes.kind(user) not in ("gather", "take_along_dim") for user in others)


def _masked_with(user: Node, ids: Node) -> int | float | None:
    """The number that a user puts in place of some ids."""
    if nodes.writes(user) or not nodes.same_shape(user, ids):
        return None
    match nodes.kind(user):
        case "masked_fill" if nodes.operand(user) is ids:
            return constant(nodes.argument(user, 2, "value"))
        case "where" if nodes.argument(user, 1, "self", user.kwargs.get("input")) is ids:
            return constant(nodes.argument(user, 2, "other"))
        case _:
            return None


def _is_read_off(user: Node, source: Node, ids: tuple[Node, ...]) -> bool:
    """Whether a mask is computed of the ids: it clears numbers that are no experts', such as those from E on."""
    masks = [node for node in user.all_input_nodes if node is not source]
    return any(node in ids for node in walk(masks, lambda node: [n for n in node.all_input_nodes if ids[0] <= n]))


def _join_steps(found: list[Selection | Skip]) -> list[Selection | Skip]:
    """Join selections of one expert each whose ids are concatenated; refuse steps that stay apart."""
    single = {s.node: s for s in found if isinstance(s, Selection) and s.top_k == 1}
    if len(single) < 2:
        return found
    owner = {view: s for s in single.values() for view in _views(s.ids)}
    joined: dict[Node, Selection | Skip] = {}
    taken: set[Node] = set()
    for cat in dict.fromkeys(user for view in owner for user in view.users):
        parts = _concatenated(cat)
        if len(parts) < 2 or not all(part in owner for part in parts):
            continue
        steps = [owner[part] for part in parts]
        if len({s.node for s in steps}) < len(steps):
            continue
        taken.update(s.node for s in steps)
        joined[min(s.node for s in steps)] = _steps(steps, cat)
    for later in single.values():
        earlier = [s for s in single.values() if s.node < later.node and s.node not in taken]
        before = next((s for s in earlier if _depends(later.scores, s.ids)), None)
        if later.node not in taken and before is not None:
            for step in (before, later):
                joined[step.node] = _apart(step, f"{before.node.name}, {later.node.name}")
            taken |= {before.node, later.node}
    kept = (joined.get(s.node, s) for s in found if s.node in joined or s.node not in taken)
    return list(kept)


def _apart(step: Selection, names: str) -> Skip:
    """A step whose id is never put together with those of the others."""
    dropping = any(drops_tokens(user) for view in _views(step.ids) for user in view.users)
    return Skip(SkipReason.CAPACITY if dropping else SkipReason.STEPS, step.node, names, evidence=Evidence.DISPATCH)


def _steps(steps: list[Selection], cat: Node) -> Selection | Skip:
    for before, after in pairwise(steps):
        if not _depends(after.scores, before.ids):
            return Skip(
                SkipReason.STEPS, cat, f"{after.node.name} does not follow {before.node.name}", evidence=Evidence.IDS
            )
    first = steps[0]
    columns = tuple(node for step in steps for node in step.ids)
    return Selection(first.node, "steps", first.scores, len(steps), (cat,), (), steps=columns)


def _views(ids: tuple[Node, ...]) -> list[Node]:
    found, pending = list(ids), list(ids)
    while pending:
        node = pending.pop()
        fresh = [u for u in node.users if nodes.kind(u) in nodes.VALUE_PRESERVING and nodes.operand(u) is node]
        found += fresh
        pending += fresh
    return found


def _concatenated(node: Node) -> list[Node]:
    """The parts of a concatenation or stack along the last dimension."""
    if nodes.kind(node) not in ("cat", "concat", "concatenate", "stack") or not node.args:
        return []
    parts = node.args[0]
    rank = len(nodes.shape(node) or ())
    if not isinstance(parts, (list, tuple)) or nodes.argument(node, 1, "dim", 0) not in (-1, rank - 1):
        return []
    return [part for part in parts if isinstance(part, Node)]


def _depends(scores: Node, ids: tuple[Node, ...]) -> bool:
    """Whether a later step's scores were made, in the shape of scores, with an earlier one's ids."""
    width, views = nodes.last_size(scores), set(_views(ids))

    def sources(node: Node) -> list[Node]:
        if nodes.kind(node) in _PROJECTING:
            return []
        return [*node.all_input_nodes, *(writer for writer in nodes.writers(node) if writer < scores)]

    made_of = walk([scores], lambda node: [source for source in sources(node) if nodes.last_size(source) == width])
    return any(source in views for node in made_of for source in sources(node))
