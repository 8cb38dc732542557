"""How far two values are apart."""

import pytest
import torch

from sere_compile.passes.proof.compare import changed_rows, distance, tolerance


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


def test_nothing_equals_nothing():
    """Of the same shape and type."""
    assert distance(torch.empty(0, 3), torch.empty(0, 3), exact=True) is None
    assert distance(torch.empty(0, 3), torch.empty(3, 0), exact=True) is not None


def test_the_same_nan_is_the_same():
    value = torch.tensor([float("nan"), float("inf"), 1.0])
    assert distance(value, value.clone(), exact=True) is None


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 5e-2)]
)
def test_rounding_is_relative_to_the_largest_number(dtype, allowed):
    """Of its type; a whole number that differs does so in any case."""
    assert tolerance(dtype) == allowed
    expected = torch.tensor([0.0, 64.0], dtype=dtype)
    assert distance(expected, expected + torch.tensor([32 * allowed, 0], dtype=dtype), exact=False) is None
    assert distance(expected, expected + torch.tensor([128 * allowed, 0], dtype=dtype), exact=False) is not None
    assert distance(expected, expected + torch.tensor([32 * allowed, 0], dtype=dtype), exact=True) is not None
    assert distance(torch.tensor([10**6]), torch.tensor([10**6 + 1]), exact=False) == "1 of 1e+06"


def test_what_is_no_tensor():
    assert distance(3, 3, exact=True) is None
    assert distance(3, 4, exact=True) == "4 instead of 3"
    assert distance(1, True, exact=True) == "True instead of 1"
    assert distance(torch.ones(1), 1, exact=False) is not None
    assert distance(1, torch.ones(1), exact=False) is not None


def test_words():
    """What was got, and what was expected."""
    ones = torch.ones(3)
    assert distance(ones, torch.ones(2), exact=False) == "[2] torch.float32 instead of [3] torch.float32"
    assert distance(ones, ones.double(), exact=False) == "[3] torch.float64 instead of [3] torch.float32"
    assert distance(ones, ones.where(ones < 0, torch.nan), exact=False) == "infinities or NaNs"
    assert distance(ones * 2, torch.tensor([2.0, 2.5, 2.0]), exact=False) == "0.5 of 2"
    assert distance(torch.zeros(0), torch.zeros(0), exact=True) is None


def test_what_is_not_finite_is_compared_as_well():
    """Infinities of another sign are others; next to them rounding counts as ever."""
    inf = float("inf")
    left = torch.tensor([inf, 1.0])
    assert distance(left, torch.tensor([-inf, 1.0]), exact=True) is not None
    assert distance(left, torch.tensor([inf, 1.00001]), exact=False) is None
    assert distance(left, torch.tensor([inf, 1.1]), exact=False) == "0.1 of 1"


def test_rows_that_differ():
    """By more than a millionth of the largest number; other shapes tell nothing."""
    before = torch.tensor([[1.0, 4.0], [2.0, 0.0], [0.0, 0.0]])
    after = before + torch.tensor([[2e-6, 0.0], [0.0, 1e-5], [0.0, 0.0]])
    assert changed_rows(before, after, 3).tolist() == [False, True, False]
    assert changed_rows(before.view(3, 2, 1), after.view(3, 2, 1), 3).tolist() == [False, True, False]
    assert changed_rows(before, after[:2], 3) is None
