"""What a call says of its tokens, as the next one may say it."""

import types

import pytest
import torch

from sere_compile.passes.graph import nodes
from sere_compile.passes.proof.masks import Mask, Masks, _repeated, _with_neighbours, some_elements
from sere_compile.passes.proof.region import Leaf

from ..graph.written import Written
from ..moe_modules import TOKENS, Indexed, from_dynamo, from_make_fx
from .regions import region_of

MASK = torch.ones(TOKENS, 1, dtype=torch.bool)
WORDS = torch.arange(TOKENS)[:, None] + 3


class Given(Indexed):
    """Weights are multiplied by what is made of a further input."""

    def __init__(self, told):
        super().__init__()
        self.told = told
        self.register_buffer("nothing", torch.tensor(40))
        self.register_buffer("table", torch.arange(50))

    def forward(self, x, *given):
        ids, weights = self.route(x)
        return self.dispatch(x, ids, weights * self.told(self, *given))


def masks_of(told, *given, trace=from_dynamo):
    """The masks of a region, and the nodes of what was given."""
    region = region_of(Given(told), trace, *given)
    masks = Masks(region)
    return masks, [node for node in region.leaves if node in masks]


def made(masks, node, *, draw=0, pattern=None, sizes=(TOKENS, 1), seed=0):
    return masks.value(node, draw, pattern, list(sizes), torch.Generator().manual_seed(seed))


def test_no_mask():
    masks, found = masks_of(lambda module, factor: factor, torch.rand(TOKENS, 1))
    assert (bool(masks), found, masks.patterns, masks.are_told) == (False, [], 1, False)


@pytest.mark.parametrize("given", [MASK, MASK.long()], ids=["bool", "0 and 1"])
def test_a_plain_mask(given):
    """Everything real, nothing marked, then some of it and the contrary."""
    masks, [node] = masks_of(lambda module, mask: mask, given)
    assert made(masks, node, draw=0).all()
    assert not made(masks, node, draw=1).any()
    assert (masks.patterns, masks.are_told) == (2, False)
    first, contrary = made(masks, node, pattern=0), made(masks, node, pattern=1)
    assert torch.equal(first, ~contrary)
    for seed in range(20):
        some = made(masks, node, pattern=0, sizes=(2,), seed=seed)
        assert some.any()
        assert not some.all()
    assert {bool(made(masks, node, pattern=pattern, sizes=())) for pattern in (0, 1)} == {True, False}


def test_combinations_of_masks():
    masks, found = masks_of(lambda module, a, b: a & b, MASK, ~MASK)
    assert (len(found), masks.patterns) == (2, 4)
    flags = {tuple(bool(made(masks, node, pattern=p, sizes=())) for node in found) for p in range(4)}
    assert len(flags) == 4


def test_every_variant_where_there_are_many_masks():
    masks, found = masks_of(
        lambda module, *given: sum((g * 1.0 for g in given), 0.0), *(MASK.clone() for _ in "abcdef")
    )
    assert masks.patterns == 12
    for node in found:
        assert {bool(made(masks, node, pattern=p, sizes=())) for p in range(12)} == {True, False}


