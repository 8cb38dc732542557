"""Slots of one expert, merged."""

from __future__ import annotations

import torch

from sere_compile.evaluation.routing import merge_slots

from .decisions import E, K


def test_merged_slots_give_the_same_sum_without_repeats():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (50, K), generator=generator)
    weights = torch.rand(50, K, generator=generator)
    new_ids, new_weights = merge_slots(ids, weights, E)
    sums = [torch.zeros(50, E).scatter_add_(1, i, w) for i, w in ((ids, weights), (new_ids, new_weights))]
    torch.testing.assert_close(sums[0], sums[1])
    assert all(len(set(row)) == K for row in new_ids.tolist())
