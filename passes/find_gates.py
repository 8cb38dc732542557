"""Find MoE gates by dataflow: from a selection back to a router weight and forward to the experts.

A gate is a top-k over the last dimension of scores that a weight projected, whose ids reach expert weights:

    logits  = linear(hidden, router_weight)         # [T, E]     evidence behind
    values, ids = topk(scoring(logits), K)          # [T, K]     the selection
    ... experts_weight[ids] / sort(ids) -> grouped_mm(.., experts_weight) / output          evidence ahead

Both sides are needed. Everything else that looks like a top-k is refused with a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Graph, GraphModule, Node

from . import nodes
from .classify_uses import classify_uses
from .gate import Gate, Skip, SkipReason, UseKind
from .routing_weights import find_routing_weights

# Operations that keep one score per expert on their way from the projection to the selection.
_SCORING = frozenset({"softmax", "log_softmax", "sigmoid", "softplus", "tanh", "sqrt", "exp"})
_SCORE_PRESERVING = (
    _SCORING
    | nodes.VALUE_PRESERVING
    | {"add", "sub", "mul", "div", "clamp", "masked_fill", "where", "nan_to_num", "slice", "dropout", "neg"}
)
_PROJECTIONS = {"linear": 1, "matmul": 1, "addmm": 2, "bmm": 1, "einsum": 2}

# Decides whether ids that leave the graph go to experts, from the router's weight node and E. Graphs alone
# cannot tell an expert loop behind a graph break from a sampler that returns token ids.
OutsideEvidence = Callable[[Node, int], bool]


@dataclass(frozen=True)
class Findings:
    """Gates in graph order, and every selection that is no gate with the reason."""

    gates: tuple[Gate, ...]
    skips: tuple[Skip, ...]

    @property
    def nearest_miss(self) -> Skip | None:
        """The refused selection that looked most like a gate."""
        return max(self.skips, key=lambda skip: skip.evidence, default=None)


def find_gates(module: GraphModule, experts_outside: OutsideEvidence = lambda weight, num_experts: False) -> Findings:
    """Find every MoE gate of a traced graph.

    Args:
        module: a graph from Dynamo, torch.export, make_fx or symbolic_trace, with recorded shapes.
        experts_outside: see `OutsideEvidence`; by default ids that only leave the graph are no gate.

    Returns:
        The gates, and a `Skip` for each selection that is none.
    """
    gates: list[Gate] = []
    skips: list[Skip] = []
    for node in module.graph.nodes:
        if nodes.kind(node) == "topk":
            found = _examine(node, experts_outside)
            (gates if isinstance(found, Gate) else skips).append(found)  # type: ignore[arg-type]
    return Findings(tuple(gates), tuple(skips))


def _examine(selection: Node, experts_outside: OutsideEvidence) -> Gate | Skip:
    scores = nodes.operand(selection)
    top_k = nodes.argument(selection, 1, "k")
    dim = nodes.argument(selection, 2, "dim", -1)
    sizes = nodes.shape(scores) if scores is not None else None
    if scores is None or not sizes or not isinstance(top_k, int) or not isinstance(sizes[-1], int):
        return Skip(SkipReason.SIZE_UNKNOWN, selection, f"scores {sizes}, k {top_k}")
    if dim not in (-1, len(sizes) - 1):
        return Skip(SkipReason.NOT_LAST_DIM, selection, f"dim {dim} of {sizes}")
    if not nodes.argument(selection, 3, "largest", True):
        return Skip(SkipReason.SMALLEST, selection)

    router = _trace_router(scores, sizes[-1])
    if isinstance(router, Skip):
        return router
    values, ids = _results(selection)
    if ids is None or not ids.users:
        return Skip(SkipReason.NO_IDS, selection, evidence=2)
    uses = classify_uses(ids, router.projection, sizes[-1])
    missing = _missing_experts(selection, uses, router.weight, sizes[-1], experts_outside)
    if missing is not None:
        return missing
    weights = find_routing_weights(ids, values, uses)
    return Gate(
        selection=selection,
        ids=ids,
        values=values,
        router_weight=router.weight,
        num_experts=sizes[-1],
        top_k=top_k,
        scoring=router.scoring,
        is_sorted=bool(nodes.argument(selection, 4, "sorted", True)),
        uses=tuple(use for use, _ in uses),
        weights=weights if isinstance(weights, Node) else None,
        weights_skip=weights if isinstance(weights, Skip) else None,
    )


def _missing_experts(selection, uses, weight: Node, num_experts: int, experts_outside: OutsideEvidence) -> Skip | None:  # type: ignore[no-untyped-def]
    """None when some dispatch use is known to reach experts, else the refusal."""
    dispatches = [(use, reaches) for use, reaches in uses if use.kind.dispatches]
    if any(reaches for _, reaches in dispatches):
        return None
    if any(use.kind is UseKind.LEAVES for use, _ in dispatches) and experts_outside(weight, num_experts):
        return None
    seen = ", ".join(sorted({f"{nodes.kind(use.consumer)}: {use.kind.value}" for use, _ in uses}))
    return Skip(SkipReason.NO_DISPATCH, selection, f"ids are used by {seen}", evidence=3)


def _results(selection: Node) -> tuple[Node | None, Node | None]:
    """The nodes that pick values and ids out of a top-k."""
    picked: dict[int, Node] = {}
    for user in selection.users:
        if nodes.kind(user) == "item":
            picked.setdefault(user.args[1] % 2, user)  # type: ignore[operator]
        elif nodes.raw_name(user) == "getattr":
            picked.setdefault(0 if user.args[1] == "values" else 1, user)
    return picked.get(0), picked.get(1)


@dataclass(frozen=True)
class _Router:
    projection: Node
    weight: Node
    scoring: str


def _trace_router(scores: Node, num_experts: int) -> _Router | Skip:
    """Walk from the scores back to the projection that made them."""
    found: dict[Node, Node] = {}
    scoring: list[str] = []
    stops: list[Node] = []
    pending, seen = [scores], {scores}
    while pending:
        node = pending.pop()
        name = nodes.kind(node)
        if name in _PROJECTIONS:
            weight = _projection_weight(node, _PROJECTIONS[name])
            if weight is not None:
                found[node] = weight
            else:
                stops.append(node)
            continue
        if name not in _SCORE_PRESERVING:
            stops.append(node)
            continue
        if name in _SCORING:
            scoring.insert(0, name)
        for source in nodes.operands(node):
            if source not in seen and nodes.last_size(source) not in (None, 1):
                seen.add(source)
                pending.append(source)
    if not found:
        computed = [stop for stop in stops if stop.op not in ("placeholder", "get_attr")] or stops
        at = f"stopped at {computed[0].name}, a {nodes.kind(computed[0])}" if computed else ""
        return Skip(SkipReason.NO_ROUTER, scores, at, evidence=1)
    if len(set(found.values())) > 1:
        names = ", ".join(weight.name for weight in found.values())
        return Skip(SkipReason.AMBIGUOUS_ROUTER, scores, names, evidence=1)
    projection, weight = next(iter(found.items()))
    if nodes.last_size(projection) != num_experts:
        detail = f"{nodes.last_size(projection)} columns, {num_experts} scores"
        return Skip(SkipReason.ROUTER_SIZE, projection, detail, evidence=2)
    return _Router(projection, weight, " + ".join(scoring) or "raw logits")


def _projection_weight(projection: Node, position: int) -> Node | None:
    """The graph input that a projection multiplies by, when it is a matrix with one row or column an expert."""
    candidates = [projection.args[position]] if position < len(projection.args) else []
    candidates.append(projection.kwargs.get("weight"))
    for candidate in candidates:
        root = nodes.parameter_root(candidate) if isinstance(candidate, Node) else None
        sizes = nodes.shape(root) if root is not None else None
        if sizes is not None and len(sizes) == 2 and nodes.last_size(projection) in sizes:
            return root
    return None


def graph_inputs(graph: Graph) -> list[Node]:
    """The placeholders in order."""
    return list(graph.find_nodes(op="placeholder"))
