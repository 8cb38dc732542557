"""Masks, flags, lengths and words as another call may have them."""

import pytest
import torch
from torch import nn

from sere_compile.compiler.outside.other_calls import is_rows, kinds_of, of_few_tokens, other_calls, with_masks

X = torch.randn(5, 8)


class Block(nn.Module):
    """Its code compares words with 7, and holds 9."""

    def __init__(self):
        super().__init__()
        self.padding = 9

    def forward(self, x, words):
        def real():
            return words != 7

        return x * real()[:, None]


def others(given):
    """What stands in place of the second argument in each call that is made up; the first is as it was."""
    made = list(other_calls(((X, given), {}), Block()))
    assert all(args[0] is X for args, _ in made)
    return [args[1] for args, _ in made]


def test_hidden_states_are_no_mask():
    assert list(other_calls(((X,), {"scale": 2.0}), Block())) == []
    assert list(other_calls(((X, X.new_zeros(0), torch.zeros(3, dtype=torch.complex64)), {}), Block())) == []


@pytest.mark.parametrize("given", [torch.ones(5, dtype=torch.bool), torch.ones(5, dtype=torch.int64), torch.ones(5)])
def test_masks(given):
    """Nothing is masked yet: some of it is, in one call and another."""
    made = others(given)
    assert all(one.dtype == given.dtype for one in made)
    assert any(0 < int((one == 0).sum()) < 5 for one in made)
    assert {float(value) for one in made for value in one} == {0.0, 1.0}


def test_all_that_was_masked():
    made = others(torch.zeros(5, dtype=torch.bool))
    assert any(0 < int(one.sum()) < 5 for one in made)


@pytest.mark.parametrize("given", [torch.tensor(True), torch.tensor(1), torch.tensor(1.0)])
def test_a_flag(given):
    assert {float(one) for one in others(given)} == {0.0, 1.0}


def test_numbers_that_are_no_tensors():
    """A length of all tokens, of some, a number that the code names; a flag is on or off."""
    assert set(others(5)) == {2, 1, 4, 0, 9, 7}
    assert all(type(one) is int for one in others(5))
    assert others(2)[0] == 1
    assert others(True) == [False]
    assert others(2.5) == []


@pytest.mark.parametrize("given", [torch.zeros(1, 1, 5, 5), torch.zeros(5).masked_fill(torch.arange(5) > 2, -1e9)])
def test_what_is_added_to_scores(given):
    low = torch.finfo(torch.float32).min
    assert all(0 < int((one == low).sum()) < one.numel() for one in others(given)[1:])
    assert any(int((one == 0).sum()) for one in others(given))


def test_words():
    made = others(torch.arange(5))
    for number in (0, 7, 9):
        assert any((one == number).any() for one in made)
    assert all((one == torch.arange(5)).any() for one in made)


def test_a_length():
    lengths = {int(one) for one in others(torch.tensor(5))}
    assert {0, 2} <= lengths


def test_several_masks_are_not_the_same():
    first, second = torch.ones(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)
    made = [args[1:] for args, _ in other_calls(((X, first, second), {}), Block())]
    assert any(not torch.equal(a, b) for a, b in made)


def test_kinds_of_calls():
    """By what is given, not by sizes and numbers."""
    mask = torch.ones(5, dtype=torch.bool)
    assert kinds_of(((X, mask), {})) == kinds_of(((X[:2], ~mask[:2]), {}))
    different = [None, ((X,), {}), ((X, None), {}), ((X, mask), {}), ((X, mask.long()), {}), ((X,), {"mask": mask})]
    assert len({kinds_of(call) for call in different}) == len(different)


def test_few_tokens_of_many():
    (x, mask, pairs), known = of_few_tokens(((X, torch.arange(5), torch.ones(1, 5, 5)), {"scale": 2.0}), 5, 3)
    assert (x.shape, mask.tolist(), pairs.shape, known) == ((3, 8), [0, 1, 2], (1, 3, 3), {"scale": 2.0})


class Optional(nn.Module):
    def forward(self, x, mask=None, scale=1.0, *, words=None):
        return x


def test_masks_that_a_call_does_not_have():
    """Where None stands or would stand, one after another."""
    mask = torch.ones(5, dtype=torch.bool)
    for given in (((X,), {}), ((X, None), {"words": None}), ((), {"x": X})):
        first, second = with_masks(given, Optional(), X.shape[:-1], X.device)
        assert [k for k, v in zip(("mask", "words"), (first, second), strict=True) if not _holds(v, mask)] == []
    [only] = with_masks(((X, mask), {}), Optional(), X.shape[:-1], X.device)
    assert only[1]["words"].all()
    assert list(with_masks(((X, 1, 2, 3), {}), Optional(), X.shape[:-1], X.device)) == []
    assert list(with_masks(((X,), {}), nn.Linear(8, 8), X.shape[:-1], X.device)) == []


def _holds(call, mask):
    masks = [value for value in (*call[0], *call[1].values()) if isinstance(value, torch.Tensor) and value is not X]
    return len(masks) == 1 and torch.equal(masks[0], mask)


