"""Thresholds that mean the same for every gate: `"q0.2"`, the least similar 20 % of a gate's experts are critical.

Let b(u) be the similarity of expert u to the other expert that is most like it. `"qX"` resolves to
the least rho for which the round(X * E) experts of the smallest b have b(u) < rho: the b of the
next expert up. An expert stays when its best *primary* substitute is less similar than rho, so
those experts always stay, and others stay in batches whose primary experts are all unlike them.
Where experts are equally similar at the cut, none of them is cut off.

The number differs from gate to gate, but one compiled graph may serve many gates, with the
threshold as a constant in it. So the graph gets `RANKED_THRESHOLD`, and each gate a matrix of
ranks: re-routing only ever compares similarities with each other and with the threshold, and ranks
counted from the threshold answer both the same, exactly.
"""

from __future__ import annotations

import torch

from ..config import quantile

RANKED_THRESHOLD = 1.0


def threshold_in_graph(threshold: float | str) -> float:
    """The number that a graph compares with, for a threshold of any form."""
    return RANKED_THRESHOLD if isinstance(threshold, str) else float(threshold)


def matrix_in_graph(similarity: torch.Tensor, threshold: float | str) -> torch.Tensor:
    """The matrix [E, E] that a graph compares with `threshold_in_graph`: ranks for `"q0.2"`, else the similarity."""
    return ranked(similarity, resolve_threshold(threshold, similarity)) if isinstance(threshold, str) else similarity


def resolve_threshold(threshold: float | str, similarity: torch.Tensor) -> float:
    """The number rho that a threshold is for a gate with this similarity [E, E]; numbers are themselves.

    Raises:
        ConfigError: see `config.quantile`.
    """
    share = quantile(threshold)
    if share is None:
        return float(threshold)
    experts = similarity.shape[0]
    if experts == 1:
        return 0.0
    best = similarity.detach().float().clone().fill_diagonal_(float("-inf")).amax(1).sort().values
    return float(best[min(round(share * experts), experts - 1)])


def ranked(similarity: torch.Tensor, rho: float) -> torch.Tensor:
    """A matrix that re-routes with `RANKED_THRESHOLD` as `similarity` does with rho, also where rho is not positive.

    Args:
        similarity: finite [E, E], E up to 4096, so that ranks are exact in float32.
        rho: below it an expert is critical.

    Returns:
        float32 [E, E]: ranks of the distinct values, 1 for the first that is not below rho.
    """
    values, rank = torch.unique(similarity.float(), return_inverse=True)
    return (rank - (values < rho).sum() + 1).to(torch.float32)
