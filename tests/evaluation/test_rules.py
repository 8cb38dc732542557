"""Routing rules on random decisions of one gate."""

from __future__ import annotations

import pytest
import torch

from sere_compile.evaluation import Drop, Fill, Recombine, Reroute, RoutingBatch, TopS
from sere_compile.evaluation.recombine import SUBSTITUTES
from sere_compile.evaluation.rules import active_experts, primary_experts
from sere_compile.testing import reroute_oracle

from .decisions import OUTPUTS_GRAM, B, E, K, P, decisions, matrices


@pytest.mark.parametrize("threshold", [0.0, 0.7])
@pytest.mark.parametrize("min_active", [0, 4, 9, 100])
@pytest.mark.parametrize("select", [1, 2, 3, 4])
def test_reroute_is_sere_position_by_position(select, threshold, min_active):
    """The oracle of the operator, called for every routing batch alone."""
    batch = decisions()
    ids, weights = Reroute(matrices(), select, threshold, min_active)(batch)
    for position in range(P):
        expected = reroute_oracle(batch.ids[position], matrices()["gate"], select, threshold, min_active)
        assert torch.equal(ids[position], expected)
    assert torch.equal(weights, batch.weights)


@pytest.mark.parametrize("max_active", [1, 7, 10])
def test_a_budget_of_experts_is_the_operators(max_active):
    """`select_top_k="auto"`, against the operator on every routing batch alone."""
    batch = decisions()
    ids, _ = Reroute(matrices(), 1, 0.0, 0, max_active)(batch)
    for position in range(P):
        expected = torch.ops.sere.reroute(batch.ids[position], matrices()["gate"], 1, 0.0, 0, max_active=max_active)
        assert torch.equal(ids[position], expected)


def test_padding_rows_make_no_expert_active():
    batch = decisions()
    real = torch.ones(P, B, dtype=torch.bool)
    real[:, 2:] = False
    padded = RoutingBatch("gate", batch.ids, batch.weights, batch.scores, real)
    alone = RoutingBatch("gate", batch.ids[:, :2], batch.weights[:, :2], batch.scores[:, :2], real[:, :2])
    assert torch.equal(primary_experts(padded, 1, 0), primary_experts(alone, 1, 0))
    assert torch.equal(
        active_experts(padded, batch.ids, batch.weights), active_experts(alone, alone.ids, alone.weights)
    )


def test_projection_scales_moved_slots_only():
    batch = decisions()
    scale = {"gate": torch.rand(E, E, generator=torch.Generator().manual_seed(5))}
    ids, weights = Reroute(matrices(), 1, scale=scale, min_active=0)(batch)
    moved = ids != batch.ids
    assert moved.any()
    assert torch.equal(weights[~moved], batch.weights[~moved])
    torch.testing.assert_close(weights[moved], (batch.weights * scale["gate"][batch.ids, ids])[moved])


@pytest.mark.parametrize(
    "rule",
    [
        Drop(1),
        Drop(1, True),
        Fill(1),
        *(Recombine(OUTPUTS_GRAM, 1, how, fill, heaviest=False) for how in SUBSTITUTES for fill in (0.0, 0.5)),
    ],
)
def test_rules_keep_to_the_primary_set(rule):
    """Equal active experts is what makes rows of the table comparable."""
    batch = decisions()
    ids, weights = rule(batch)
    primary = primary_experts(batch, 1)
    used = torch.zeros(P, E).scatter_add_(1, ids.flatten(1), (weights != 0).float().flatten(1)) > 0
    assert not (used & ~primary).any()
    assert ids.shape == weights.shape == (P, B, K)


@pytest.mark.parametrize("rule", [TopS(1), Drop(1, True), Fill(1)])
def test_renormalised_rules_keep_the_sum_of_weights(rule):
    batch = decisions()
    torch.testing.assert_close(rule(batch)[1].sum(-1), batch.weights.sum(-1))


@pytest.mark.parametrize(
    "rule",
    [
        TopS(K),
        Drop(K),
        Fill(K),
        *(Recombine(OUTPUTS_GRAM, K, substitutes, heaviest=heavy) for substitutes in SUBSTITUTES for heavy in (0, 1)),
    ],
)
def test_all_slots_primary_is_the_identity(rule):
    batch = decisions()
    ids, weights = rule(batch)
    assert torch.equal(ids, batch.ids)
    assert torch.equal(weights, batch.weights)
