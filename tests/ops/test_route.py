"""`sere::route`: reference and kernel against a straightforward oracle, order, ties, NaN, and opcheck."""

from __future__ import annotations

import math

import pytest
import torch

from sere_compile.ops import fill, reroute, route
from sere_compile.ops.route.reference import Rerouting, Scoring, projected, route_reference

from ..thinned import thinned
from .cases import poisoned_memory

# E, K, scoring, bias, renormalize, epsilon, scale, dtype of logits, dtype of weights
CASES = [
    (128, 8, "softmax", False, True, 0.0, 1.0, torch.bfloat16, torch.bfloat16),
    (8, 2, "softmax", False, False, 0.0, 1.0, torch.float32, torch.float32),
    (60, 4, "softmax_after", False, False, 0.0, 1.0, torch.float16, torch.float32),
    (37, 5, "sigmoid", True, True, 1e-20, 2.5, torch.float32, torch.bfloat16),
    (37, 5, "sigmoid", True, True, 0.5, 2.5, torch.float32, torch.float32),  # an epsilon that is to be seen
    (6, 6, "none", False, False, 0.0, 1.0, torch.float32, torch.float32),
    (1, 1, "softmax", False, True, 0.0, 1.0, torch.float32, torch.float32),
]


def draw(case, rows=5, device="cpu"):
    experts, top_k, scoring, has_bias, renormalize, epsilon, scale, dtype, out = case
    generator = torch.Generator().manual_seed(experts + top_k)
    logits = (torch.randn(rows, experts, generator=generator) * 2).to(device, dtype)
    bias = torch.randn(experts, generator=generator).to(device) if has_bias else None
    return logits, bias, top_k, scoring, renormalize, epsilon, scale, out


def oracle(logits, bias, top_k, scoring, renormalize, epsilon, scale, dtype):
    """Row by row in Python floats; shares no code with the operator."""
    all_ids, all_weights = [], []
    for row in logits.double().tolist():
        scores = row
        if scoring == "softmax":
            scores = [math.exp(x - max(row)) / sum(math.exp(y - max(row)) for y in row) for x in row]
        elif scoring == "sigmoid":
            scores = [1 / (1 + math.exp(-x)) for x in row]
        chosen = [s + (bias[i].item() if bias is not None else 0.0) for i, s in enumerate(scores)]
        ids = sorted(range(len(row)), key=lambda i, chosen=chosen: (-chosen[i], i))[:top_k]
        weights = [scores[i] for i in ids]
        if scoring == "softmax_after":
            top = max(weights)
            weights = [math.exp(w - top) / sum(math.exp(v - top) for v in weights) for w in weights]
        if renormalize:
            weights = [w / (sum(weights) + epsilon) for w in weights]
        all_ids.append(ids)
        all_weights.append([w * scale for w in weights])
    return torch.tensor(all_weights, dtype=torch.float64).to(dtype), torch.tensor(all_ids)


def launch(arguments, tokens=None):
    from sere_compile.ops.route.launch import Tile, launch_route

    logits, bias, *numbers = arguments
    with poisoned_memory():
        return launch_route(logits, bias, Scoring(*numbers), Rerouting(), Tile(tokens, tokens, 1) if tokens else None)


