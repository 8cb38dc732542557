"""Sums over forwards, and what is told of them, against the plain computation."""

from __future__ import annotations

import math

import pytest
import torch

from sere_compile.evaluation.predictions import Predictions
from sere_compile.evaluation.result import Evaluation, Totals, student, upper_bound

ROWS, LENGTH, WORDS, BATCH = 4, 5, 7, 2


def forward(seed, real=None):
    """Log-probabilities of two models, tokens, and which of them are real."""
    generator = torch.Generator().manual_seed(seed)
    original, changed = (torch.randn(ROWS, LENGTH, WORDS, generator=generator).mul(2).log_softmax(-1) for _ in range(2))
    tokens = torch.randint(0, WORDS, (ROWS, LENGTH), generator=generator)
    return original, changed, tokens, torch.ones(ROWS, LENGTH, dtype=torch.bool) if real is None else real


def left_padded():
    real = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    real[1, :2] = False
    real[2:, :1] = False
    return real


def predictions(parts):
    """Every prediction that counts: (its two distributions, the token, its decoding batch)."""
    for forward_number, (original, changed, tokens, real) in enumerate(parts):
        for row in range(ROWS):
            for position in range(LENGTH - 1):
                if real[row, position] and real[row, position + 1]:
                    yield (
                        original[row, position], changed[row, position], int(tokens[row, position + 1]),
                        (forward_number, row // BATCH),
                    )  # fmt: skip


def test_means_over_every_prediction():
    parts = [forward(0), forward(1, left_padded())]
    totals = Totals()
    for number, part in enumerate(parts):
        totals.add(*part, {"a": 20.0 + number, "b": 10.0}, {"a": 9.0, "b": 4.5 * (number + 1)}, BATCH)
    result = totals.result(BATCH)
    counted = list(predictions(parts))
    steps = 2 * LENGTH + LENGTH + (LENGTH - 1)  # a step in which no row has begun is none
    assert (result.tokens, result.decode_batch) == (len(counted), BATCH)
    losses = [[-float(p[word]) for p in (before, after)] for before, after, word, _ in counted]
    assert result.original_perplexity == pytest.approx(math.exp(sum(a for a, _ in losses) / len(counted)))
    assert result.perplexity == pytest.approx(math.exp(sum(b for _, b in losses) / len(counted)))
    divergence = sum(float((before.exp() * (before - after)).sum()) for before, after, _, _ in counted)
    assert result.kl == pytest.approx(divergence / len(counted), rel=1e-5)
    agreed = sum(int(before.argmax()) == int(after.argmax()) for before, after, _, _ in counted)
    assert 0 < agreed < len(counted)
    assert result.top1_agreement == agreed / len(counted)
    shared = sum(float(torch.minimum(before, after).exp().sum()) for before, after, _, _ in counted)
    assert result.sampled_agreement == pytest.approx(shared / len(counted), rel=1e-5)
    assert result.predictions.loss == pytest.approx(math.log(result.perplexity), rel=1e-5)
    assert result.original_predictions.loss == pytest.approx(math.log(result.original_perplexity), rel=1e-5)
    rows = [tokens.shape for _, _, tokens, _ in parts]
    assert result.predictions.losses.shape == (sum(r for r, _ in rows), LENGTH - 1)
    assert result.active_before == {"a": 41.0 / steps, "b": 20.0 / steps}
    assert result.active_after == {"a": 18.0 / steps, "b": 13.5 / steps}
    assert result.mean_active_before == pytest.approx(61.0 / steps / 2)
    assert result.mean_active_after == pytest.approx(31.5 / steps / 2)
    batches = sorted({batch for *_, batch in counted})
    for found, which in ((result.original_losses, 0), (result.losses, 1)):
        expected = []
        for batch in batches:
            mine = [pair[which] for pair, (*_, of) in zip(losses, counted, strict=True) if of == batch]
            expected.append(sum(mine) / len(mine))
        assert found == pytest.approx(tuple(expected))


def test_a_decoding_batch_without_a_prediction_has_no_loss():
    real = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    real[2:, 1:] = False
    totals = Totals()
    totals.add(*forward(0, real), {"a": 1.0}, {"a": 1.0}, BATCH)
    result = totals.result(BATCH)
    assert result.tokens == 2 * (LENGTH - 1)
    assert len(result.losses) == len(result.original_losses) == 1


@pytest.mark.parametrize(("batch", "steps"), [(1, 4 * LENGTH), (2, 2 * LENGTH), (4, LENGTH)])
def test_every_decoding_batch_has_its_own_steps(batch, steps):
    """Active experts are means over the steps of all of them."""
    totals = Totals()
    totals.add(*forward(0), {"a": 60.0}, {"a": 30.0}, batch)
    result = totals.result(batch)
    assert (result.active_before, result.active_after) == ({"a": 60.0 / steps}, {"a": 30.0 / steps})
    assert len(result.losses) == ROWS // batch


def evaluation(**changes):
    values = {
        "perplexity": 11.0, "original_perplexity": 10.0, "kl": 0.125, "top1_agreement": 0.9,
        "active_before": {"a": 8.0, "b": 6.0}, "active_after": {"a": 4.0, "b": 3.0}, "tokens": 5, "decode_batch": 16,
    }  # fmt: skip
    return Evaluation(**values | changes)


def test_change_and_its_standard_error():
    """That of the mean growth of the loss, over decoding batches."""
    assert evaluation().perplexity_change == pytest.approx(0.1)
    result = evaluation(losses=(1.0, 2.0, 4.0), original_losses=(1.0, 1.5, 2.0))
    growth = torch.tensor([0.0, 0.5, 2.0]).double()
    assert result.standard_error == pytest.approx(1.1 * float(growth.std()) / 3**0.5)
    two = evaluation(losses=(1.0, 2.0), original_losses=(1.0, 1.0))
    assert two.standard_error == pytest.approx(1.1 * 0.5**0.5 / 2**0.5)
    assert math.isnan(evaluation(losses=(1.0,), original_losses=(1.0,)).standard_error)
    assert math.isnan(evaluation().standard_error)


def test_what_is_printed():
    assert str(evaluation()) == (
        "perplexity 11.000 (+10.0% of 10.000), KL 0.1250, top-1 agreement 90.0%, active experts 7.0 -> 3.5 "
        "at decode batch 16"
    )


def told(losses, right):
    return Predictions(torch.tensor([losses]), torch.tensor([right]).bool(), torch.ones(1, len(losses)).bool())


def test_what_is_printed_beyond_perplexity():
    """Short continuations only where the text has any."""
    before, after = told([0.5, 0.5, 1.0], [1, 1, 0]), told([1.0, 1.0, 2.0], [1, 0, 0])
    result = evaluation(sampled_agreement=0.625, predictions=after, original_predictions=before)
    assert result.beyond_perplexity(samples=1, length=2) == [
        "next-token accuracy 66.7% -> 33.3%; sampled tokens that stay the same: 62.5%",
        "loss of the worst 5 % of tokens 1.00 -> 2.00 nats",
        "the text's next 2 tokens: greedily 50.0% -> 0.0%, in one of 1 samples 29.6% -> 9.3%",
    ]
    assert len(result.beyond_perplexity(length=4)) == 2
    assert evaluation().beyond_perplexity() == []
    assert evaluation(predictions=after).beyond_perplexity() == []


def test_quantiles_of_student():
    """One-sided, 95 %: as tables have them, and in the limit the normal distribution's."""
    table = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 8: 1.860, 10: 1.812, 30: 1.697, 10**6: 1.645}
    for degrees, quantile in table.items():
        assert student(degrees) == pytest.approx(quantile, abs=0.01)
    # The expansion's own terms.
    z = 1.6449
    assert student(5) == pytest.approx(z + (z**3 + z) / 20 + (5 * z**5 + 16 * z**3 + 3 * z) / 2400)


def test_what_a_change_is_below():
    assert math.isnan(upper_bound(0.5, 0.1, 1))
    assert upper_bound(0.5, 0.1, 2) == pytest.approx(0.5 + 0.6314)
    assert upper_bound(0.5, 0.1, 5) == pytest.approx(0.5 + 0.2132)
