"""MoE layers of other public code: S = K bit-equal, S < K equal to the oracle, or skipped with the right reason."""

import pytest
import torch

import sere_compile
from sere_compile import SereConfig

from ...thinned import thinned
from .loops import EXPERTS, HIDDEN, CountLoop, MaskLoop, RowLoop, SortedLoop, prepared
from .stacked import FairScale, GptFast, MakeMoe, MegaBlocks, Noisy, Picked, PickedTight, StMoe, TorchTitan

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

REROUTED = (MaskLoop, RowLoop, CountLoop, SortedLoop, GptFast, Noisy, TorchTitan, MegaBlocks, Picked)
# A place in an expert's buffer depends on the other tokens: re-routing would drop other ones.
CAPACITY = (StMoe, FairScale)


# Selected logits become weights behind the scatter: those of two slots cannot be merged. Buffers with less room
# than for all slots overflow where all are at one expert.
REFUSED = (MakeMoe, PickedTight)


def seeded(function, *arguments):
    """What it gives with the same random numbers each time."""
    torch.manual_seed(0)
    return function(*arguments)


@pytest.mark.parametrize("kind", thinned(REROUTED + REFUSED, range(0, len(REROUTED + REFUSED), 2)))
def test_s_equal_k_changes_no_bit(kind):
    model, _, x = prepared(kind)
    same = seeded(sere_compile.compile(model, select_top_k=8, inner="eager"), x)
    assert torch.equal(same, seeded(model, x))


@pytest.mark.parametrize("kind", thinned(REROUTED, range(1, len(REROUTED), 2)))
def test_s_below_k_equals_the_oracle(kind):
    """The sum over slots of w_k * expert_{new id_k}(x), whatever the dispatch does to duplicates."""
    model, matrix, x = prepared(kind)
    unchanged = seeded(model, x)
    torch.testing.assert_close(unchanged, seeded(model.expected, x, matrix, EXPERTS), rtol=1e-5, atol=1e-5)
    expected = seeded(model.expected, x, matrix, 1)
    assert not torch.allclose(expected, unchanged, atol=1e-2), "the case re-routes nothing"
    got = seeded(sere_compile.compile(model, select_top_k=1, inner="eager"), x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CAPACITY)
def test_capacity_is_left_alone(kind):
    """Nothing is re-routed, and `explain` says why."""
    model, _, x = prepared(kind)
    assert torch.equal(sere_compile.compile(model, select_top_k=1, inner="eager")(x), model(x))
    report = sere_compile.explain(model, x, config=SereConfig(select_top_k=1))
    assert not report.rewritten
    assert any("capacity" in row.reason for row in report), str(report)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_left_alone(kind):
    """The gate is known, and nothing of it is changed."""
    model, _, x = prepared(kind)
    assert torch.equal(sere_compile.compile(model, select_top_k=1, inner="eager")(x), model(x))


@pytest.mark.zoo
@pytest.mark.parametrize("kind", [MaskLoop, CountLoop])
def test_capture_with_inductor(kind):
    """Dynamic-shape capture, and the way back from it, with the compiler that is the default; other shapes later."""
    model, matrix, x = prepared(kind)
    compiled = sere_compile.compile(model, select_top_k=1)
    for rows in (x, torch.randn(3, 5, HIDDEN)):
        torch.testing.assert_close(compiled(rows), model.expected(rows, matrix, 1), rtol=1e-5, atol=1e-5)
