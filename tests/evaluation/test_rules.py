"""Routing rules on random decisions of one gate."""

from __future__ import annotations

import pytest
import torch

from sere_compile import SimilarityProfile
from sere_compile.errors import EvaluationError
from sere_compile.evaluation import Drop, Fill, Recombine, Reroute, RoutingBatch, TopS
from sere_compile.evaluation.recombine import SUBSTITUTES, coefficient, gram_matrices, heaviest_experts, least_squares
from sere_compile.evaluation.routing import merge_slots
from sere_compile.evaluation.rules import active_experts, primary_experts
from sere_compile.testing import reroute_oracle

P, B, E, K = 7, 5, 12, 4


def decisions(seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(P, B, E, generator=generator).mul(2).softmax(-1)
    weights, ids = scores.topk(K, dim=-1)
    return RoutingBatch("gate", ids, weights, scores, torch.ones(P, B, dtype=torch.bool))


def matrices(seed=1):
    half = torch.rand(E, E, generator=torch.Generator().manual_seed(seed))
    return {"gate": ((half + half.T) / 2).fill_diagonal_(1)}


def gram_of(outputs):
    return {"gate": outputs @ outputs.T}


OUTPUTS_GRAM = gram_of(torch.randn(E, 20, generator=torch.Generator().manual_seed(4)))


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


def test_coefficients_are_least_squares():
    """Without ridge they are numpy's answer for every expert outside of the primary set."""
    outputs = torch.randn(E, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    primary = primary_experts(decisions(), 1, 0)
    found = least_squares(outputs @ outputs.T, primary, 0.0)
    for position in range(P):
        kept = primary[position]
        expected = torch.linalg.lstsq(outputs[kept].T, outputs[~kept].T).solution.T
        torch.testing.assert_close(found[position][~kept][:, kept], expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(found[position][kept], torch.eye(E, dtype=torch.float64)[kept])


@pytest.mark.parametrize("substitutes", ["one", "all"])
def test_recombine_of_a_twin_moves_its_weight_to_the_twin(substitutes):
    """Experts 2i and 2i + 1 are equal: nothing is lost wherever one of them is primary."""
    outputs = torch.randn(E // 2, 40, generator=torch.Generator().manual_seed(2)).repeat_interleave(2, 0)
    batch = decisions()
    ids, weights = Recombine(gram_of(outputs), 2, substitutes, 0.0, 0.0, False, ridge=1e-4, min_active=0)(batch)
    primary = primary_experts(batch, 2, 0)
    pairs = primary.view(P, -1, 2).any(-1).repeat_interleave(2, -1)
    covered = pairs.gather(1, batch.ids.flatten(1)).view(P, B, K).all(-1)
    before = (batch.weights[..., None] * outputs[batch.ids]).sum(2)
    after = (weights[..., None] * outputs[ids]).sum(2)
    assert covered.any()
    # Two twins that are both primary make the system singular but for the ridge.
    torch.testing.assert_close(after[covered], before[covered], atol=1e-2, rtol=0)


@pytest.mark.parametrize(("restore", "renormalise"), [(0.0, False), (1.0, True)])
def test_recombine_without_substitutes_and_fill_drops(restore, renormalise):
    """As `Drop` does, slot by slot but in another order."""
    batch = decisions()
    sums = [
        torch.zeros(P, B, E).scatter_add_(2, ids, weights)
        for ids, weights in (Recombine(None, 1, "none", 0.0, restore, False)(batch), Drop(1, renormalise)(batch))
    ]
    torch.testing.assert_close(*sums)


def test_fill_gives_the_token_its_next_choices():
    """At fill 1 an unchosen primary expert's weight is to the kept ones' as its score is to theirs."""
    batch = decisions()
    ids, weights = Recombine(None, 2, "none", 1.0, 0.0, False, min_active=0)(batch)
    worth = (weights / batch.scores.gather(2, ids))[weights != 0]
    expected = (batch.weights / batch.scores.gather(2, batch.ids))[..., :1].expand_as(weights)[weights != 0]
    torch.testing.assert_close(worth, expected)
    assert (weights != 0).sum() > Drop(2, min_active=0)(batch)[1].count_nonzero()


def test_the_heaviest_experts_are_as_many_as_the_primary_ones():
    spread = torch.tensor([[[0.1, 0.9, 0.0, 0.0], [0.2, 0.0, 0.8, 0.0]]])
    primary = torch.tensor([[True, True, False, False]])
    assert heaviest_experts(spread, primary).tolist() == [[False, True, True, False]]


def test_padding_weighs_nothing():
    """Rows that are padding do not choose the experts that are kept."""
    batch = decisions()
    real = torch.ones(P, B, dtype=torch.bool)
    real[:, 2:] = False
    rule = Recombine(OUTPUTS_GRAM, 1, "one", min_active=0)
    padded = RoutingBatch("gate", batch.ids, batch.weights, batch.scores, real)
    alone = RoutingBatch("gate", batch.ids[:, :2], batch.weights[:, :2], batch.scores[:, :2], real[:, :2])
    for whole, part in zip(rule(padded), rule(alone), strict=True):
        torch.testing.assert_close(whole[:, :2], part)


def test_inner_products_come_back_from_projections():
    """Up to a factor, where some experts are orthogonal and one gives nothing."""
    outputs = torch.randn(E, 40, generator=torch.Generator().manual_seed(6))
    outputs[3] = 0
    outputs[5, 20:] = 0
    outputs[7, :20] = 0
    gram = outputs @ outputs.T
    gram[5, 7] = gram[7, 5] = 0
    profile = SimilarityProfile({"gate": torch.eye(E)}, None, {"gate": coefficient(gram)})
    found = gram_matrices(profile)["gate"]
    torch.testing.assert_close(found / found.trace(), gram / gram.trace(), atol=1e-6, rtol=1e-4)
    with pytest.raises(EvaluationError, match="no projection coefficients"):
        gram_matrices(SimilarityProfile({"gate": torch.eye(E)}))


def test_unknown_substitutes_are_an_error():
    with pytest.raises(EvaluationError, match="substitutes must be one of none, one, all, got 'two'"):
        Recombine(OUTPUTS_GRAM, 1, "two")
    with pytest.raises(EvaluationError, match="needs inner products"):
        Recombine(None, 1, "one")


def test_the_square_root_restores_half_of_the_sum():
    """Between sums as they come and sums as they were, on a logarithmic scale."""
    batch = decisions()
    free, half, full = (Recombine(None, 1, restore=r)(batch)[1].sum(-1) for r in (0.0, 0.5, 1.0))
    torch.testing.assert_close(full, batch.weights.sum(-1))
    torch.testing.assert_close(half, (free * full).sqrt())
    assert (free - full).abs().max() > 0.1


def test_merged_slots_give_the_same_sum_without_repeats():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (50, K), generator=generator)
    weights = torch.rand(50, K, generator=generator)
    new_ids, new_weights = merge_slots(ids, weights, E)
    sums = [torch.zeros(50, E).scatter_add_(1, i, w) for i, w in ((ids, weights), (new_ids, new_weights))]
    torch.testing.assert_close(sums[0], sums[1])
    assert all(len(set(row)) == K for row in new_ids.tolist())