class TestTold:
    """Numbers other than 0 and 1."""

    def test_first_draws_are_as_called(self):
        masks, [node] = masks_of(lambda module, words: words != 0, WORDS)
        for draw in (0, 1):
            assert torch.equal(made(masks, node, draw=draw), WORDS)
        assert len(made(masks, node, draw=1, sizes=(40, 1)).unique()) == TOKENS
        assert masks.are_told

    def test_what_they_are_compared_with(self):
        masks, [node] = masks_of(lambda module, words: words > 40, WORDS)
        numbers = [made(masks, node, pattern=pattern) for pattern in range(masks.patterns)]
        for number in (0, 39, 40, 41):
            assert any((value == number).any() for value in numbers)
        assert all((value == WORDS).any() for value in numbers)

    def test_compared_with_what_the_model_holds(self):
        masks, [node] = masks_of(lambda module, words: words != module.nothing, WORDS)
        assert any((made(masks, node, pattern=p) == 40).any() for p in range(masks.patterns))

    def test_what_is_looked_up_stays_in_its_table(self):
        masks, [node] = masks_of(lambda module, words: (module.table[words] > 4) & (words < 50), WORDS)
        numbers = torch.cat([made(masks, node, pattern=p, seed=s) for p in range(masks.patterns) for s in range(9)])
        assert numbers.min() == 0
        assert numbers.max() <= WORDS.max()

    def test_a_length(self):
        def told(module, length):
            return torch.arange(TOKENS)[:, None] < length

        masks, [node] = masks_of(told, torch.tensor(TOKENS))
        lengths = {int(made(masks, node, pattern=p, sizes=(), seed=s)) for p in range(masks.patterns) for s in range(9)}
        assert 0 in lengths
        assert lengths & set(range(1, TOKENS))
        assert max(lengths) <= TOKENS

    def test_as_called(self):
        masks, [node] = masks_of(lambda module, words: words != 0, WORDS)
        fixed = masks.as_called()
        assert not fixed.are_told
        assert torch.equal(made(fixed, node, draw=2, pattern=0), WORDS)
        assert not torch.equal(made(masks, node, draw=2, pattern=0), WORDS)

    def test_nobody_knows_what_was_called(self):
        """make_fx holds no numbers: those that are compared are made up all the same."""
        masks, [node] = masks_of(lambda module, words: words != 7, WORDS, trace=from_make_fx)
        assert any((made(masks, node, pattern=p) == 7).any() for p in range(masks.patterns))

    def test_no_number_below_0_where_there_is_none(self):
        masks, [node] = masks_of(lambda module, words: words != 0, WORDS.to(torch.uint8))
        assert all((made(masks, node, pattern=p) >= 0).all() for p in range(masks.patterns))


@pytest.mark.parametrize("far", [True, False])
def test_floats_that_are_compared(far):
    def told(module, added):
        return added == 0 if far else added > 0.5

    masks, [node] = masks_of(told, torch.zeros(TOKENS, 1))
    assert (made(masks, node, draw=0) > 0.5).all()
    assert (made(masks, node, draw=1) == 0).all()
    numbers = torch.cat([made(masks, node, pattern=p) for p in range(masks.patterns)])
    assert (numbers == 0).any()
    assert (numbers == -1e9).any()
    assert ((numbers > 0.5) & (numbers < 2)).any()


class TestJoined:
    """One tensor through which alone masks act."""

    def test_masks_that_are_one_in_the_end(self):
        masks, _ = masks_of(lambda module, mask, words: mask & (words != 7), MASK, WORDS)
        assert "and" in masks.joined.name

    def test_numbers_that_are_compared(self):
        masks, _ = masks_of(lambda module, words: (words != 7).squeeze(-1)[:, None], WORDS)
        assert nodes.kind(masks.joined) == "ne"

    @pytest.mark.parametrize("trace", [from_dynamo, from_make_fx])
    def test_apart(self, trace):
        """Each has its own effect, or numbers have."""
        assert masks_of(lambda module, a, b: a * 1.0 + b, MASK, ~MASK, trace=trace)[0].joined is None
        assert masks_of(lambda module, words: words * 0.5, WORDS, trace=trace)[0].joined is None


def compared(w, x):
    return w.call(torch.eq, x, 7)


