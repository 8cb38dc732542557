"""Routing rules on random decisions of one gate."""

from __future__ import annotations

import pytest
import torch

from sere_compile.evaluation import Drop, Fill, Recombine, Reroute, RoutingBatch, TopS, rules
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


@pytest.mark.parametrize("min_active", [0, 9])
@pytest.mark.parametrize("max_active", [1, 7, 10])
def test_a_budget_of_experts(max_active, min_active):
    """`select_top_k="auto"`, against the oracle on every routing batch alone."""
    batch = decisions()
    ids, _ = Reroute(matrices(), 1, 0.0, min_active, max_active)(batch)
    for position in range(P):
        expected = reroute_oracle(
            batch.ids[position], matrices()["gate"], 1, min_active=min_active, max_active=max_active
        )
        assert torch.equal(ids[position], expected)


def test_an_expert_that_is_as_similar_as_the_threshold_moves():
    """At rho it moves, below it stays; so does one that no primary expert is comparable to."""
    ids = torch.tensor([[[0, 1], [0, 2], [0, 3], [0, 4]]])
    matrix = torch.eye(6)
    matrix[1, 0], matrix[2, 0] = 0.5, 0.25
    matrix[3, 0], matrix[4, 0] = float("nan"), float("-inf")
    batch = RoutingBatch("gate", ids, torch.rand(1, 4, 2), torch.rand(1, 4, 6), torch.ones(1, 4, dtype=torch.bool))
    for threshold, moved in ((0.5, [0, 2, 3, 4]), (0.0, [0, 0, 3, 4]), (-1.0, [0, 0, 3, 4])):
        assert Reroute({"gate": matrix}, 1, threshold, 0)(batch)[0][0, :, 1].tolist() == moved


def test_slots_of_no_expert():
    """They stay, activate nothing, and are scaled by nothing."""
    ids = torch.tensor([[[0, -1], [6, 1], [2, 3]]])
    weights = torch.rand(1, 3, 2) + 0.1
    batch = RoutingBatch("gate", ids, weights, torch.rand(1, 3, 6), torch.ones(1, 3, dtype=torch.bool))
    assert active_experts(batch, ids, weights).tolist() == [4]
    assert active_experts(batch, ids, weights * (ids != 2)).tolist() == [3]
    matrix = torch.full((6, 6), 0.1)
    matrix[3, 2] = matrix[1, 2] = 0.9
    new_ids, new = Reroute({"gate": matrix}, 1, min_active=0, scale={"gate": torch.full((6, 6), 3.0)})(batch)
    assert new_ids.tolist() == [[[0, -1], [6, 2], [2, 2]]]
    torch.testing.assert_close(new, weights * torch.tensor([[1.0, 1.0], [1.0, 3.0], [1.0, 3.0]]))
    assert Drop(1, min_active=0)(batch)[1][0, 0, 1] == 0
    assert primary_experts(batch, 1, 0).tolist() == [[True, False, True, False, False, False]]


def test_weights_of_rules_by_hand():
    """One token: [0.5, 0.3, 0.2], S = 1, a second token whose first expert is the first one's third."""
    ids, weights = torch.tensor([[[0, 1, 2], [2, 3, 1]]]), torch.tensor([[[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]])
    scores = torch.tensor([[[0.5, 0.3, 0.2, 0.0], [0.0, 0.1, 0.6, 0.3]]])
    batch = RoutingBatch("gate", ids, weights, scores, torch.ones(1, 2, dtype=torch.bool))

    def is_close(rule, expected_ids, expected):
        got_ids, got = rule(batch)
        assert got_ids[0].tolist() == expected_ids
        torch.testing.assert_close(got[0], torch.tensor(expected), rtol=1e-5, atol=1e-6)

    is_close(TopS(1), ids[0].tolist(), [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    is_close(Drop(1, min_active=0), ids[0].tolist(), [[0.5, 0.0, 0.2], [0.6, 0.0, 0.0]])
    is_close(Drop(1, True, 0), ids[0].tolist(), [[0.5 / 0.7, 0.0, 0.2 / 0.7], [1.0, 0.0, 0.0]])
    filled, given = Fill(1, 0)(batch)
    assert filled[0, :, :2].tolist() == [[0, 2], [2, 0]]
    torch.testing.assert_close(given[0], torch.tensor([[5 / 7, 2 / 7, 0.0], [1.0, 0.0, 0.0]]))


def test_fill_ranks_by_what_the_gate_selected_by():
    """A choice of its own, such as scores with a bias; experts that it closes stay closed."""
    ids, weights = torch.tensor([[[0, 1], [2, 3]]]), torch.tensor([[[0.6, 0.4], [0.7, 0.3]]])
    scores = torch.tensor([[[0.6, 0.4, 0.3, 0.0], [0.1, 0.2, 0.7, 0.3]]])
    choice = torch.tensor([[[0.1, 0.4, 0.9, 0.0], [float("-inf"), 0.2, 0.7, 0.3]]])
    batch = RoutingBatch("gate", ids, weights, scores, torch.ones(1, 2, dtype=torch.bool), choice)
    filled, given = Fill(1, 0)(batch)
    assert filled[0, 0].tolist() == [2, 0]
    torch.testing.assert_close(given[0, 0], torch.tensor([1 / 3, 2 / 3]))
    assert filled[0, 1, 0] == 2
    torch.testing.assert_close(given[0, 1], torch.tensor([1.0, 0.0]))


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


def test_numbers_of_no_expert_look_up_the_first_one():
    """Whatever they look up is not used: a place that is there will do."""
    batch = decisions()
    ids = torch.tensor([[-1, 0, E - 1, E, E + 3]])
    assert rules._safe(batch, ids).tolist() == [[0, 0, E - 1, 0, 0]]
    assert rules._in_range(ids, E).tolist() == [[False, True, True, False, False]]


def test_what_a_table_says_of_ids():
    table, ids = torch.tensor([[True, False, True]]), torch.tensor([[[0, 1], [2, 3], [-1, 0]]])
    assert rules._look_up(table, ids).tolist() == [[[True, False], [True, False], [False, True]]]
    numbers = torch.tensor([[5, 6, 7]])
    found = rules._look_up(numbers, ids.int(), default=ids.int())
    assert found.tolist() == [[[5, 6], [7, 3], [-1, 5]]]
    assert found.dtype == torch.int32


def test_weights_of_no_sum_stay():
    weights = torch.tensor([[0.5, 0.5], [0.25, 0.5]])
    new = torch.tensor([[0.0, 0.0], [0.5, 0.25]])
    assert rules._with_sum_of(weights, new).tolist() == [[0.0, 0.0], [0.5, 0.25]]
    assert rules._with_sum_of(weights, new * 2).tolist() == [[0.0, 0.0], [0.5, 0.25]]


def test_where_experts_go_in_each_batch():
    """To the most similar primary one, if that is similar enough; NaN is similar to nothing."""
    similarity = torch.tensor([[1.0, 0.5, 0.9], [float("nan"), 1, 0.4], [0.2, 0.3, 1]])
    primary = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert rules.expert_maps(similarity, primary, 0.0).tolist() == [[0, 1, 1], [0, 1, 0], [0, 1, 2]]
    assert rules.expert_maps(similarity, primary, 0.3).tolist() == [[0, 1, 1], [0, 1, 2], [0, 1, 2]]
    assert rules.expert_maps(similarity, primary, 0.31).tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert rules.expert_maps(similarity.to("meta"), primary.to("meta"), 0.1).device.type == "meta"
