"""Let `sere.route` re-route what it selects: one operator, and one launch where that is faster.

    routed = sere.route(logits, top_k=K, ..)         routed = sere.route(logits, top_k=K, .., similarity=similarity,
    weights, ids = routed[0], routed[1]        ->                        select_top_k=S, threshold=rho, ..)
    y = experts(ids, weights)                        weights, ids = routed[0], routed[1]
                                                     y = experts(ids, weights)

Takes the place of `reroute_dispatch` behind `fuse_router`. A gate whose ids are read by more than
the dispatch (case 1), or whose dispatch needs slots merged (case 2), is left to `reroute_dispatch`,
with a reason. Filling needs no merged slots: its ids stay distinct.
"""

from __future__ import annotations

from torch.fx import Node

from .fill_dispatch import fill_route
from .gate import Gate, Skip, SkipReason
from .graph import nodes
from .graph.arguments import update_operator_argument
from .reroute_dispatch import Rewrite, RoutingSettings


def fuse_reroute(
    gate: Gate, similarity: Node | None, settings: RoutingSettings, projection: Node | None = None
) -> Rewrite | Skip:
    """Re-route the ids of a gate within its `sere.route`, or fill its slots.

    Args:
        gate: from `fuse_router`.
        similarity: graph input or attribute holding the gate's [E, E] matrix; None: fill.
        settings: with 0 < S < K.
        projection: like `similarity`, float32 [E, E], the coefficients of weights.

    Returns:
        What was done, or why the graph is unchanged.
    """
    routed = gate.selection
    if nodes.kind(routed) != "sere.route":
        return Skip(SkipReason.NOT_FUSED, routed, nodes.place(routed))
    if similarity is not None and gate.needs_merge:
        return Skip(SkipReason.MERGES, routed, f"its dispatch: {gate.dispatch}")
    others = [use for use in gate.uses if use not in gate.dispatch_uses]
    if others:
        reader = others[0].consumer
        return Skip(SkipReason.READ_ELSEWHERE, reader, f"{reader.name} reads its ids as well")
    readers = [*gate.ids.users, *(gate.weights.users if gate.weights is not None else ())]
    writing = next((user for user in readers if nodes.writes(user)), None)
    if writing is not None:
        return Skip(SkipReason.SHARED_MEMORY, writing, f"{writing.name} writes to its ids or weights")
    matrices = [matrix for matrix in (similarity, projection) if matrix is not None]
    if any(not matrix < routed for matrix in matrices):
        return Skip(SkipReason.MATRIX_LATE, routed, nodes.place(routed))
    if similarity is None:
        fill_route(routed, settings)
        return Rewrite(gate, gate.ids, merged=False, filled=True)
    for name, value in {"similarity": similarity, **vars(settings), "projection": projection}.items():
        update_operator_argument(routed, name, value)
    return Rewrite(gate, gate.ids, merged=False)
