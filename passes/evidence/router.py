"""Walk from selected scores back to the projection by a router weight that made them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch.fx import Node

from ..gate import Evidence, Skip, SkipReason
from ..graph import nodes
from ..graph.columns import cut_from
from ..graph.walk import walk

# Operations that keep one score per expert on their way from the projection to the selection.
_SCORING = frozenset(
    {"softmax", "log_softmax", "sigmoid", "log_sigmoid", "logsigmoid", "softplus", "tanh", "sqrt", "exp"}
    | {"relu", "silu", "gelu", "pow", "square", "layer_norm", "rms_norm"}
)
# ... as decompositions name them.
_FIRST_RESULTS = {"log_sigmoid_forward": "logsigmoid", "native_layer_norm": "layer_norm", "native_dropout": "dropout"}
_SCORE_PRESERVING = (
    _SCORING
    | nodes.VALUE_PRESERVING
    | {"add", "sub", "mul", "div", "clamp", "masked_fill", "where", "nan_to_num", "dropout", "neg"}
)
_COLUMNS = frozenset({"slice", "narrow", "item"})
# How a distributed tensor is laid out over ranks.
_LAYOUTS = frozenset({"redistribute", "from_local"})
# What makes numbers at random.
_RANDOM = frozenset({"randn_like", "rand_like", "randn", "rand", "normal", "normal_functional", "bernoulli"})
_FACTOR_NODES = 24  # how much may be computed of a weight before it projects
_PROJECTIONS = {"linear": 1, "matmul": 1, "addmm": 2, "bmm": 1, "baddbmm": 2, "einsum": 2, "cdist": 1}


@dataclass(frozen=True)
class Router:
    """What makes the scores of a selection.

    Attributes:
        projection: the product of hidden states and weight; "cdist" where scores are distances to
            the weight's rows.
        hidden: what is projected, [..., H].
        weight: graph input or attribute, [columns, H] or [H, columns].
        scoring: the operations in between that shape the scores, in words.
        columns: how many columns were selected from, at most those of the projection.
    """

    projection: Node
    hidden: Node
    weight: Node
    scoring: str
    columns: int


def trace_router(scores: Node, columns: int) -> Router | Skip:
    """The router behind the scores [..., columns], or why there is none."""
    found: dict[Node, tuple[Node, Node]] = {}
    scoring: list[str] = []
    stops: list[Node] = []
    broadcast: list[Node] = []
    narrowed: set[int | None] = set()  # widths that were cut down to `columns`
    pending, noise, seen = [scores], list[Node](), {scores}  # what scales random numbers is noise beside a projection
    while pending or (noise and not found):
        node = pending.pop() if pending else noise.pop()
        first = nodes.first_result(node)
        node = node if first is None else first
        name = _FIRST_RESULTS.get(nodes.kind(node), nodes.kind(node))
        factors = _projection_factors(node, _PROJECTIONS[name]) if name in _PROJECTIONS else _written_out(node, name)
        factors = factors or _distributed(node, name)
        if factors is not None:
            found[node] = factors
            continue
        if name in _COLUMNS:
            source = cut_from(node)
            sources = [] if source is None else [source]
            if source is None:
                stops.append(node)
            elif nodes.last_size(node) == columns:
                narrowed.add(nodes.last_size(source))
        elif _turns(node) and (turned := nodes.operand(node)) is not None and _turns(turned):
            sources = [source for source in [nodes.operand(turned)] if source is not None]
        elif name in _SCORE_PRESERVING or nodes.only_moves_ones(node):
            same_order = nodes.only_moves_ones(node)
            sources = [s for s in nodes.operands(node) if same_order or nodes.last_size(s) not in (None, 1)]
            sources = sources if first is None else sources[:1]  # the others are a norm's own parameters
            broadcast += [source for source in nodes.operands(node) if source not in sources]
            if name in _SCORING:
                scoring.insert(0, name)
        else:
            stops.append(node)
            continue
        (noise if scales_random_numbers(node) else pending).extend(source for source in sources if source not in seen)
        seen.update(sources)
    if not found:
        return _no_router(scores, stops, broadcast)
    weights = {weight for _, weight in found.values()}
    if len(weights) > 1:
        names = ", ".join(sorted(weight.name for weight in weights))
        return Skip(SkipReason.AMBIGUOUS_ROUTER, scores, names, evidence=Evidence.SELECTION)
    projection, (hidden, weight) = next(iter(found.items()))
    width = nodes.last_size(projection)
    if width != columns and width not in narrowed:
        return Skip(SkipReason.ROUTER_SIZE, projection, f"{width} columns, {columns} scores", evidence=Evidence.ROUTER)
    return Router(projection, hidden, weight, " + ".join(scoring) or "raw logits", columns)


def scales_random_numbers(node: Node) -> bool:
    """Whether a node is random numbers times something, as noise is whose size a second projection gives."""
    return nodes.kind(node) == "mul" and any(map(_is_random, nodes.operands(node)))


def _is_random(node: Node) -> bool:
    return nodes.kind(nodes.behind(node, nodes.VALUE_PRESERVING)) in _RANDOM


def _no_router(scores: Node, stops: list[Node], broadcast: list[Node]) -> Skip:
    behind = {stop: source for stop in stops + broadcast if (source := _selection_behind(stop)) is not None}
    if len(behind) > 1:
        names = ", ".join(sorted({source.name for source in behind.values()}))
        return Skip(SkipReason.PRODUCT_KEYS, scores, names, evidence=Evidence.SELECTION)
    if turned := next((stop for stop in stops if _has_columns_elsewhere(stop)), None):
        return Skip(SkipReason.EXPERT_CHOICE, scores, turned.name, evidence=Evidence.SELECTION)
    computed = [stop for stop in stops if stop.op not in ("placeholder", "get_attr")] or stops
    at = f"stopped at {computed[0].name}, a {nodes.kind(computed[0])}" if computed else ""
    return Skip(SkipReason.NO_ROUTER, scores, at, evidence=Evidence.SELECTION)


def _has_columns_elsewhere(stop: Node) -> bool:
    """Whether a router's scores were turned so that their columns, one per expert, come before the tokens."""
    source = nodes.operand(stop) if nodes.kind(stop) in ("transpose", "permute") else None
    columns = nodes.last_size(source) if source is not None else None
    return source is not None and columns is not None and isinstance(trace_router(source, columns), Router)