@pytest.mark.parametrize(("sizes", "own"), [((2, 1, 4, 4), 0), ((2, 1, 4, 6), 2)])
def test_a_mask_of_attention_lets_a_token_see_itself(sizes, own):
    """What sees nothing does not tell what its experts are; keys of earlier tokens come first."""
    found = others(torch.ones(sizes, dtype=torch.bool))
    assert any(not bool(mask.all()) for mask in found)
    assert all(bool(mask.diagonal(own, -2, -1).all()) for mask in found)


@pytest.mark.parametrize("sizes", [(4, 4), (4, 4, 1), (4, 4, 3)])
def test_other_masks_have_no_own_places(sizes):
    """[B, T] and [B, T, 1]: the first and last of a row may be masked, too."""
    masked = torch.stack([~mask for mask in others(torch.ones(sizes, dtype=torch.bool))]).any(0)
    assert bool(masked.diagonal(0, -2, -1).any())


class Holding(nn.Module):
    """Holds these whole numbers, a flag, and another number."""

    def __init__(self, *held):
        super().__init__()
        for place, number in enumerate(held):
            setattr(self, f"number{place}", number)
        self.flag, self.scale, self.inner = True, 2.5, nn.Identity()


class Naming(Holding):
    """Its code names 7 in a function inside."""

    def forward(self, x):
        return [(lambda part: part == 7)(part) for part in x]


class Inheriting(Naming):
    """Runs what its base does, in a module of it, too."""


def made(given, block, hidden=X):
    """What stands in place of a second argument in each call: as there is no other, each choice once, in order."""
    return [args[1] for args, _ in other_calls(((hidden, given), {}), block)]


def marks(given, block):
    """Which numbers each of these calls has that the argument did not have."""
    return [set(one.flatten().tolist()) - set(given.flatten().tolist()) for one in made(given, block)]


class TestNumbersInPlaceOfOthers:
    """What is likelier to tell tokens apart comes first, and only so many are tried."""

    def test_of_a_length(self):
        """Half of the tokens, half of it, all of them, one, all but one, none; then those that the code names."""
        assert made(5, Holding(9)) == [2, 1, 4, 0, 9]
        assert made(20, Holding(9), torch.randn(2, 3, 8)) == [3, 10, 6, 1, 5, 0]
        assert made(9, Holding(2, 11, 12, 13), torch.randn(1, 8)) == [0, 4, 1, 2, 11, 12]
        assert made(0, Holding(-1), torch.randn(2, 1)) == [1, 2]
        assert made(4, Holding(), X[0]) == [0, 2, 1]
        calls = other_calls(((torch.zeros(7, 3, dtype=torch.complex64), X, 20), {}), Holding())
        assert [args[2] for args, _ in calls] == [2, 10, 5, 1, 4, 0]

    def test_of_words(self):
        """Nothing, any word that occurs, and each number that is named, but for nothing again."""
        words = torch.arange(12) + 200
        assert marks(words, Holding(100, 0, 101)) == [{0}, marks(words, Holding())[1], {100}, {101}]
        assert marks(words, Inheriting(100)) == [{0}, marks(words, Holding())[1], {100}, {7}]
        assert len(made(words, nn.Linear(3, 4))) == 4
        assert len(made(words, Holding(*range(100, 130)))) == 2 + 24
        attention = Holding(100)
        attention.inner = nn.MultiheadAttention(40, 4)
        held = (40, 4, 10, 0)
        assert [one - set(held) for one in marks(words, attention)[2:]] == [{100}, *[set()] * 3]
        inside = Holding(100)
        inside.inner = Holding(101)
        assert marks(words, inside)[2:] == [{100}, {101}]

    def test_any_word_that_occurs(self):
        """Not above the largest, which a table holds; of nothing and two there are more than two kinds."""
        words = torch.tensor([0, 2] * 20)
        other = made(words, Holding())[1]
        assert set(other[other != words].tolist()) == {0, 1, 2}
        assert other.dtype == words.dtype
        assert 5 < int((other != words).sum()) < 30

    def test_of_a_length_in_a_tensor(self):
        assert [int(one) for one in made(torch.tensor([6]), Holding(9))][2:] == [3, 9]
        assert len(made(torch.tensor([6, 6]), Holding(9))) == 3

    def test_masks_of_numbers(self):
        """None, all, and the contrary of some."""
        for given in (torch.tensor([0, 1] * 200), torch.tensor([0.0, 1.0] * 200)):
            none, every, contrary = made(given, Holding(9))
            for one, number in ((none, 0), (every, 1)):
                assert 60 < int((one != given).sum()) < 100
                assert set(one[one != given].tolist()) == {number}
            changed = contrary != given
            assert 130 < int(changed.sum()) < 190
            assert torch.equal(contrary[changed], 1 - given[changed])

    def test_masks_of_truths(self):
        given = torch.tensor([False, True] * 20)
        none, every, contrary = made(given, Holding(9))
        assert not none[none != given].any()
        assert every[every != given].all()
        for one in (none, every, contrary):
            assert 0 < int((one != given).sum()) < 30
        assert (contrary & ~given).any()
        assert (~contrary & given).any()

    def test_what_is_added_to_scores_is_far_below_nothing(self):
        """From -1e4 on; nothing at all may be such a mask as well, and a half is none."""
        low = torch.finfo(torch.float32).min
        for given in (torch.tensor([0.0] * 20 + [-1e4]), torch.zeros(21), torch.tensor([1.0] * 20 + [-1e9])):
            nothing, masked = made(given, Holding())
            assert set(nothing.tolist()) <= {0.0, *given.tolist()}
            assert (masked == low).any()
            assert (masked != low).any()
        for given in (torch.tensor([0.0, -9999.0]), torch.tensor([0.0, 0.5]), torch.tensor([2.0, -1e4])):
            assert made(given, Holding()) == []
        [_, half] = made(torch.zeros(21, dtype=torch.float16), Holding())
        assert half.min() == torch.finfo(torch.float16).min
        assert half.dtype == torch.float16

    def test_what_has_no_other(self):
        for given in (torch.zeros(0), torch.zeros(3, dtype=torch.complex64), "word", None, 2.5):
            assert made(given, Holding(9)) == []
        assert made(False, Holding(9)) == [True]
        assert type(made(False, Holding(9))[0]) is bool


