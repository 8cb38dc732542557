"""The evaluator's rule is the operator, batch by batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sere_compile import SereConfig
from sere_compile.evaluation.configured import ConfiguredRule
from sere_compile.evaluation.filling import FillKept
from sere_compile.evaluation.rules import RoutingBatch
from sere_compile.ops import fill

from ..ops.fill_oracle import fill_rows
from .decisions import K, P, decisions


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


@pytest.mark.parametrize(
    "options",
    [{}, {"threshold": 0.05}, {"min_active": 7}, {"max_active": 6}, {"max_active": 5, "min_active": 8}],
    ids=str,
)
@pytest.mark.parametrize("select", [1, 2])
def test_every_option_is_the_oracles(select, options):
    """With padding, and a choice of the gate's own."""
    batch = decisions()
    real = torch.ones(P, 5, dtype=torch.bool)
    real[:, 4] = False
    choice = batch.scores * torch.linspace(0.5, 2.0, batch.num_experts)
    weights, ids = choice.topk(K)
    batch = RoutingBatch("gate", ids, weights, batch.scores, real, choice)
    new_ids, new = FillKept(select, **options)(batch)
    assert not torch.equal(new_ids, ids)
    for p in range(P):
        rows = fill_rows(
            ids[p].tolist(), weights[p].tolist(), batch.scores[p].tolist(), select, real=real[p].tolist(),
            choice=choice[p].tolist(), **options,
        )  # fmt: skip
        assert new_ids[p].tolist() == rows[0]
        torch.testing.assert_close(new[p], torch.tensor(rows[1]), rtol=1e-4, atol=1e-6)


def test_scores_are_the_choice_where_there_is_none():
    batch = decisions()
    given = dataclasses.replace(batch, choice=batch.scores)
    for a, b in zip(FillKept(1)(batch), FillKept(1)(given), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("select", [0, K, K + 1])
def test_nothing_to_fill(select):
    batch = decisions()
    ids, weights = FillKept(select)(batch)
    assert ids is batch.ids
    assert weights is batch.weights