def _selection_behind(stop: Node) -> Node | None:
    """The top-k whose values the search stopped at, or a view of them."""
    seen: Node | None = nodes.behind(stop, nodes.VALUE_PRESERVING | {"slice", "select", "item", "unbind"})
    if seen is not None and nodes.raw_name(seen) == "getattr":
        seen = nodes.operand(seen)
    return seen if seen is not None and nodes.kind(seen) == "topk" else None


def _projection_factors(projection: Node, position: int) -> tuple[Node, Node] | None:
    """What is projected, and the weight: a matrix with one row or column per expert."""
    arguments = list(projection.args)
    if nodes.kind(projection) == "einsum" and isinstance(arguments[1], (tuple, list)):
        arguments[1:] = arguments[1]
    hidden = arguments[position - 1] if position <= len(arguments) else projection.kwargs.get("input")
    candidates = [arguments[position]] if position < len(arguments) else []
    candidates.append(projection.kwargs.get("weight"))
    for candidate in candidates:
        root = _made_of(candidate) if isinstance(candidate, Node) else None
        sizes = nodes.shape(root) if root is not None else None
        matches = sizes is not None and len(sizes) == 2 and nodes.last_size(projection) in sizes
        if matches and root is not None and isinstance(hidden, Node):
            return hidden, root
    return None