def check(result, want):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3}[want[0].dtype]
    torch.testing.assert_close(result[0].cpu(), want[0], rtol=tolerance, atol=1e-7)
    torch.testing.assert_close(result[1].cpu(), want[1], rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_equals_oracle(case, device):
    """The operator (on CPU its ATen reference) gives the oracle's ids and weights."""
    arguments = draw(case, device=device)
    check(route(*arguments), oracle(*arguments))


@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_oracle(case, tokens, kernel_device):
    """The kernel does, with rows that do not fill the last program."""
    arguments = draw(case, device=kernel_device)
    check(launch(arguments, tokens), oracle(*arguments))


@pytest.mark.parametrize("run", [route, lambda *a: launch(a)], ids=["operator", "kernel"])
def test_order_of_equals_and_nan(run, kernel_device):
    """Equal scores: the lowest expert first, whatever the sign of zero. NaN is above everything."""
    rows = [[1.0, 3.0, 3.0, 1.0], [0.0, -0.0, 0.0, -1.0], [1.0, math.nan, math.inf, 0.0], [-math.inf, 0.0, 1.0, 2.0]]
    logits = torch.tensor(rows, device=kernel_device)
    weights, ids = run(logits, None, 4, "none", False, 0.0, 1.0, torch.float32)
    assert ids.tolist() == [[1, 2, 0, 3], [0, 1, 2, 3], [1, 2, 0, 3], [3, 2, 1, 0]]
    assert weights[2, 0].isnan()
    assert weights[3, 3] == -math.inf


@pytest.mark.parametrize("run", [route, lambda *a: launch(a)], ids=["operator", "kernel"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_order_where_scores_are_saturated(run, scoring, kernel_device):
    """Scores of 0 and 1 are in the order of their logits, which rounding did not make equal."""
    logits = torch.tensor([[-300.0, 40.0, 300.0, -200.0]], device=kernel_device)
    _, ids = run(logits, None, 4, scoring, False, 0.0, 1.0, torch.float32)
    assert ids.tolist() == [[2, 1, 3, 0]]


@pytest.mark.parametrize("run", [route, lambda *a: launch(a)], ids=["operator", "kernel"])
def test_nan_with_the_sign_bit_set(run, kernel_device):
    """It is above everything, too."""
    negative_nan = torch.tensor([-0x400000], dtype=torch.int32).view(torch.float32)
    logits = torch.cat([torch.tensor([1.0, 2.0]), negative_nan]).to(kernel_device)[None]
    _, ids = run(logits, None, 3, "none", False, 0.0, 1.0, torch.float32)
    assert ids.tolist() == [[2, 1, 0]]


@pytest.mark.parametrize("run", [route, lambda *a: launch(a)], ids=["operator", "kernel"])
@pytest.mark.parametrize("grouped", [False, True])
def test_16_bits_of_logits_do_not_make_the_order_one_of_16_bits(run, grouped, kernel_device):
    """A bias, and scores by which groups are ranked, differ by less than two numbers of 16 bits do."""
    if grouped:
        logits = torch.tensor([[8.0, 8.0625, 8.125, 8.1875, -1.0, -1.0, -1.0, -1.0]], dtype=torch.bfloat16)
        bias, groups = None, (2, 1, "max", True)
    else:
        logits, bias, groups = torch.zeros(1, 4, dtype=torch.bfloat16), torch.arange(4) * 1e-5, (1, 1, "max", True)
        bias = bias.to(kernel_device)
    _, ids = run(logits.to(kernel_device), bias, 4, "sigmoid", False, 0.0, 1.0, torch.float32, *groups)
    assert ids.tolist() == [[3, 2, 1, 0]]


@pytest.mark.parametrize("run", [route, lambda *a: launch(a)], ids=["operator", "kernel"])
def test_any_shape_and_strides(run, kernel_device):
    """Leading dimensions, none at all, no tokens, and logits whose experts are not next to each other."""
    options = (None, 3, "softmax", False, 0.0, 1.0, torch.float32)
    logits = torch.randn(2, 10, 4, device=kernel_device).transpose(1, 2)
    want = torch.topk(logits.softmax(-1), 3)
    weights, ids = run(logits, *options)
    torch.testing.assert_close(weights, want.values)
    assert torch.equal(ids, want.indices)
    assert [x.shape for x in run(logits[0, 0], *options)] == [(3,), (3,)]
    assert [x.shape for x in run(logits[:0], *options)] == [(0, 4, 3), (0, 4, 3)]


@pytest.mark.parametrize("group_score", ["max", "top2"])
@pytest.mark.parametrize("outside_zero", [True, False])
@pytest.mark.parametrize("bias", [0.0, -5.0])
def test_groups_by_hand(group_score, outside_zero, bias):
    """The best of four groups of three by their best expert, or their two best; what stands outside may be chosen.

    With a bias every score is below 0, and experts outside that count as 0 are the best of all.
    """
    scores = torch.randn(20, 12, generator=torch.Generator().manual_seed(3))
    biases = torch.full((12,), bias)
    _, ids = route(scores, biases, 5, "none", num_groups=4, top_groups=2, group_score=group_score,
                   outside_zero=outside_zero)  # fmt: skip
    for row, chosen in zip((scores + biases).tolist(), ids.tolist(), strict=True):
        groups = [sorted(row[start : start + 3], reverse=True) for start in range(0, 12, 3)]
        worth = [sum(group[: 1 if group_score == "max" else 2]) for group in groups]
        open_groups = sorted(range(4), key=lambda g, worth=worth: (-worth[g], g))[:2]
        outside = 0.0 if outside_zero else -math.inf
        limited = [value if e // 3 in open_groups else outside for e, value in enumerate(row)]
        assert chosen == sorted(range(12), key=lambda e, limited=limited: (-limited[e], e))[:5]


def test_weights_of_moved_slots_are_projected():
    """In their dtype; those that stay are not touched, also where they name no expert."""
    weights = torch.tensor([[0.5, 0.25], [1.0, 2.0]], dtype=torch.bfloat16)
    ids, new_ids = torch.tensor([[0, 1], [2, 1]]), torch.tensor([[0, 2], [2, 0]])
    projection = torch.full((3, 3), 7.0)
    projection[1, 2], projection[1, 0] = 2.0, 0.5
    got = projected(weights, ids, new_ids, projection)
    assert got.tolist() == [[0.5, 0.5], [1.0, 1.0]]
    assert got.dtype == torch.bfloat16
    assert projected(weights, ids, new_ids, None) is weights


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_after", "none"])
def test_re_routing_and_filling_are_what_their_operators_do(scoring):
    """Behind the selection: new ids with projected weights, or slots filled by scores, the softmax of logits."""
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(5))
    numbers = {"select_top_k": 1, "threshold": 0.1, "min_active": 4}
    similarity, projection = (torch.rand(10, 10, generator=torch.Generator().manual_seed(n)) for n in (6, 7))
    weights, ids = route(logits, None, 4, scoring)
    given = {"similarity": similarity, "projection": projection, **numbers}
    moved_weights, moved = route(logits, None, 4, scoring, **given)
    want = reroute(ids, similarity, *numbers.values())
    assert torch.equal(moved, want)
    assert not torch.equal(moved, ids)
    torch.testing.assert_close(moved_weights, projected(weights, ids, want, projection))
    budget = {"select_top_k": 1, "max_active": 5}
    assert torch.equal(
        route(logits, None, 4, scoring, similarity=similarity, **budget)[1], reroute(ids, similarity, 1, max_active=5)
    )
    worth = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    for options in (numbers, budget):
        filled_weights, filled = route(logits, None, 4, scoring, fill=True, **options)
        want_ids, want_weights = fill(ids, weights, worth, choice=logits, **options)
        assert torch.equal(filled, want_ids)
        torch.testing.assert_close(filled_weights, want_weights)
    for select in (0, 4):
        assert torch.equal(route(logits, None, 4, scoring, similarity=similarity, select_top_k=select)[1], ids)


@pytest.mark.parametrize("case", thinned([(case,) for case in CASES[:4]], (0, 3)), ids=str)
def test_opcheck(case):
    """Schema, fake implementation and tracing agree with the operator."""
    torch.library.opcheck(torch.ops.sere.route.default, draw(case))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "logits: expected dtype"),
        ({"top_k": 5}, ValueError, "top_k: expected 1 to E"),
        ({"scoring": "tanh"}, ValueError, "scoring: expected one of"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias: expected shape \[4\], got \[3\]"),
        ({"dtype": torch.int32}, TypeError, "dtype: expected a floating point"),
    ],
)
def test_refusals(change, error, message):
    """Each wrong argument is named, with what was expected."""
    arguments = {"logits": torch.zeros(2, 4), "bias": None, "top_k": 2, "scoring": "softmax", **change}
    with pytest.raises(error, match=message):
        route(**arguments)


def routed_with_numbers(run, device, real, rerouted, ids_dtype=torch.int32):
    """Weights and ids of 6 tokens of which some are real and re-routed."""
    logits, bias, *numbers = draw(CASES[0], rows=6, device=device)
    similarity = torch.rand(128, 128, generator=torch.Generator().manual_seed(1)).to(device)
    tokens = [None if n is None else torch.tensor([n], device=device) for n in (real, rerouted)]
    if run == "operator":
        groups = (1, 1, "max", True)
        return route(logits, bias, *numbers, *groups, similarity, 1, 0.0, 0, 0, None, False, ids_dtype, *tokens)
    from sere_compile.ops.route.launch import launch_route

    rerouting = Rerouting(similarity, 1, ids_dtype=ids_dtype, real_tokens=tokens[0], rerouted_tokens=tokens[1])
    with poisoned_memory():
        return launch_route(logits, bias, Scoring(*numbers), rerouting)


@pytest.mark.parametrize("run", ["operator", "kernel"])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("real", "rerouted"), [(None, None), (6, 6), (4, 4), (4, 0), (0, 0), (None, 0), (2**40, 2**40)]
)
def test_padding_gets_no_expert_and_a_batch_can_be_left_alone(run, ids_dtype, real, rerouted, kernel_device):
    """-1 and 0 behind the real tokens; re-routed as far as is said, by those alone."""
    arguments = draw(CASES[0], rows=6, device=kernel_device)
    weights, ids = route(*arguments)
    similarity = torch.rand(128, 128, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    got = routed_with_numbers(run, kernel_device, real, rerouted, ids_dtype)
    rows, some = (min(6, 6 if n is None else n) for n in (real, rerouted))
    want = ids.clone()
    want[:some] = reroute(ids[:some], similarity, 1)
    want[rows:] = -1
    assert got[1].dtype == ids_dtype
    assert torch.equal(got[1].long(), want)
    torch.testing.assert_close(got[0][:rows], weights[:rows], rtol=8e-3, atol=0)
    assert (got[0][rows:] == 0).all()


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"ids_dtype": torch.int16}, TypeError, "ids_dtype: expected torch.int32 or torch.int64, got torch.int16"),
    ({"real_tokens": torch.ones(1)}, TypeError, "real_tokens: expected dtype torch.int64, got torch.float32"),
    ({"rerouted_tokens": torch.ones(2).long()}, ValueError, r"rerouted_tokens: expected shape \[1\], got \[2\]"),
])  # fmt: skip
def test_wrong_numbers_of_tokens_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        route(torch.rand(3, 8), None, 2, "softmax", **changes)


