"""Values for the inputs of a region."""

import math
import types

import pytest
import torch
from torch import nn

from sere_compile.passes.graph import nodes
from sere_compile.passes.proof.made_up import (
    _choose,
    _moved,
    activation_values,
    crowded,
    later_state,
    redrawn,
    state_values,
    unevenly_sure,
    without,
)
from sere_compile.passes.proof.region import Leaf

from ..graph.written import Written
from ..moe_modules import (
    EXPERTS,
    HIDDEN,
    TOKENS,
    TOP_K,
    BiasCorrected,
    Indexed,
    ScatterCombine,
    from_dynamo,
    from_export,
    rows,
)
from .regions import leaves_of, region_of


def logits_of(region, draw):
    [logits] = leaves_of(region, "logits")
    return activation_values(region, draw, single=True)[logits]


def test_matrices_are_made_up():
    """Held ones may be zero."""
    module = Indexed()
    with torch.no_grad():
        module.experts.zero_()
    [value] = [v for v in state_values(region_of(module), single=True).values() if v.dim() == 3]
    # Products with it keep the order of 1.
    assert value.std().item() == pytest.approx((2 / (2 * HIDDEN)) ** 0.5, rel=0.2)
    assert abs(value.mean()) < 0.1


def test_vectors_and_whole_numbers_are_what_the_model_holds():
    class Shifted(BiasCorrected):
        def __init__(self):
            super().__init__()
            self.register_buffer("order", torch.arange(EXPERTS))

        def dispatch(self, x, ids, weights):
            return super().dispatch(x * (1 + self.order[:HIDDEN]), ids, weights)

    module = Shifted()
    values = state_values(region_of(module), single=True).values()
    [bias] = [v for v in values if v.dim() == 1 and v.is_floating_point()]
    [order] = [v for v in values if not v.is_floating_point()]
    assert torch.equal(bias, module.bias)
    assert torch.equal(order, module.order)
    assert not bias.requires_grad


@pytest.mark.parametrize("single", [True, False])
def test_half_precision(single):
    """Everything in float32, or as the model has it."""
    module, dtype = Indexed().bfloat16(), torch.float32 if single else torch.bfloat16
    region = region_of(module, lambda module, x: from_dynamo(module, x.bfloat16()))
    values = state_values(region, single=single) | activation_values(region, 0, single=single)
    assert {value.dtype for value in values.values()} == {dtype}
    assert len(values) == len(region.leaves)


def test_sizes_are_plain_numbers():
    region = region_of(ScatterCombine(), lambda module, x: from_dynamo(module, x, dynamic=True))
    values = state_values(region, single=True)
    numbers = [values[node] for node, leaf in region.leaves.items() if leaf.kind == "number"]
    assert TOKENS in numbers
    assert all(type(number) is int for number in numbers)