def _distributed(node: Node, name: str) -> tuple[Node, Node] | None:
    """What is projected, and the weight, of `to_local` of a product of distributed tensors.

    This rank's part of the product has all columns where it was laid out so; then it stands for the projection.
    """
    product = nodes.operand(node) if name == "to_local" else None
    product = None if product is None else nodes.behind(product, _LAYOUTS)
    position = None if product is None else _PROJECTIONS.get(nodes.kind(product))
    if product is None or position is None or nodes.shape(product) != nodes.shape(node):
        return None
    factors = _projection_factors(product, position)
    if factors is None:
        return None
    return nodes.behind(factors[0], _LAYOUTS), factors[1]


def _written_out(node: Node, name: str) -> tuple[Node, Node] | None:
    """What is projected, and the weight, of `(weight @ hidden.T).T` and `(hidden.unsqueeze(-2) * weight).sum(-1)`."""
    product = nodes.operand(node)
    sizes = nodes.shape(product) if product is not None else None
    if product is None or sizes is None or len(sizes) < 2:
        return None
    factors = [factor for factor in product.args[:2] if isinstance(factor, Node)]
    if len(factors) != 2:
        return None
    if _turns(node) and nodes.kind(product) == "matmul":
        if _turns(factors[1]):
            return _weight_and(factors[0], nodes.operand(factors[1]), sizes[0])
    elif name == "sum" and nodes.kind(product) == "mul" and _sums_last(node, len(sizes)):
        for weight, other in (factors, factors[::-1]):
            if nodes.kind(other) in nodes.VALUE_PRESERVING and nodes.shape(weight) == tuple(sizes[-2:]):
                return _weight_and(weight, nodes.operand(other), sizes[-2])
    return None


def _turns(node: Node) -> bool:
    """Whether a node is the transpose of a matrix, which make_fx permutes."""
    if len(nodes.shape(node) or ()) != 2:
        return False
    dims = node.args[1] if len(node.args) == 2 else node.args[1:]
    swapped = isinstance(dims, (list, tuple)) and list(dims) == [1, 0]
    return nodes.kind(node) == "transpose" or (nodes.kind(node) == "permute" and swapped)


def _sums_last(node: Node, rank: int) -> bool:
    dim = nodes.argument(node, 1, "dim")
    dims = list(dim) if isinstance(dim, (list, tuple)) else [dim]
    return dims in ([-1], [rank - 1]) and not nodes.argument(node, 2, "keepdim", False)


def _weight_and(weight: Node, hidden: Node | None, columns: object) -> tuple[Node, Node] | None:
    """The hidden states and the matrix [columns, H] behind a factor, or None where they do not fit."""
    root = _made_of(weight)
    if root is None or hidden is None or not nodes.is_model_state(root):
        return None
    return (hidden, root) if nodes.shape(root) == (columns, nodes.last_size(hidden)) else None


def _made_of(factor: Node) -> Node | None:
    """The graph input that a factor is a view of, or is computed from with other model state.

    Cosine routers normalise the weight, others scale or dequantise it, add a product of small matrices (LoRA), or
    multiply by a mask (pruned ones): the identity of the one that has the factor's sizes, or of the one parameter
    among those, still identifies the layer.
    """
    root = nodes.parameter_root(factor)
    if root is not None:
        return root
    # `weight.type_as(hidden)` reads no number of the hidden states.
    made_of = list(itertools.islice(walk([factor], nodes.numbers_behind), _FACTOR_NODES))
    inputs = [node for node in made_of if node.op in ("placeholder", "get_attr")]
    if len(made_of) == _FACTOR_NODES or not all(map(nodes.is_model_state, inputs)):
        return None
    # make_fx reads an attribute anew for each use.
    matrices = {n.target: n for n in inputs if nodes.is_floating(n) and len(nodes.shape(n) or ()) == 2}
    if len(matrices) > 1:
        sizes = sorted(map(str, nodes.shape(factor) or ()))
        matrices = {target: n for target, n in matrices.items() if sorted(map(str, nodes.shape(n) or ())) == sizes}
    if len(matrices) > 1:
        matrices = {target: n for target, n in matrices.items() if nodes.is_parameter(n)}
    return next(iter(matrices.values())) if len(matrices) == 1 else None