def test_opcheck_with_numbers_of_tokens(device):
    tokens = {name: torch.tensor([2], device=device) for name in ("real_tokens", "rerouted_tokens")}
    similarity = torch.rand(8, 8, device=device)
    torch.library.opcheck(
        torch.ops.sere.route.default, (torch.rand(3, 8, device=device), None, 2, "softmax"),
        {"similarity": similarity, "select_top_k": 1, "ids_dtype": torch.int32, **tokens},
    )  # fmt: skip


def test_what_re_routes():
    """A similarity or filling, with S from 1 to below K."""
    matrix = torch.eye(8)
    assert [
        Rerouting(**options).acts_on(4)
        for options in (
            {"select_top_k": 1},
            {"select_top_k": 1, "similarity": matrix},
            {"select_top_k": 3, "fill": True},
            {"select_top_k": 4, "fill": True},
            {"similarity": matrix},
        )
    ] == [False, True, True, False, False]


def test_the_reference_takes_the_first_of_many_equals():
    """A sort that is not stable mixes equals from sixteen on; in one dimension and in three."""
    scoring = Scoring(3, "none", num_groups=20, top_groups=2)
    for shape in ((40,), (2, 3, 40)):
        for options in (scoring, Scoring(3, "none")):
            weights, ids = route_reference(torch.ones(shape), None, options, Rerouting())
            assert ids.shape == weights.shape == (*shape[:-1], 3)
            assert (ids == torch.arange(3)).all()
    many = torch.zeros(4000)
    many[::7] = 1
    assert route_reference(many, None, Scoring(5, "none"), Rerouting())[1].tolist() == [0, 7, 14, 21, 28]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_after", "none"])
@pytest.mark.parametrize("fill", [True, False])
def test_the_reference_of_batches_of_sequences(scoring, fill):
    """Experts are along the last dimension, and all tokens are one batch."""
    logits = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1))
    options = Scoring(4, scoring, renormalize=True, epsilon=0.1, scale=2.0)
    routing = Rerouting(None if fill else torch.rand(12, 12), 1, fill=fill)
    weights, ids = route_reference(logits, None, options, routing)
    flat = route_reference(logits.view(6, 12), None, options, routing)
    torch.testing.assert_close(weights.view(6, 4), flat[0])
    assert torch.equal(ids.view(6, 4), flat[1])


def test_groups_in_three_dimensions():
    scores = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1))
    scoring = Scoring(4, "none", num_groups=4, top_groups=2, outside_zero=False)
    _, ids = route_reference(scores, None, scoring, Rerouting())
    _, flat = route_reference(scores.view(6, 12), None, scoring, Rerouting())
    assert torch.equal(ids.view(6, 4), flat)
