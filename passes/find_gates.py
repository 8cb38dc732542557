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

from torch.fx import GraphModule, Node

from . import nodes
from .classify_uses import classify_uses
from .gate import Gate, Skip, SkipReason, Use, UseKind
from .routing_weights import find_routing_weights

# Operations that keep one score per expert on their way from the projection to the selection.
_SCORING = frozenset({"softmax", "log_softmax", "sigmoid", "softplus", "tanh", "sqrt", "exp"})
_SCORE_PRESERVING = (
    _SCORING
    | nodes.VALUE_PRESERVING
    | {"add", "sub", "mul", "div", "clamp", "masked_fill", "where", "nan_to_num", "slice", "dropout", "neg"}
)
_REROUTING = frozenset({"sere.reroute", "sere.reroute_merged"})
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
            if isinstance(found, Gate):
                gates.append(found)
            else:
                skips.append(found)
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
    values, all_ids = nodes.picked(selection, 0), [ids for ids in nodes.picked(selection, 1) if ids.users]
    if not all_ids:
        return Skip(SkipReason.NO_IDS, selection, evidence=2)
    uses = [use for ids in all_ids for use in classify_uses(ids, router.projection, sizes[-1])]
    done = next((use.consumer for use, _ in uses if nodes.kind(use.consumer) in _REROUTING), None)
    if done is not None:
        return Skip(SkipReason.REWRITTEN, selection, f"by {done.name}", evidence=6)
    missing = _missing_experts(selection, uses, router.weight, sizes[-1], experts_outside)
    if missing is not None:
        return missing
    weights = find_routing_weights(all_ids[0], values, uses, router.projection)
    return Gate(
        selection=selection,
        ids=all_ids[0],
        values=next((node for node in values if node.users), None),
        router_weight=router.weight,
        router_input=router.hidden,
        num_experts=sizes[-1],
        top_k=top_k,
        scoring=router.scoring,
        is_sorted=bool(nodes.argument(selection, 4, "sorted", True)),
        uses=tuple(use for use, _ in uses),
        weights=weights if isinstance(weights, Node) else None,
        weights_skip=weights if isinstance(weights, Skip) else None,
    )


def _missing_experts(
    selection: Node,
    uses: list[tuple[Use, bool]],
    weight: Node,
    num_experts: int,
    experts_outside: OutsideEvidence,
) -> Skip | None:
    """None when some dispatch use is known to reach experts, else the refusal."""
    dispatches = [(use, reaches) for use, reaches in uses if use.kind.dispatches]
    if any(reaches for _, reaches in dispatches):
        return None
    if any(use.kind is UseKind.LEAVES for use, _ in dispatches) and experts_outside(weight, num_experts):
        return None
    seen = ", ".join(sorted({f"{nodes.kind(use.consumer)}: {use.kind.value}" for use, _ in uses}))
    return Skip(SkipReason.NO_DISPATCH, selection, f"ids are used by {seen}", evidence=3)


@dataclass(frozen=True)
class _Router:
    projection: Node
    hidden: Node
    weight: Node
    scoring: str


def _trace_router(scores: Node, num_experts: int) -> _Router | Skip:
    """Walk from the scores back to the projection that made them."""
    found: dict[Node, tuple[Node, Node]] = {}
    scoring: list[str] = []
    stops: list[Node] = []
    pending, seen = [scores], {scores}
    while pending:
        node = pending.pop()
        name = nodes.kind(node)
        if name in _PROJECTIONS:
            factors = _projection_factors(node, _PROJECTIONS[name])
            if factors is not None:
                found[node] = factors
            else:
                stops.append(node)
            continue
        same_order = nodes.only_moves_ones(node)
        if name not in _SCORE_PRESERVING and not same_order:
            stops.append(node)
            continue
        if name in _SCORING:
            scoring.insert(0, name)
        for source in nodes.operands(node):
            if source not in seen and (same_order or nodes.last_size(source) not in (None, 1)):
                seen.add(source)
                pending.append(source)
    if not found:
        computed = [stop for stop in stops if stop.op not in ("placeholder", "get_attr")] or stops
        at = f"stopped at {computed[0].name}, a {nodes.kind(computed[0])}" if computed else ""
        return Skip(SkipReason.NO_ROUTER, scores, at, evidence=1)
    weights = {weight for _, weight in found.values()}
    if len(weights) > 1:
        names = ", ".join(sorted(weight.name for weight in weights))
        return Skip(SkipReason.AMBIGUOUS_ROUTER, scores, names, evidence=1)
    projection, (hidden, weight) = next(iter(found.items()))
    if nodes.last_size(projection) != num_experts:
        detail = f"{nodes.last_size(projection)} columns, {num_experts} scores"
        return Skip(SkipReason.ROUTER_SIZE, projection, detail, evidence=2)
    return _Router(projection, hidden, weight, " + ".join(scoring) or "raw logits")


def _projection_factors(projection: Node, position: int) -> tuple[Node, Node] | None:
    """What is projected, and the graph input that it is multiplied by: a matrix with one row or column an expert."""
    arguments = list(projection.args)
    if nodes.kind(projection) == "einsum" and isinstance(arguments[1], (tuple, list)):
        arguments[1:] = arguments[1]
    hidden = arguments[position - 1] if position <= len(arguments) else projection.kwargs.get("input")
    candidates = [arguments[position]] if position < len(arguments) else []
    candidates.append(projection.kwargs.get("weight"))
    for candidate in candidates:
        root = nodes.parameter_root(candidate) if isinstance(candidate, Node) else None
        sizes = nodes.shape(root) if root is not None else None
        matches = sizes is not None and len(sizes) == 2 and nodes.last_size(projection) in sizes
        if matches and root is not None and isinstance(hidden, Node):
            return hidden, root
    return None
