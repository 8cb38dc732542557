"""Find the routing weights in the form in which the dispatch consumes them.

Merging duplicate slots changes ids and weights together, so it has to happen on the weights' last
form with one number per slot: after normalising, scaling and casting, before they meet expert
outputs or leave the graph.
"""

from __future__ import annotations

from torch.fx import Node

from ..gate import Evidence, Skip, SkipReason, Use, UseKind
from ..graph import nodes
from ..graph.columns import columns_of
from ..graph.walk import walk

_BENDING = frozenset({"softmax", "log_softmax", "sigmoid", "tanh", "exp", "sqrt", "softplus", "log", "pow"}) | {
    "logsigmoid",
    "log_sigmoid",
}
_ELEMENTWISE = nodes.VALUE_PRESERVING | _BENDING | {"mul", "div", "add", "sub"}
_JOINS = frozenset({"cat", "concat", "concatenate"})
_MOVES_ROWS = nodes.VALUE_PRESERVING | {
    "index",
    "repeat",
    "repeat_interleave",
    "transpose",
    "permute",
    "slice",
    "select",
}
_PRODUCTS = frozenset({"linear", "matmul", "bmm", "addmm", "baddbmm", "einsum", "grouped_mm"})
_FAR = 100
_SELECTING = frozenset({"topk", "sort", "argsort", "argmax", "max"})
_REDUCTIONS = frozenset({"sum", "amax", "max", "mean", "norm"})


def find_routing_weights(ids: Node, values: list[Node], uses: list[Use], projection: Node) -> Node | Skip:
    """The one tensor shaped like the ids, made from the selected scores, that later code consumes."""
    again = _scores_read_again(ids, uses, projection)
    if again is not None:
        detail = nodes.place(again)
        return Skip(SkipReason.SCORES_BY_ID, again, detail, evidence=Evidence.DISPATCH)
    starts = _starts(values, uses)
    chain = _slot_shaped(starts, ids)
    consumed = [node for node in chain if nodes.same_shape(node, ids) and _outer_consumers(node, chain)]
    if not consumed:
        return Skip(SkipReason.NO_WEIGHTS, ids, nodes.place(ids), evidence=Evidence.DISPATCH)
    if len(consumed) > 1:
        return Skip(SkipReason.AMBIGUOUS_WEIGHTS, ids, ", ".join(n.name for n in consumed), evidence=Evidence.DISPATCH)
    return _refused(consumed[0], ids, projection) or consumed[0]


def _starts(values: list[Node], uses: list[Use]) -> list[Node]:
    """The selected scores, and what look-ups by the ids give."""
    starts = [value for value in values if value.users]
    starts += [use.consumer for use in uses if use.kind is UseKind.LOOK_UP]
    return [start for start in starts if nodes.is_floating(start)]


def weigh_a_product(ids: Node, values: list[Node], uses: list[Use]) -> bool:
    """Whether the selected scores are multiplied with more than one number per slot.

    Experts' outputs are weighed, or their inputs scaled. Documents, prompts and keys that indices
    fetch are not.
    """

    def ahead(node: Node) -> list[Node]:
        # Added to hidden states they are part of these from there on.
        added = [u for u in node.users if nodes.kind(u) in ("add", "sub") and not nodes.same_shape(u, node)]
        return [user for user in node.users if nodes.is_floating(user) and user not in added]

    def multiplies(user: Node, node: Node) -> bool:
        others = [source for source in nodes.operands(user) if source is not node]
        product = nodes.kind(user) in _PRODUCTS | {"mul"} and not nodes.same_shape(user, ids)
        return product and any(nodes.is_floating(other) and not _is_weight(other) for other in others)

    scores = walk(_starts(values, uses), ahead, _FAR)
    return any(multiplies(user, node) for node in scores for user in node.users)


def _refused(weights: Node, ids: Node, projection: Node) -> Skip | None:
    """A refusal where the sum of two slots' weights would not give the sum of two experts' outputs."""
    again = next((user for user in outer_consumers(weights, ids) if nodes.kind(user) in _SELECTING), None)
    if again is not None:
        return Skip(SkipReason.RESELECTED, again, nodes.place(again), evidence=Evidence.DISPATCH)
    columns = nodes.last_size(projection)
    hidden = {source for source in nodes.operands(projection) if not _is_weight(source)}
    pending, seen = outer_consumers(weights, ids), {weights}
    while pending:
        node = pending.pop()
        # A mask made of the weights (`weights > 0`) scales nothing.
        if node in seen or not nodes.is_floating(node):
            continue
        seen.add(node)
        if nodes.kind(node) in _BENDING:
            return Skip(SkipReason.BENT_WEIGHTS, node, nodes.place(node), evidence=Evidence.DISPATCH)
        others = [source for source in nodes.operands(node) if source not in seen]
        if nodes.kind(node) == "mul" and any(_rows_of(o, hidden) for o in others) and _enters_product(node):
            return Skip(SkipReason.SCALED_INPUT, node, nodes.place(node), evidence=Evidence.DISPATCH)
        moved = nodes.kind(node) in nodes.VALUE_PRESERVING | _JOINS | {
            "transpose",
            "permute",
            "slice",
            "select",
            "index",
        }
        if moved or nodes.last_size(node) == columns:
            pending.extend(nodes.followers(node))
    return None


