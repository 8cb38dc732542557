"""How far two values are apart."""

import pytest
import torch

from sere_compile.passes.proof.compare import distance


def test_rounding_is_no_difference():
    left = torch.rand(5) + 1
    assert distance(left, left + 1e-6, exact=False) is None
    assert distance(left, left + 1e-2, exact=False) is not None


@pytest.mark.parametrize(
    "got", [torch.ones(3) + 1e-6, torch.ones(2), torch.ones(3).double(), torch.tensor([1.0, float("nan"), 1.0]), 1]
)
def test_what_differs(got):
    """A bit, a shape, a type, a NaN, no tensor at all."""
    assert distance(torch.ones(3), got, exact=True) is not None


def test_the_same_nan_is_the_same():
    value = torch.tensor([float("nan"), float("inf"), 1.0])
    assert distance(value, value.clone(), exact=True) is None