class TestHowManyCalls:
    def test_of_several_arguments(self):
        """Each choice of each once, and some together: twice as many as the longest has, and eight at most."""
        mask = torch.ones(5, dtype=torch.bool)
        assert len(list(other_calls(((X, mask), {}), Holding()))) == 3
        assert len(list(other_calls(((X, mask, mask), {}), Holding()))) == 6
        assert len(list(other_calls(((X, True, False), {}), Holding()))) == 2
        assert len(list(other_calls(((X, 20, True), {}), Holding(9)))) == 8
        assert len(list(other_calls(((X, torch.arange(5) + 200, True), {}), Holding(*range(100, 110))))) == 12
        numbers = [args[1] for args, _ in other_calls(((X, 20, True), {}), Holding(9))]
        assert numbers[:6] == [2, 10, 5, 1, 4, 0]
        assert set(numbers[6:]) <= set(numbers[:6])

    def test_each_call_is_the_same_again(self):
        mask = torch.ones(5, dtype=torch.bool)
        first, second = ([args[1:] for args, _ in other_calls(((X, mask, mask), {}), Holding())] for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert all(map(torch.equal, one, other))

    def test_no_argument_of_the_model_is_changed(self):
        given = [torch.ones(5, dtype=torch.bool), torch.ones(5, requires_grad=True), torch.arange(5)]
        before = [one.detach().clone() for one in given]
        assert list(other_calls(((X, *given), {}), Holding(9)))
        assert all(map(torch.equal, given, before))

    def test_at_most_three_arguments_are_given_a_mask(self):
        class Many(nn.Module):
            def forward(self, x, a=None, b=None, c=None, d=None):
                return x

        calls = list(with_masks(((X,), {}), Many(), X.shape[:-1], X.device))
        assert [list(kwargs) for _, kwargs in calls] == [["a"], ["b"], ["c"]]
        calls = list(with_masks(((X, None), {"c": 1}), Many(), X.shape[:-1], X.device))
        assert [(len(args), [*kwargs]) for args, kwargs in calls] == [(2, ["c"]), (2, ["c", "b"]), (2, ["c", "d"])]
        assert (calls[0][0][1].shape, calls[0][0][1].dtype) == ((5,), torch.bool)

    def test_a_block_that_tells_no_arguments(self):
        class Odd(nn.Module):
            forward = 3

        assert list(with_masks(((X,), {}), Odd(), X.shape[:-1], X.device)) == []


def test_rows_are_floats_with_a_width():
    assert is_rows(torch.zeros(2, 3))
    assert is_rows(torch.zeros(1, 2, 3))
    for value in (torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64), [[0.0]], None):
        assert not is_rows(value)


@pytest.mark.parametrize(("sizes", "own"), [((2, 4, 3), -1), ((6, 1, 4), 3), ((8, 16), 8)])
def test_fewer_keys_than_queries_are_no_attention(sizes, own):
    """Nor is one query, nor [B, T]: what would be a token's own place may be masked as well."""
    masked = torch.stack([~mask for mask in others(torch.ones(sizes, dtype=torch.bool))]).any(0)
    assert bool(masked.diagonal(own, -2, -1).any())


def test_a_square_mask_lets_tokens_see_themselves():
    for sizes, own in (((1, 2, 2), 0), ((3, 2, 2), 0), ((3, 4, 6), 2)):
        assert all(bool(mask.diagonal(own, -2, -1).all()) for mask in others(torch.ones(sizes, dtype=torch.bool)))


def test_few_tokens_are_cut_from_each_size_that_counts_them():
    (table, other, word), _ = of_few_tokens(((torch.arange(16).view(4, 4), torch.zeros(5, 4, 2), "a"), {}), 4, 2)
    assert table.tolist() == [[0, 1], [4, 5]]
    assert (other.shape, word) == ((5, 2, 2), "a")
