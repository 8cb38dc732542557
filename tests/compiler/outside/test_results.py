"""What runs of a block give, compared."""

import pytest
import torch

from sere_compile.compiler.outside.results import _counts_rows, changed_rows, close, distance, is_finite


class TestHowRunsAreCompared:
    """What a trial calls equal, changed, or something else."""

    def test_relative_to_the_largest_number_of_its_tensor(self):
        wanted = [torch.tensor([4.0, -8.0]), torch.tensor([0.5])]
        assert distance([w.clone() for w in wanted], wanted) == 0
        assert distance([torch.tensor([4.0, -7.0]), torch.tensor([0.5])], wanted) == 0.125
        assert distance([torch.tensor([4.0, -7.0]), torch.tensor([1.0])], wanted) == 1.0
        assert distance([torch.zeros(0, 3)], [torch.zeros(0, 3)]) == 0

    @pytest.mark.parametrize(
        ("got", "wanted"),
        [
            ([torch.ones(2)], []),
            ([torch.ones(2)], [torch.ones(3)]),
            ([torch.ones(2)], [torch.ones(2).double()]),
            ([torch.tensor([1, 2])], [torch.tensor([1, 3])]),
        ],
    )
    def test_other_things(self, got, wanted):
        """More of them, another shape or type, or other whole numbers."""
        assert distance(got, wanted) is None

    def test_whole_numbers_that_are_equal_are_followed_by_the_rest(self):
        ids = torch.tensor([1, 2])
        assert distance([ids, torch.tensor([3.0])], [ids.clone(), torch.tensor([2.0])]) == 0.5

    def test_infinities_and_nans_hide_nothing(self):
        """Masked scores are equal, what stands beside them counts, and a NaN is no number that was wanted."""
        inf, nan = float("inf"), float("nan")
        wanted = [torch.tensor([-inf, 4.0, nan, inf])]
        assert distance([wanted[0].clone()], wanted) == 0
        assert distance([torch.tensor([-inf, 3.0, nan, inf])], wanted) == 0.25
        for other in ([0.0, 4.0, nan, inf], [-inf, nan, nan, inf], [-inf, 4.0, 0.0, inf], [-inf, 4.0, nan, -inf]):
            assert distance([torch.tensor(other)], wanted) == inf

    def test_rows_that_differ(self):
        """In any output that has a row per token; others tell nothing."""
        before = [torch.zeros(1, 3, 2), torch.zeros(3, 4), torch.zeros(5), torch.zeros(3, 2, dtype=torch.int64)]
        after = [value.clone() for value in before]
        assert changed_rows(before, after, 3).tolist() == [False, False, False]
        after[0][0, 1, 1] = 1e-9
        after[1][2, 0] = 1
        assert changed_rows(before, after, 3).tolist() == [False, True, True]
        assert changed_rows(before[2:], after[2:], 3) is None
        assert changed_rows(before[:1], [torch.zeros(3, 2)], 3) is None

    def test_close(self):
        """By the larger of both; empty tensors are."""
        left = torch.tensor([1.0, 100.0])
        assert close(left, left + 0.009)
        assert close(left + 0.009, left)
        assert not close(left, left + torch.tensor([0.0, 0.02]))
        assert close(torch.zeros(3), torch.full((3,), 5e-8))
        assert not close(torch.zeros(3), torch.full((3,), 1e-3))
        assert close(torch.zeros(0), torch.zeros(0))
        masked = torch.tensor([float("-inf"), float("nan"), 2.0])
        assert close(masked, masked + 1e-4)
        assert not close(masked, masked + 0.01)
        assert not close(masked, masked.nan_to_num())


class TestArgumentsOfATrial:
    def test_rows_of_an_output(self):
        for sizes in ((6, 4), (2, 3, 4), (6, 1), (1, 6, 4), (6, 2, 2), (1, 2, 3, 1)):
            assert _counts_rows(torch.Size(sizes), 6)
        for sizes in ((6,), (4, 6), (2, 2, 3), (5, 4), ()):
            assert not _counts_rows(torch.Size(sizes), 6)

    def test_finite_numbers(self):
        assert is_finite(torch.arange(3))
        assert is_finite(torch.ones(2))
        assert not is_finite(torch.tensor([1.0, float("-inf")]))
        assert is_finite(torch.zeros(0))
