"""The evaluator's rule is the operator, batch by batch."""

from __future__ import annotations

import dataclasses

import torch

from sere_compile import SereConfig
from sere_compile.evaluation.configured import ConfiguredRule
from sere_compile.evaluation.rules import RoutingBatch
from sere_compile.ops import fill


def test_evaluator_uses_the_same_rule():
    """`ConfiguredRule` needs no matrix, and batches are as the operator's."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 5, 16, generator=generator).softmax(-1)
    weights, ids = scores.topk(4)
    batch = RoutingBatch("gate", ids, weights, scores, torch.ones(6, 5, dtype=torch.bool))
    rule = ConfiguredRule(SereConfig(select_top_k=1, substitution="fill"), {})
    new_ids, new = rule(batch)
    for p in range(6):
        alone = fill(ids[p], weights[p], scores[p], 1, 0.0, 4)
        assert torch.equal(new_ids[p], alone[0])
        torch.testing.assert_close(new[p], alone[1])
    few = dataclasses.replace(rule, config=SereConfig(select_top_k="auto", max_active=5, substitution="fill"))
    assert all(len(row.unique()) <= 5 for row in few(batch)[0])