def test_two_first_choices_in_even_draws():
    """Half a logit ahead of the next, by turns."""
    region = region_of(Indexed())
    for draw in (0, 2):
        logits = logits_of(region, draw)
        best = logits.topk(2).values
        ahead = best[:, 0] - best[:, 1]
        assert ahead.min().item() == pytest.approx(0.5, abs=1e-5)
        first = logits.argmax(-1).tolist()
        assert len(set(first)) == 2
        assert first == first[:2] * (TOKENS // 2)
    assert len(logits_of(region, 1).argmax(-1).unique()) > 2
    assert not torch.equal(logits_of(region, 1), logits_of(region, 3))
    assert torch.equal(logits_of(region, 1), logits_of(region, 1))


def test_experts_that_are_to_be_chosen():
    """Behind the first choice, by turns; each of them where there are places for all."""
    region = region_of(Indexed())
    [node] = leaves_of(region, "logits")
    logits = activation_values(region, 0, single=True, chosen=[5, 6, 7])[node]
    behind = logits.topk(TOP_K).indices[:, 1:]
    assert {5, 6, 7} <= set(behind.flatten().tolist())
    assert logits.argmax(-1).unique().numel() == 2
    others = activation_values(region, 0, single=True)[node]
    assert int((logits != others).sum(-1).max()) == TOP_K - 1
    assert torch.equal(activation_values(region, 1, single=True, chosen=[5, 6, 7])[node], logits_of(region, 1))


def test_places_of_the_experts_that_are_to_be_chosen():
    """One behind the other, all ahead of the rest, and by less than a first choice would be."""
    rows = torch.zeros(3, 6)
    _choose(rows, [4, 1, 3], 2)
    assert rows.topk(2).indices.tolist() == [[4, 1], [3, 4], [1, 3]]
    best = rows.topk(3).values
    assert bool((best[:, 0] > best[:, 1]).all())
    assert bool((best[:, 1] > best[:, 2]).all())
    assert best.max() < 0.5
    assert rows.count_nonzero() == 2 * 3


def test_more_tokens_than_were_traced():
    """Every activation has as many rows as the number that takes the symbol's place."""
    region = region_of(ScatterCombine(), lambda module, x: from_dynamo(module, x, dynamic=True))
    symbol = next(iter(nodes.shape(region.gate.ids)[0].free_symbols))
    values = activation_values(region, 0, single=True, sizes={symbol: 40})
    kinds = {region.leaves[node].kind: value for node, value in values.items()}
    assert kinds["number"] == 40
    assert {len(value) for kind, value in kinds.items() if kind != "number"} == {40}


class Small(Indexed):
    """Vectors of every kind that a model may begin with."""

    def __init__(self):
        super().__init__()
        self.scale, self.gain = nn.Parameter(torch.ones(HIDDEN)), nn.Parameter(torch.zeros(HIDDEN))
        self.shift = nn.Parameter(torch.tensor([1.0, -2.0] * (HIDDEN // 2)))
        self.register_buffer("calls", torch.tensor(3))
        self.register_buffer("order", torch.arange(HIDDEN))

    def dispatch(self, x, ids, weights):
        self.calls.add_(1)
        x = x * self.scale + self.gain * self.shift + self.order * (self.calls > 5)
        return super().dispatch(x, ids, weights)


@pytest.mark.parametrize("trace", [from_dynamo, from_export])
def test_state_of_another_time(trace):
    """Vectors are others, of their own sign; a counter stands at many calls and at none; tables of numbers stay."""
    module = Small()
    region = region_of(module, trace)
    state = state_values(region, single=True)
    first, second = later_state(region, state, 0), later_state(region, state, 1)
    vectors = {node: value for node, value in first.items() if value.dim() == 1}
    assert len(vectors) == 3
    for node, value in vectors.items():
        assert not torch.equal(value, state[node])
        assert not torch.equal(value, second[node])
        assert bool(((value >= 0) == (state[node] >= 0)).all())
    [calls] = [node for node, value in first.items() if value.dim() == 0]
    assert (int(first[calls]), int(second[calls])) == (1_000_000, 0)
    assert [int(later_state(region, state, draw)[calls]) for draw in (2, 3)] == [1_000_000, 0]


def test_which_state_may_be_other_later():
    """Vectors and counters that are written; neither constants, matrices, 8-bit scales, nor what is no state."""
    w = Written()
    values = {
        "_tensor_constant0": torch.rand(3), "c_numbers": torch.rand(3), "empty": torch.rand(0),
        "bytes": torch.rand(3).to(torch.float8_e4m3fn), "matrix": torch.rand(2, 3), "order": torch.arange(3),
        "length": torch.tensor(7), "input": torch.rand(3), "name": "x",
        "calls": torch.tensor(7), "bias": torch.rand(3), "scale": torch.tensor(0.5),
    }  # fmt: skip
    leaves, state = {}, {}
    for name, value in values.items():
        node, source = w.input(value), w.graph.placeholder(name)
        leaves[node] = Leaf("activation" if name == "input" else "state", source, value)
        state[node] = value
        if name == "calls":
            source.meta["example_value"] = value
            w.call("add_", source, 1)
    found = later_state(types.SimpleNamespace(leaves=leaves), state, 0)
    assert [leaves[node].source.name for node in found] == ["calls", "bias", "scale"]
    assert all(value.shape == state[node].shape for node, value in found.items())


@pytest.mark.parametrize(
    ("value", "draw", "lowers", "wanted"),
    [
        (torch.tensor(1000), 1, True, 2), (torch.tensor(1000), 3, True, 2), (torch.tensor([256.0]), 1, True, 2),
        (torch.tensor(1000), 0, True, None), (torch.tensor(1000), 1, False, None),
        (torch.tensor(255), 1, True, None), (torch.tensor([1000, 1000]), 1, True, None),
        (torch.tensor(448.0).to(torch.float8_e4m3fn), 1, True, 2),
        (torch.tensor(1.0).to(torch.float8_e8m0fnu), 1, True, None), (torch.tensor(1j), 1, True, None),
    ],
)  # fmt: skip
def test_limits_may_become_low(value, draw, lowers, wanted):
    """Single numbers that nobody writes, and that may be more than anything reaches."""
    w = Written()
    node, source = w.input(value), w.graph.placeholder("limit")
    region = types.SimpleNamespace(leaves={node: Leaf("state", source, value)})
    found = later_state(region, {node: value}, draw, lowers_limits=lowers)
    low = [float(other) for other in found.values() if float(other.reshape(-1)[0]) == 2]
    assert low == ([] if wanted is None else [wanted])


@pytest.mark.parametrize(
    ("numbers", "order"),
    [
        ([4.0, 8.0, 0.0], 4.0),
        ([-4.0, -8.0, -6.0], 6.0),
        ([-4.0, 0.0, 8.0], 4.0),
        ([0.0, 0.0, 0.0], 0.5),
        ([-4.0, math.inf, -math.inf], 4.0),
    ],
    ids=["not below 0", "below 0", "both", "zeros", "infinities"],
)
def test_numbers_move_away_from_zero(numbers, order):
    """By some of their own order: what is below 0 and what is not stay so."""
    before = torch.tensor(numbers)
    after = _moved(before, torch.Generator().manual_seed(0))
    finite = before.isfinite()
    assert torch.equal(after < 0, before < 0)
    assert torch.equal(after[~finite], before[~finite])
    steps = (after.abs() - before.abs())[finite]
    assert (steps > 0).all()
    assert order / 4 < steps.max() < order


def test_distances_are_not_negative():
    """The nearest expert is the first choice."""

    class Nearest(Indexed):
        def scores(self, x):
            return torch.softmax(-torch.cdist(x, self.router), -1)

    region = region_of(Nearest())
    for draw in (0, 1):
        assert (logits_of(region, draw) >= 0.04).all()
    logits = logits_of(region, 0)
    best = (-logits).topk(2).values
    assert (best[:, 1] / best[:, 0]).min().item() == pytest.approx(2, rel=1e-5)
    assert len((-logits).argmax(-1).unique()) == 2


class WithInputs(Indexed):
    def __init__(self):
        super().__init__()
        self.other = nn.Parameter(torch.rand(HIDDEN, 1))

    def forward(self, x, z, keep):
        ids, weights = self.route(x)
        weights = torch.where(keep[:, None], weights, 0.0)
        return self.dispatch(x, ids, weights * (z @ self.other))


def test_masks_and_activations():
    """Masks are full, empty and mixed, by turns; activations may be scores, and are above 0."""
    region = region_of(WithInputs(), lambda m, x, z, k: from_dynamo(m, x, z, k), rows(seed=1), torch.ones(TOKENS) > 0)
    activations = leaves_of(region, "activation")
    [mask] = [node for node, shape in activations.items() if len(shape) == 1]
    [score] = [node for node, shape in activations.items() if shape == (TOKENS, 1)]
    [hidden] = leaves_of(region, "hidden")
    filled = []
    for draw in range(3):
        values = activation_values(region, draw, single=True)
        assert (values[score] >= 0.05).all()
        assert (values[hidden] < 0).any()
        filled.append(values[mask].tolist())
    assert filled[0] in ([True] * TOKENS, rows(1)[0].tolist())
    assert len({tuple(row) for row in filled}) in (1, 3)


def test_redrawn_numbers_are_others():
    for value in (torch.zeros(4), torch.ones(4), torch.rand(2, 2), torch.arange(6)):
        assert not torch.equal(redrawn(value, 1), value)
        assert torch.equal(redrawn(value, 1), redrawn(value, 1))
        assert not torch.equal(redrawn(value, 1), redrawn(value, 2))


def test_small_numbers_stay_small():
    """A scale of a thousandth is redrawn as one: positive, at most half as large again."""
    small = redrawn(torch.full((50,), 1e-3), 3)
    assert small.min() >= 1e-3
    assert small.max() <= 1.5e-3
    assert (redrawn(torch.tensor([1.0, 0.0] * 50), 3) < 0).any()


def test_redrawn_numbers_are_of_the_same_kind():
    """Whole numbers in another order, positive vectors positive, matrices of the scale that products keep."""
    order = redrawn(torch.arange(12).view(3, 4), 3)
    assert order.shape == (3, 4)
    assert sorted(order.flatten().tolist()) == list(range(12))
    positive = redrawn(torch.full((50,), 2.0), 3)
    assert positive.min() >= 2
    assert positive.max() <= 3
    assert positive.std() > 0.1
    assert redrawn(torch.tensor([1.0, -1.0] * 500), 3).std().item() == pytest.approx(0.5, rel=0.1)
    assert redrawn(torch.ones(40, 10), 3).std().item() == pytest.approx(0.2, rel=0.2)
    assert redrawn(torch.ones(3, 40, 10).half(), 3).dtype == torch.float16
    narrow = redrawn(torch.ones(40).to(torch.float8_e4m3fn), 3)
    assert narrow.dtype == torch.float8_e4m3fn
    assert 0 <= narrow.float().min() < narrow.float().max() <= 1


def made(like, kind="state", held=None, draw=0, single=True):
    """What is made up for a leaf of this kind whose value in the traced graph is `like`."""
    w = Written()
    node = w.input(like)
    region = types.SimpleNamespace(leaves={node: Leaf(kind, node, held)})
    made_by = state_values(region, single=single) | activation_values(region, draw, single=single)
    return made_by[node]


class TestOneLeaf:
    """By hand: type, size and place of what is made up."""

    @pytest.mark.parametrize(
        ("like", "dtype"),
        [
            (torch.zeros(3, 4), torch.float32),
            (torch.zeros(3, 4).half(), torch.float32),
            (torch.zeros(3, 4).double(), torch.float64),
            (torch.zeros(300), torch.float32),
            (torch.zeros(300).bfloat16(), torch.float32),
            (torch.zeros(3, dtype=torch.int32), torch.int32),
            (torch.zeros(3, 4, dtype=torch.int64), torch.int64),
        ],
        ids=str,
    )
    def test_state_that_nobody_holds(self, like, dtype):
        """Numbers above 0 for vectors, 0 for whole numbers."""
        value = made(like)
        assert (value.shape, value.dtype) == (like.shape, dtype)
        if not dtype.is_floating_point:
            assert not value.any()
        elif like.dim() == 1:
            assert 0.05 <= value.min() < 0.1 < 1 < value.max() <= 1.05
        else:
            assert value.unique().numel() == value.numel()
        assert made(like, single=False).dtype == like.dtype
        assert made(like.to("meta")).device.type == "meta"

    def test_state_that_is_held(self):
        """Vectors, whole numbers, and what is too large to be made up again."""
        for held in (torch.rand(3), torch.arange(6).view(2, 3), torch.rand(2, 2).to(torch.float8_e4m3fn)):
            assert torch.equal(made(held, held=held).float(), held.float())
        assert made(torch.rand(3).half(), held=torch.ones(3).half()).dtype == torch.float32
        assert not torch.equal(made(torch.rand(2, 3), held=torch.ones(2, 3)), torch.ones(2, 3))
        large = torch.ones(1).expand(1 << 13, (1 << 11) + 1)
        assert made(large, held=large) is not None
        assert torch.equal(made(large, held=large)[0, :9], torch.ones(9))

    def test_sizes(self):
        assert made(7, "number", 5) == 5
        assert made(7, "number") == 7

    @pytest.mark.parametrize("kind", ["hidden", "activation"])
    def test_activations(self, kind):
        for like, dtype in ((torch.zeros(40, 5), torch.float32), (torch.zeros(40, 5).half(), torch.float32)):
            value = made(like, kind)
            assert (value.shape, value.dtype) == (like.shape, dtype)
            assert bool((value < 0).any()) is (kind == "hidden")
            assert made(like, kind, single=False).dtype == like.dtype
            assert made(like.to("meta"), kind).device.type == "meta"
            assert not torch.equal(made(like, kind, draw=1), value)
            assert torch.equal(made(like, kind), value)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
    def test_masks(self, dtype):
        """Everything, nothing, and most of it, by turns; what is held is known."""
        like = torch.zeros(200, dtype=dtype)
        masks = [made(like, "activation", draw=draw) for draw in range(6)]
        assert all(mask.dtype == dtype for mask in masks)
        assert [bool(mask.all()) for mask in masks] == [True, False, False] * 2
        assert [bool(mask.any()) for mask in masks] == [True, False, True] * 2
        assert 120 < int(masks[2].sum()) < 160
        held = torch.ones(200, dtype=dtype)
        assert torch.equal(made(like, "activation", held), held)
        assert made(like.to("meta"), "activation").device.type == "meta"


def test_a_crowd_prefers_one_expert():
    """And everything but the logits is as drawn."""
    region = region_of(Indexed())
    [logits] = leaves_of(region, "logits")
    drawn = activation_values(region, 0, single=True)
    changed = crowded(region, drawn)
    assert (changed[logits].argmax(-1) == 0).all()
    assert not (drawn[logits].argmax(-1) == 0).all()
    assert all(changed[node] is value for node, value in drawn.items() if node is not logits)


def test_a_router_that_is_sure_by_turns():
    """The second choice of some tokens weighs as much as the first, and that of others nothing; the choice stays."""
    region = region_of(Indexed())
    [logits] = leaves_of(region, "logits")
    drawn = activation_values(region, 0, single=True)
    changed = [unevenly_sure(region, drawn, draw) for draw in range(2)]
    for values in changed:
        assert torch.equal(values[logits].topk(TOP_K).indices, drawn[logits].topk(TOP_K).indices)
        assert all(values[node] is value for node, value in drawn.items() if node is not logits)
        first, second = values[logits].softmax(-1).topk(2).values.T
        assert (second / first).max() > 0.6
        assert (second / first).min() < 0.01
        degree = values[logits] / drawn[logits]
        torch.testing.assert_close(degree.amin(-1), degree.amax(-1))
        assert 1 / 4 <= degree.min() < 1 / 2 < 8 < degree.max() <= 16
    assert not torch.equal(changed[0][logits], changed[1][logits])


def test_tokens_that_prefer_every_other_expert():
    """By sigmoids as well: the others are nearly 1, in the order that they had, and one is nearly 0."""
    region = region_of(Indexed())
    [logits] = leaves_of(region, "logits")
    drawn = activation_values(region, 1, single=True)
    changed = without(region, drawn, 2)
    others = [column for column in range(EXPERTS) if column != 2]
    assert (changed[logits][:, 2].sigmoid() < 1e-6).all()
    assert (changed[logits][:, others].sigmoid() > 0.99).all()
    assert torch.equal(changed[logits][:, others].argsort(-1), drawn[logits][:, others].argsort(-1))
    assert all(changed[node] is value for node, value in drawn.items() if node is not logits)