def _rows_of(node: Node, hidden: set[Node]) -> bool:
    """Whether a tensor holds rows of the hidden states that were routed, however arranged."""
    known = {root for source in hidden for root in _rearranged_from(source)}
    return any(source in known for source in _rearranged_from(node))


def _rearranged_from(node: Node) -> list[Node]:
    """The node and what it is a view, copy, repetition or choice of rows of."""
    chain = [node]
    while nodes.kind(chain[-1]) in _MOVES_ROWS and (source := nodes.operand(chain[-1])) is not None:
        chain.append(source)
    return chain


def _enters_product(node: Node) -> bool:
    """Whether a tensor is multiplied by a matrix before anything else is done to it."""
    moved = walk([node], lambda seen: [user for user in seen.users if nodes.kind(user) in _MOVES_ROWS - _PRODUCTS])
    return any(nodes.kind(user) in _PRODUCTS for seen in moved for user in seen.users)


def _scores_read_again(ids: Node, uses: list[Use], projection: Node) -> Node | None:
    """The first node where something made from dispatched ids meets the scores of the same tokens.

    There the weights of a token depend on the ids themselves (`probs * mask`), so new ids would
    choose new weights. Uses that keep slots apart cannot; the others are followed up to the first
    weight that they meet.
    """
    look_ups = {use.consumer for use in uses if use.kind is UseKind.LOOK_UP}

    def is_score(user: Node) -> bool:
        rows = nodes.last_size(user) == nodes.last_size(projection) and nodes.is_floating(user)
        return rows and nodes.leading_count(user) == nodes.leading_count(ids) and user not in look_ups

    def scores_of(node: Node) -> list[Node]:
        return [user for user in node.users if is_score(user) and nodes.reads_numbers(user, node)]

    scores = set(walk([projection], scores_of))
    unsafe = [use.consumer for use in uses if use.kind.dispatches and not use.kind.sums_duplicates]
    # Behind the last reader of the scores nothing can meet them: the rest of a deep model is not
    # walked.
    last = max((user for node in scores for user in node.users if user.op != "output"), default=projection)
    seen, pending = set(unsafe), list(unsafe)
    met: list[Node] = []
    while pending:
        node = pending.pop()
        if node.op == "output" or last < node:
            continue
        if any(source in scores and source not in seen for source in node.all_input_nodes):
            met.append(node)
        elif not any(_is_weight(source) for source in node.all_input_nodes):
            fresh = [follower for follower in nodes.followers(node) if follower not in seen]
            seen.update(fresh)
            pending.extend(fresh)
    return min(met, default=None)


def _is_weight(node: Node) -> bool:
    root = nodes.parameter_root(node)
    return root is not None and nodes.is_model_state(root) and nodes.is_floating(root)


def _slot_shaped(starts: list[Node], ids: Node) -> dict[Node, None]:
    """Everything computed from `starts` with one number per slot, or one per token to scale by."""
    chain = dict.fromkeys(starts)
    pending = list(starts)
    # More scores than ids: columns are cut off later.
    wide = [s for s in starts if (nodes.last_size(s) or 0) > (nodes.last_size(ids) or 0)]
    while pending:
        node = pending.pop()
        for user in nodes.elementwise_users(node):
            if _appends_columns(user, node):
                wide.append(user)
            elementwise = nodes.kind(user) in _ELEMENTWISE or nodes.first_result(user) is not None
            keeps = _keeps_slots(user, ids) or (
                (elementwise or user in wide) and any(nodes.same_shape(user, start) for start in wide)
            )
            keeps = keeps and (columns_of(user, node) or (0, 0))[0] == 0
            if user not in chain and user.op != "output" and keeps:
                chain[user] = None
                pending.append(user)
    return chain


def _appends_columns(node: Node, slots: Node) -> bool:
    """Whether further columns (a shared expert's score) are put behind those of the slots."""
    parts = node.args[0] if nodes.kind(node) in _JOINS and node.args else ()
    if not isinstance(parts, (list, tuple)) or not parts or parts[0] is not slots or slots in parts[1:]:
        return False
    return nodes.argument(node, 1, "dim", 0) in (-1, len(nodes.shape(node) or ()) - 1)


def _keeps_slots(node: Node, ids: Node) -> bool:
    if nodes.same_shape(node, ids):
        return nodes.is_floating(node)
    per_token = nodes.last_size(node) == 1 or nodes.kind(node) in _REDUCTIONS
    # A reduction that is used for anything else than scaling the weights would not end in slot
    # shape.
    return per_token and bool(node.users) and all(_keeps_slots(user, ids) for user in node.users)


def _outer_consumers(node: Node, chain: dict[Node, None]) -> list[Node]:
    users = [user for user in node.users if not any(nodes.first_result(item) is user for item in chain)]
    return [user for user in users if user not in chain and nodes.reads_numbers(user, node)]


def outer_consumers(weights: Node, ids: Node) -> list[Node]:
    """The consumers of the routing weights that lie behind their last slot-shaped form."""
    return _outer_consumers(weights, _slot_shaped([weights], ids))