class TestByHand:
    def mask(self, write, value, *, held=True, state=None):
        """What is seen of an input that `write` reads, beside logits and a tensor of the model."""
        w = Written()
        node, w.scores = w.input(value), w.given(4, 8)
        leaves = {node: Leaf("activation", node, value if held else None), w.scores: Leaf("logits", w.scores, None)}
        if state is not None:
            w.state = w.input(state)
            leaves[w.state] = Leaf("state", w.state, state)
        write(w, node)
        masks = Masks(types.SimpleNamespace(leaves=leaves))
        assert w.scores not in masks
        return masks._masks.get(node)

    @pytest.mark.parametrize(
        ("write", "value", "special"),
        [
            (compared, WORDS, (0, 6, 7, 8)),
            (lambda w, x: w.call(torch.eq, w.call(torch.neg, x), 7), WORDS, (0, 6, 7, 8)),
            (lambda w, x: w.call(torch.lt, x, other=7), WORDS, (0, 6, 7, 8)),
            (lambda w, x: w.call(torch.eq, x, 0), WORDS, (0, -1, 1)),
            (lambda w, x: w.call(torch.eq, x, 0), WORDS.to(torch.uint8), (0, 1)),
            (lambda w, x: w.call(torch.add, x, 7), WORDS, (0,)),
            (lambda w, x: [compared(w, x), w.pick(w.given(50), x)], WORDS, (0,)),
            (compared, torch.zeros(4, 1), (0, -1e9 - 1, -1e9, -1e9 + 1, 6, 7, 8)),
        ],
    )
    def test_special_numbers(self, write, value, special):
        """Those that something compares it with, and their neighbours; what is looked up stays in its table."""
        found = self.mask(write, value)
        assert found.special == special
        assert found.held is (None if value.is_floating_point() else value)
        assert found.varies
        assert found.variants == len(special) + 1

    @pytest.mark.parametrize(("count", "special"), [(8, (0, *range(19, 29))), (9, (0,))])
    def test_few_numbers_of_the_model(self, count, special):
        found = self.mask(lambda w, x: w.call(torch.isin, x, w.state), WORDS, state=torch.arange(count) + 20)
        assert found.special == special

    @pytest.mark.parametrize(
        ("write", "value", "held"),
        [
            (compared, MASK, True),
            (lambda w, x: w.call(torch.eq, x, 1), MASK.long(), True),
            (lambda w, x: w.call(torch.ne, x, 0), 1 - MASK.long(), True),
            (lambda w, x: w.call(torch.eq, x, 1), WORDS, False),
            (lambda w, x: w.pick(w.given(50), x), WORDS, False),
        ],
    )
    def test_plain_masks(self, write, value, held):
        """Truths, zeros and ones, and whole numbers of which nothing else is known."""
        assert self.mask(write, value, held=held) == Mask(None, None)
        assert Mask(None, None).variants == 2

    @pytest.mark.parametrize(
        "write",
        [
            lambda w, x: w.call(torch.exp, x),
            lambda w, x: w.call(torch.gt, w.call(torch.add, w.scores, x), 0),
            lambda w, x: w.call(torch.zeros_like, x, dtype=torch.bool),
        ],
        ids=["no comparison", "scores that are compared", "its sizes alone"],
    )
    def test_floats_that_tell_nothing(self, write):
        assert self.mask(write, torch.rand(4, 8)) is None

    def test_what_is_no_tensor(self):
        assert self.mask(lambda w, x: None, 3) is None

    def test_neighbours(self):
        assert _with_neighbours({7, 9}) == (0, 6, 7, 8, 9, 10)
        assert _with_neighbours({0}) == (0, -1, 1)
        assert _with_neighbours(set()) == (0,)

    def test_numbers_of_a_call_in_other_sizes(self):
        held = torch.tensor([[3, 4, 5]])
        assert _repeated(held, [1, 3]).tolist() == [[3, 4, 5]]
        assert _repeated(held, [1, 3]) is not held
        assert _repeated(held, [2, 2]).tolist() == [[3, 4], [5, 3]]
        assert _repeated(held, [2]).tolist() == [3, 4]
        assert _repeated(held[:, :0], [0, 2]).shape == (0, 2)

    @pytest.mark.parametrize("sizes", [(4,), (2, 3)])
    def test_some_elements(self, sizes):
        """About so many of them; at least one of each kind, if there are two."""
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            assert some_elements(sizes, 0.0, generator).sum() == 1
            assert (~some_elements(sizes, 1.0, generator)).sum() == 1
        assert some_elements((2000,), 0.3, generator).float().mean().item() == pytest.approx(0.3, abs=0.05)
        assert some_elements((1,), 0.0, generator).tolist() == [True]
        assert some_elements((1,), 1.0, generator).tolist() == [True]
        assert some_elements((0,), 1.0, generator).shape == (0,)
