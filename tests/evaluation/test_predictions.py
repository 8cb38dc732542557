"""What predictions of single tokens say beyond perplexity, against counting by hand and against sampling."""

from __future__ import annotations

import math

import pytest
import torch

from sere_compile.errors import EvaluationError
from sere_compile.evaluation.predictions import Predictions, total_overlap

# Three sequences of four predictions; the last sequence begins with padding.
LOSSES = torch.tensor([[0.5, 1.0, 2.0, 4.0], [0.25, 0.25, 8.0, 0.5], [9.0, 1.0, 1.0, 1.0]])
RIGHT = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]]).bool()
COUNTED = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()


@pytest.fixture
def found():
    return Predictions(LOSSES, RIGHT, COUNTED)


def test_from_log_probabilities():
    """Position t predicts token t + 1."""
    tokens = torch.tensor([[3, 1, 2, 0], [0, 0, 1, 3]])
    scores = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    found = Predictions.of(scores, tokens, torch.ones(2, 3, dtype=torch.bool))
    for row in range(2):
        for place in range(3):
            token = tokens[row, place + 1]
            assert found.losses[row, place] == -scores[row, place, token]
            assert found.right[row, place] == (scores[row, place].argmax() == token)
    assert found.losses.dtype == torch.float32


def test_means_of_what_counts(found):
    assert found.loss == pytest.approx((16.5 + 3.0) / 11)
    assert found.accuracy == pytest.approx(8 / 11)


@pytest.mark.parametrize(("share", "tokens"), [(0.05, 1), (0.1, 1), (0.2, 2), (0.5, 6), (1.0, 11)])
def test_the_worst_tokens(found, share, tokens):
    """Padding's 9 is none of them; of few tokens one is the worst share."""
    ordered = sorted([*LOSSES[0].tolist(), *LOSSES[1].tolist(), 1.0, 1.0, 1.0], reverse=True)
    assert found.worst_loss(share) == pytest.approx(sum(ordered[:tokens]) / tokens)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01])
def test_a_share_that_is_none(found, share):
    with pytest.raises(EvaluationError, match=r"share: expected a number in \(0, 1\]"):
        found.worst_loss(share)


def test_greedy_continuations(found):
    """Of two tokens: right at places (0, 0), (1, 0), (2, 1), (2, 2), of 8 that count."""
    assert found.greedy_match(2) == pytest.approx(4 / 8)
    assert found.greedy_match(1) == pytest.approx(found.accuracy)
    assert found.greedy_match(4) == 0


@pytest.mark.parametrize("samples", [1, 4])
def test_sampled_continuations(found, samples):
    runs = [LOSSES[row, place : place + 2].sum() for row in range(3) for place in range(row // 2, 3)]
    expected = sum(1 - (1 - math.exp(-run)) ** samples for run in runs) / len(runs)
    assert found.sampled_match(samples, 2) == pytest.approx(expected)


def test_sampling_agrees():
    """Continuations that are drawn begin with the text's tokens as often as is said."""
    generator = torch.Generator().manual_seed(1)
    chances = torch.tensor([0.6, 0.5])
    found = Predictions(-chances.log()[None], torch.ones(1, 2).bool(), torch.ones(1, 2).bool())
    hits = (torch.rand(40000, 3, 2, generator=generator) < chances).all(-1).any(-1).float().mean()
    assert found.sampled_match(3, 2) == pytest.approx(hits.item(), abs=0.01)


def test_what_is_certain():
    sure = Predictions(torch.zeros(1, 3), torch.ones(1, 3).bool(), torch.ones(1, 3).bool())
    assert sure.sampled_match(16, 3) == pytest.approx(1)
    assert sure.greedy_match(3) == 1
    never = Predictions(torch.full((1, 3), float("inf")), torch.zeros(1, 3).bool(), torch.ones(1, 3).bool())
    assert never.sampled_match(16, 3) == 0


def test_runs_that_no_place_has(found):
    assert found.has_runs(4)
    assert not found.has_runs(5)
    assert not found.has_runs(0)
    assert not found.rows(torch.tensor([2])).has_runs(4)
    for call in (found.greedy_match, lambda length: found.sampled_match(16, length)):
        with pytest.raises(EvaluationError, match="length: no place of the text has 5 tokens"):
            call(5)
    with pytest.raises(EvaluationError, match="samples: expected at least 1, got 0"):
        found.sampled_match(0, 2)


def test_some_sequences(found):
    assert found.rows(torch.tensor([True, False, False])).loss == pytest.approx(7.5 / 4)
    both = Predictions.joined([found.rows(torch.tensor([2])), found.rows(torch.tensor([0, 1]))])
    assert both.losses.tolist() == LOSSES[[2, 0, 1]].tolist()
    assert both.right.tolist() == RIGHT[[2, 0, 1]].tolist()
    assert both.counted.tolist() == COUNTED[[2, 0, 1]].tolist()


def test_what_distributions_share():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    q = torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]])
    assert total_overlap(p.log(), q.log()) == pytest.approx(0.5 + 1)
    assert math.isnan(total_overlap(torch.tensor([[math.nan]]), torch.tensor([[0.0]])))
