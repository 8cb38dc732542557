"""Thresholds as a share of experts, and ranks in place of similarities."""

from __future__ import annotations

import pytest
import torch

from sere_compile import ConfigError, SereConfig
from sere_compile.similarity.threshold import RANKED_THRESHOLD, ranked, resolve_threshold
from sere_compile.testing import reroute_oracle


@pytest.mark.parametrize(("share", "critical"), [("q0.2", 2), ("q0.25", 2), ("q.5", 4), ("q0.75", 6), ("q0.01", 0)])
def test_share_of_experts(share, critical):
    """The number makes exactly the least similar round(X * E) experts critical, whatever is primary."""
    half = torch.rand(8, 8, generator=torch.Generator().manual_seed(1))
    matrix = ((half + half.T) / 2).fill_diagonal_(1.0)
    best = matrix.clone().fill_diagonal_(-1).amax(1)
    below = best < resolve_threshold(share, matrix)
    assert int(below.sum()) == critical
    assert not critical or best[below].max() < best[~below].min()


def test_equally_similar_experts_stay_together():
    """Experts that tie at the cut are not cut off: which of them would go is arbitrary."""
    matrix = torch.full((6, 6), 0.5).fill_diagonal_(1.0)
    assert resolve_threshold("q0.5", matrix) == 0.5


@pytest.mark.parametrize("rho", [0.3, 0.0, -0.4])
def test_ranks_decide_as_similarities_do(rho):
    """Ties, targets and critical experts are those of the matrix itself, also with a rho that is not positive."""
    generator = torch.Generator().manual_seed(2)
    matrix = (torch.randint(-4, 5, (16, 16), generator=generator) / 5).fill_diagonal_(1.0)
    ranks = ranked(matrix, rho)
    for seed in range(20):
        ids = torch.stack([torch.randperm(16, generator=generator)[:4] for _ in range(5 + seed % 3)])
        got = torch.ops.sere.reroute.default(ids, ranks, 1, RANKED_THRESHOLD)
        shifted = reroute_oracle(ids, matrix + 1, 1, rho + 1)
        assert torch.equal(got, shifted)


@pytest.mark.parametrize("bad", ["0.2", "q0", "q1", "q1.5", "q", "qx", "q-0.1", "q0.2 "])
def test_text_of_another_form(bad):
    """Only shares between nought and one."""
    with pytest.raises(ConfigError, match="threshold must be a finite number, or a share"):
        SereConfig(threshold=bad)
