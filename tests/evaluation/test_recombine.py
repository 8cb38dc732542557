"""Rules that recombine experts' outputs, on random decisions of one gate."""

from __future__ import annotations

import pytest
import torch

from sere_compile import SimilarityProfile
from sere_compile.errors import EvaluationError
from sere_compile.evaluation import Drop, Recombine, RoutingBatch
from sere_compile.evaluation.recombine import coefficient, explained, gram_matrices, heaviest_experts, least_squares
from sere_compile.evaluation.rules import primary_experts

from .decisions import OUTPUTS_GRAM, B, E, K, P, decisions, gram_of


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


@pytest.mark.parametrize("restore", [0.5, 1.0])
def test_a_token_that_loses_all_its_experts_has_no_weight(restore):
    """There is no sum that could be given back: zeros, not NaN."""
    batch = decisions()
    rule = Recombine(OUTPUTS_GRAM, 1, "none", 0.0, restore, heaviest=False, min_active=0)
    real = batch.real.clone()
    real[:, 1:] = False  # only what the first token names is kept
    _, weights = rule(RoutingBatch("gate", batch.ids, batch.weights, batch.scores, real))
    assert bool((weights == 0).all(-1).any())
    assert weights.isfinite().all()


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


def test_inner_products_are_those_of_the_outputs():
    """From coefficients, up to a factor: of outputs of one length they are the cosines."""
    outputs = torch.nn.functional.normalize(torch.randn(E, 20, generator=torch.Generator().manual_seed(8)), dim=-1)
    gram = outputs @ outputs.T
    profile = SimilarityProfile({"gate": gram}, projections={"gate": gram / gram.diagonal()[:, None]})
    torch.testing.assert_close(gram_matrices(profile)["gate"], gram, atol=1e-4, rtol=0)


def test_without_substitutes_what_is_dropped_adds_nothing():
    batch = decisions()
    ids, weights = Recombine(OUTPUTS_GRAM, 1, "none", 0.0, 0.0, False, min_active=0)(batch)
    kept = primary_experts(batch, 1, 0)
    named = kept[:, None, :].expand(P, B, E).gather(2, ids)
    assert (weights[~named] == 0).all()
    assert weights.sum() < batch.weights.sum()


class TestByHand:
    def test_the_first_of_equal_experts_is_the_heaviest(self):
        """Over both tokens; a stable order, of many experts too."""
        spread = torch.zeros(1, 2, 40)
        spread[0, :, 30] = 0.5
        primary = torch.zeros(1, 40, dtype=torch.bool)
        primary[0, [5, 7, 9]] = True
        assert heaviest_experts(spread, primary).nonzero()[:, 1].tolist() == [0, 1, 30]

    def test_outputs_that_are_zero_explain_nothing(self):
        gram = torch.tensor([[4.0, 2.0, 0.0], [2.0, 9.0, 0.0], [0.0, 0.0, 0.0]])
        assert coefficient(gram).tolist() == [[1.0, pytest.approx(2 / 9), 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]
        third = pytest.approx(1 / 3)
        assert explained(gram).tolist() == [[1.0, third, 0.0], [third, 1.0, 0.0], [0.0] * 3]
        rounded = torch.tensor([[-1e-9, 0.5], [0.5, 1.0]])
        assert explained(rounded)[0].tolist() == [0.0, 0.0]

    def test_small_outputs_are_ranked_by_their_size(self):
        """Of what is mixed the largest parts are kept: a weight times the norm of the expert's output."""
        gram = torch.diag(torch.tensor([0.01, 0.09, 0.04, 0.25]))
        scores = torch.tensor([[[0.5, 0.2, 0.2, 0.1]]])
        weights, ids = scores.topk(4)
        batch = RoutingBatch("gate", ids, weights, scores, torch.ones(1, 1, dtype=torch.bool))
        rule = Recombine({"gate": gram}, 3, "none", 0.0, 0.0, False, min_active=0)
        found, new = rule(batch)
        sizes = {0: 0.05, 1: 0.06, 2: 0.04}
        named = [e for e, w in zip(found.flatten().tolist(), new.flatten().tolist(), strict=True) if w]
        assert named == sorted(named, key=lambda e: -sizes[e])

    def test_experts_that_give_nothing_have_no_inner_products(self):
        projections = {"gate": torch.diag(torch.tensor([1.0, 0.0]))}
        found = gram_matrices(SimilarityProfile({"gate": torch.eye(2)}, None, projections))
        assert found["gate"].tolist() == [[1.0, 0.0], [0.0, 0.0]]
        assert found["gate"].dtype == torch.float32
