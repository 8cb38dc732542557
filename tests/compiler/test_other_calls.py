"""Masks, flags, lengths and words as another call may have them."""

import pytest
import torch
from torch import nn

from sere_compile.compiler.other_calls import kinds_of, of_few_tokens, other_calls, with_masks

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
