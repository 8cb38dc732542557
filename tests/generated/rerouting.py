"""The map from experts to experts that re-routing defines, in plain Python."""

from __future__ import annotations


def expert_map(
    ids: list[list[int]], similarity: list[list[float]], select_top_k: int, threshold: float = 0.0
) -> list[int]:
    """Which expert stands in for each expert.

    Args:
        ids: for each token its experts, best first; ids outside [0, E) are no experts.
        similarity: [E][E].
        select_top_k: S.
        threshold: rho.

    Returns:
        m, with m[u] == u for whoever keeps its own.
    """
    count = len(similarity)
    identity = list(range(count))
    if not ids or not 0 < select_top_k < len(ids[0]):
        return identity
    primary = {u for token in ids for u in token[:select_top_k] if 0 <= u < count}
    used = {u for token in ids for u in token if 0 <= u < count}
    result = identity
    for u in used - primary:
        if not primary:
            continue
        best = max(sorted(primary), key=lambda v: similarity[u][v])  # max keeps the first of equals
        if not (threshold > 0 and similarity[u][best] < threshold):
            result[u] = best
    return result
