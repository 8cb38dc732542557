"""`trace_router`: from scores back to the projection by a router weight, or why there is none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.passes import Evidence, Skip, SkipReason
from sere_compile.passes.evidence.router import Router, trace_router
from sere_compile.passes.graph import nodes

from ..graph.written import Written
from ..moe_modules import EXPERTS, HIDDEN, TRACERS, Block, rows


class Scored(Block):
    """Selects from what a function of (block, x) makes."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.second = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.wide = nn.Parameter(torch.randn(EXPERTS + 2, HIDDEN))
        self.bias = nn.Parameter(torch.randn(EXPERTS))
        self.up, self.down = nn.Parameter(torch.randn(EXPERTS, 2)), nn.Parameter(torch.randn(2, HIDDEN))
        self.register_buffer("mask", (torch.rand(EXPERTS, HIDDEN) > 0.3).float())
        self.length = nn.Parameter(torch.rand(EXPERTS, 1) + 0.5)

    def forward(self, x):
        return torch.topk(self.function(self, x), self.top_k)


def trace_back(function, tracer):
    """What `trace_router` says of the scores of the only top-k."""
    graph = TRACERS[tracer](Scored(function), rows())
    [selection] = [node for node in graph.graph.nodes if nodes.kind(node) == "topk"]
    scores = nodes.operand(selection)
    return trace_router(scores, nodes.last_size(scores))


# name -> (function of (block, x), shape of the router weight, scoring in words)
ROUTERS = {
    "raw logits": (lambda b, x: F.linear(x, b.router), (EXPERTS, HIDDEN), "raw logits"),
    "softmax": (lambda b, x: F.linear(x, b.router).softmax(-1), (EXPERTS, HIDDEN), "softmax"),
    "two scorings": (lambda b, x: F.linear(x, b.router).sigmoid().sqrt(), (EXPERTS, HIDDEN), "sigmoid + sqrt"),
    "bias": (lambda b, x: F.linear(x, b.router).sigmoid() + b.bias, (EXPERTS, HIDDEN), "sigmoid"),
    "matmul": (lambda b, x: x @ b.router.T, (EXPERTS, HIDDEN), "raw logits"),
    "normalised weight": (lambda b, x: x @ F.normalize(b.router, dim=-1).T, (EXPERTS, HIDDEN), "raw logits"),
    "LoRA on the weight": (lambda b, x: F.linear(x, b.router + b.up @ b.down), (EXPERTS, HIDDEN), "raw logits"),
    "pruned weight": (lambda b, x: F.linear(x, b.router * b.mask), (EXPERTS, HIDDEN), "raw logits"),
    "normalised weight of the type of the hidden states": (
        lambda b, x: x @ F.normalize(b.router.type_as(x), dim=-1).T,
        (EXPERTS, HIDDEN),
        "raw logits",
    ),
    "weight norm": (lambda b, x: F.linear(x, torch._weight_norm(b.router, b.length)), (EXPERTS, HIDDEN), "raw logits"),
    "transposed twice": (lambda b, x: (b.router @ x.T).T, (EXPERTS, HIDDEN), "raw logits"),
    "scores turned there and back": (lambda b, x: F.linear(x, b.router).T.T, (EXPERTS, HIDDEN), "raw logits"),
    "multiply and sum": (lambda b, x: (x.unsqueeze(-2) * b.router).sum(-1), (EXPERTS, HIDDEN), "raw logits"),
    "further columns": (lambda b, x: F.linear(x, b.wide)[:, :EXPERTS], (EXPERTS + 2, HIDDEN), "raw logits"),
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name, tracer):
    """The weight is found behind what shapes the scores, and what does is named in order."""
    function, shape, scoring = ROUTERS[name]
    found = trace_back(function, tracer)
    assert isinstance(found, Router), found
    assert nodes.shape(found.weight) == shape
    assert nodes.shape(found.hidden) == tuple(rows().shape)
    assert found.columns == EXPERTS
    assert found.scoring == scoring


@pytest.mark.parametrize("tracer", ["dynamo", "export"])
def test_one_weight_that_projects_twice(tracer):
    """It is one router. (make_fx reads the attribute twice, so that there it is two.)"""
    found = trace_back(lambda b, x: F.linear(x, b.router) + F.linear(x * 2, b.router), tracer)
    assert isinstance(found, Router), found
    assert nodes.shape(found.weight) == (EXPERTS, HIDDEN)


def noise(b, x):
    return torch.randn_like(F.linear(x, b.second)) * F.softplus(F.linear(x, b.second))


@pytest.mark.parametrize("tracer", ["dynamo", "export"])
@pytest.mark.parametrize(
    "scores",
    [
        lambda b, x: F.linear(x, b.router) + noise(b, x),
        lambda b, x: F.linear(x, b.router) + noise(b, x).to(torch.float32),
        lambda b, x: F.linear(x, b.router) * torch.rand(1),  # no other path: what it scales are the scores
    ],
)
def test_noise_that_a_second_weight_scales_is_no_router(scores, tracer):
    """Noisy top-k gating: the router is what stands beside the random numbers."""
    found = trace_back(scores, tracer)
    assert isinstance(found, Router), found
    assert found.weight is not None
    assert "router" in found.weight.name
    assert "second" not in found.weight.name


# name -> (function of (block, x), reason, evidence)
NONE = {
    "turned": (lambda b, x: F.linear(x, b.router).softmax(-1).T, SkipReason.EXPERT_CHOICE, Evidence.SELECTION),
    "no weight": (lambda b, x: torch.cat([x, x], -1), SkipReason.NO_ROUTER, Evidence.SELECTION),
    "two weights": (
        lambda b, x: F.linear(x, b.router) + F.linear(x, b.second),
        SkipReason.AMBIGUOUS_ROUTER,
        Evidence.SELECTION,
    ),
    "product keys": (
        lambda b, x: F.linear(x, b.router).topk(3)[0][:, :, None] + F.linear(x, b.second).topk(3)[0][:, None],
        SkipReason.PRODUCT_KEYS,
        Evidence.SELECTION,
    ),
}


@pytest.mark.parametrize("tracer", ["dynamo", "export"])
@pytest.mark.parametrize("name", NONE)
def test_no_router(name, tracer):
    """Every refusal says what was found, and how far the questions got."""
    function, reason, evidence = NONE[name]
    graph = TRACERS[tracer](Scored(function), rows())
    selection = [node for node in graph.graph.nodes if nodes.kind(node) == "topk"][-1]
    found = trace_router(nodes.operand(selection), nodes.last_size(nodes.operand(selection)))
    assert isinstance(found, Skip), found
    assert (found.reason, found.evidence) == (reason, evidence)
    assert found.detail


TOKENS = 4


def traced(write, columns=EXPERTS):
    """What is said of the scores that `write(written, x, weight)` writes, with x and the weight."""
    w = Written()
    x, weight = w.given(TOKENS, HIDDEN), w.weight(EXPERTS, HIDDEN)
    return trace_router(write(w, x, weight), columns), x, weight


# Ways to project, all of one weight [E, H] or its transpose.
PROJECTIONS = {
    "linear": lambda w, x, r: w.call(F.linear, x, r),
    "linear with a bias": lambda w, x, r: w.call(F.linear, x, r, w.weight(EXPERTS)),
    "linear by keywords": lambda w, x, r: w.call(F.linear, x, weight=r),
    "linear by keywords alone": lambda w, x, r: w.call(F.linear, input=x, weight=r),
    "matmul": lambda w, x, r: w.call(torch.matmul, x, w.call(torch.t, r)),
    "addmm": lambda w, x, r: w.call(torch.addmm, w.weight(EXPERTS), x, w.call(torch.t, r)),
    "einsum": lambda w, x, r: w.call(torch.einsum, "th,eh->te", x, r),
    "einsum of a list": lambda w, x, r: w.call(torch.einsum, "th,eh->te", [x, r]),
    "cdist": lambda w, x, r: w.call(torch.cdist, x, r),
    "bmm": lambda w, x, r: w.call(
        torch.squeeze, w.call(torch.bmm, w.call(torch.unsqueeze, x, 0), w.call("unsqueeze", w.call(torch.t, r), 0)), 0
    ),
    "a cast weight": lambda w, x, r: w.call(F.linear, w.call("double", x), w.call("double", w.call("float", r))),
    "the weight first": lambda w, x, r: w.call(torch.t, w.call(torch.matmul, r, w.call(torch.t, x))),
    "the weight first, permuted": lambda w, x, r: w.call(
        torch.permute, w.call(torch.matmul, r, w.call("permute", x, 1, 0)), [1, 0]
    ),
    "turned there and back": lambda w, x, r: w.call(torch.t, w.call("permute", w.call(F.linear, x, r), (1, 0))),
    "a sum of products": lambda w, x, r: w.call(torch.sum, w.call(torch.mul, w.call("unsqueeze", x, -2), r), -1),
    "the weight's product": lambda w, x, r: w.call("sum", w.call(torch.mul, r, w.call("unsqueeze", x, 1)), [2]),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_every_way_to_project(name):
    function = PROJECTIONS[name]
    found, x, weight = traced(function)
    assert isinstance(found, Router), found
    assert found.weight is weight
    assert nodes.behind(found.hidden, nodes.VALUE_PRESERVING) is x
    assert (found.scoring, found.columns) == ("raw logits", EXPERTS)
    assert nodes.last_size(found.projection) == EXPERTS


def linear(w, x, r):
    return w.call(F.linear, x, r)


# What is done to the logits, and its name.
SCORED = {
    "added to": (lambda w, s: w.call(torch.add, s, w.weight(EXPERTS)), "raw logits"),
    "scaled": (lambda w, s: w.call(torch.mul, 2.0, s), "raw logits"),
    "scaled by token": (lambda w, s: w.call(torch.div, s, w.call(torch.exp, w.given(TOKENS, 1))), "raw logits"),
    "masked": (lambda w, s: w.call(torch.where, w.call(torch.gt, s, 0), s, -1.0), "raw logits"),
    "clamped": (lambda w, s: w.call("clamp", s, 0), "raw logits"),
    "joined": (lambda w, s: w.call(torch.add, w.call(torch.exp, s), w.call(torch.tanh, s)), "exp + tanh|tanh + exp"),
    "met twice": (lambda w, s: w.call(torch.add, s := w.call(torch.exp, s), w.call(torch.mul, s, 2)), "exp"),
    "two in a row": (lambda w, s: w.call(torch.sqrt, w.call(torch.exp, s)), "exp + sqrt"),
    "written by a decomposition": (
        lambda w, s: w.pick(w.call(torch.ops.aten.native_layer_norm.default, s, [EXPERTS], None, None, 1e-5), 0),
        "layer_norm",
    ),
    "with a norm's own parameters": (
        lambda w, s: w.pick(
            w.call(torch.ops.aten.native_layer_norm.default, s, [EXPERTS], w.weight(EXPERTS), w.weight(EXPERTS), 1e-5),
            0,
        ),
        "layer_norm",
    ),
    "log of sigmoid": (lambda w, s: w.pick(w.call(torch.ops.aten.log_sigmoid_forward.default, s), 0), "logsigmoid"),
    "a new dimension": (lambda w, s: w.call("view", s, TOKENS, 1, EXPERTS), "raw logits"),
    "ones moved": (
        lambda w, s: w.call(torch.permute, w.call("view", s, TOKENS, 1, EXPERTS), (1, 0, 2)),
        "raw logits",
    ),
}


@pytest.mark.parametrize("name", SCORED)
def test_what_shapes_scores(name):
    function, scoring = SCORED[name]
    found, x, weight = traced(lambda w, x, r: function(w, linear(w, x, r)))
    assert isinstance(found, Router), found
    assert (found.weight, found.hidden) == (weight, x)
    assert found.scoring in scoring.split("|")


def test_further_columns_are_cut_off():
    """Also where a tensor is split; without a cut, sizes have to agree."""

    def wide(w, x, r):
        return w.call(F.linear, x, w.weight(2 * EXPERTS, HIDDEN))

    for cut in (
        lambda w, s: w.pick(s, (slice(None), slice(0, EXPERTS))),
        lambda w, s: w.call("narrow", s, 1, 3, EXPERTS),
        lambda w, s: w.pick(w.call(torch.split, s, EXPERTS, 1), 1),
    ):
        found, x, _ = traced(lambda w, x, r, cut=cut: cut(w, wide(w, x, r)))
        assert isinstance(found, Router), found
        assert (found.columns, nodes.last_size(found.projection), found.hidden) == (EXPERTS, 2 * EXPERTS, x)
    skip, _, _ = traced(lambda w, x, r: w.call("view", wide(w, x, r), -1, EXPERTS))
    assert (skip.reason, skip.evidence) == (SkipReason.ROUTER_SIZE, Evidence.ROUTER)
    assert skip.detail == f"{2 * EXPERTS} columns, {EXPERTS} scores"
    assert nodes.kind(skip.node) == "linear"
    # A cut to another width than the scores' explains nothing.
    skip, _, _ = traced(lambda w, x, r: w.call("reshape", w.pick(wide(w, x, r), (slice(None), slice(0, 4))), -1, 8))
    assert skip.reason is SkipReason.ROUTER_SIZE


def test_what_moves_experts_is_not_looked_through():
    """With the arguments of a transpose."""
    skip, _, _ = traced(lambda w, x, r: w.call(torch.roll, w.call(torch.roll, linear(w, x, r), 1, 0), 1, 0))
    assert skip.detail.startswith("stopped at roll")


def test_a_permutation_that_turns_nothing():
    """`weight @ hidden.T` has one column for each token: the weight gives none of them."""
    found, _, weight = traced(
        lambda w, x, r: w.call(torch.permute, w.call(torch.matmul, r, w.call(torch.t, x)), [0, 1]), TOKENS
    )
    assert isinstance(found, Skip) or found.weight is not weight


def test_rows_are_no_columns():
    skip, _, _ = traced(lambda w, x, r: w.pick(linear(w, x, r), slice(1, 3)))
    assert (skip.reason, skip.evidence) == (SkipReason.NO_ROUTER, Evidence.SELECTION)
    assert skip.detail == "stopped at getitem, a slice"


@pytest.mark.parametrize(
    ("write", "detail"),
    [
        (lambda w, x, r: w.given(TOKENS, EXPERTS), "a placeholder"),
        (lambda w, x, r: w.call(torch.add, w.given(TOKENS, HIDDEN), w.call(torch.cumsum, x, 1)), "stopped at cumsum"),
        (lambda w, x, r: w.call(torch.add, w.call(torch.cumsum, x, 1), w.given(TOKENS, HIDDEN)), "stopped at cumsum"),
        (lambda w, x, r: w.call(torch.neg, w.call(torch.cumsum, x, 1)), "stopped at cumsum, a cumsum"),
        (lambda w, x, r: w.call(torch.matmul, x, w.call(torch.cumsum, w.weight(6, 6, 1), 0)), "stopped at matmul"),
        (lambda w, x, r: w.call(torch.t, w.call(F.linear, x, r)), "linear|t"),
    ],
    ids=[
        "an input",
        "computed before inputs",
        "inputs before computed",
        "no projection",
        "a weight of another size",
        "turned",
    ],
)
def test_where_the_search_stopped(write, detail):
    skip, _, _ = traced(write, HIDDEN)
    assert isinstance(skip, Skip)
    assert any(part in skip.detail for part in detail.split("|")), skip.detail
    assert skip.evidence is Evidence.SELECTION


def test_scores_of_two_selections():
    """Product keys, seen through views, slices and both ways to take the values."""

    def values(w, scores, by_name):
        best = w.call(torch.topk, scores, 2)
        return w.call(getattr, best, "values") if by_name else w.pick(best, 0)

    for by_name in (False, True):
        for dim in (None, 0):

            def write(w, x, r, by_name=by_name, dim=dim):
                left, right = (values(w, linear(w, x, r), by_name) for _ in range(2))
                left, right = w.call("unsqueeze", left, 2), w.call("unsqueeze", right, 1)
                if dim is not None:
                    left, right = (w.pick(s, slice(0, 3)) for s in (left, right))
                return w.call(torch.add, left, right)

            skip, _, _ = traced(write, 2)
            assert skip.reason is SkipReason.PRODUCT_KEYS
            assert skip.detail == "topk, topk_1"
            assert skip.evidence is Evidence.SELECTION
    one, _, _ = traced(lambda w, x, r: w.call("unsqueeze", values(w, linear(w, x, r), False), 2), 2)
    assert one.reason is SkipReason.NO_ROUTER


def test_experts_that_choose():
    """Scores whose columns come before the tokens; of anything else that is turned nothing is known."""
    for turn in (lambda w, s: w.call(torch.t, s), lambda w, s: w.call(torch.permute, s, (1, 0))):
        skip, _, _ = traced(lambda w, x, r, turn=turn: turn(w, w.call(torch.softmax, linear(w, x, r), -1)), TOKENS)
        assert (skip.reason, skip.evidence) == (SkipReason.EXPERT_CHOICE, Evidence.SELECTION)
        assert skip.detail in ("t", "permute")
    skip, _, _ = traced(lambda w, x, r: w.call(torch.t, w.call(torch.cumsum, linear(w, x, r), 1)), TOKENS)
    assert skip.reason is SkipReason.NO_ROUTER


def test_two_routers():
    def write(w, x, r):
        return w.call(torch.add, linear(w, x, r), linear(w, x, w.weight(EXPERTS, HIDDEN)))

    skip, _, weight = traced(write)
    assert (skip.reason, skip.evidence) == (SkipReason.AMBIGUOUS_ROUTER, Evidence.SELECTION)
    assert skip.detail.split(", ") == sorted(skip.detail.split(", "))
    assert weight.name in skip.detail
    one, _, _ = traced(lambda w, x, r: w.call(torch.add, linear(w, x, r), linear(w, w.call(torch.neg, x), r)))
    assert isinstance(one, Router)


def test_noise_is_looked_through_last():
    """Random numbers times a projection are no router beside one, and are one where there is no other."""

    def noise(w, x, weight, random=torch.randn_like):
        size = w.call(F.linear, x, weight)
        return w.call(torch.mul, w.call(torch.detach, w.call(random, size)), w.call(F.softplus, size))

    found, _, weight = traced(lambda w, x, r: w.call(torch.add, linear(w, x, r), noise(w, x, w.weight(8, HIDDEN))))
    assert found.weight is weight
    found, _, weight = traced(lambda w, x, r: w.call(torch.add, noise(w, x, r), w.weight(EXPERTS)))
    assert (found.weight, found.scoring) == (weight, "softplus")
    skip, _, _ = traced(
        lambda w, x, r: w.call(torch.add, linear(w, x, r), noise(w, x, w.weight(8, HIDDEN), torch.zeros_like))
    )
    assert skip.reason is SkipReason.AMBIGUOUS_ROUTER


def to_local(x):
    return x * 1


def redistribute(x):
    return x * 1


def from_local(x):
    return x * 1


class TestDistributed:
    """`to_local` of a product of distributed tensors is the projection of what they were made of."""

    def test_what_was_projected(self):
        def write(w, x, r):
            whole = w.call(redistribute, w.call(from_local, x))
            product = w.call(redistribute, w.call(F.linear, whole, r))
            return w.call(to_local, product)

        found, x, weight = traced(write)
        assert (found.hidden, found.weight) == (x, weight)
        assert nodes.kind(found.projection) == "to_local"

    def test_anything_else(self):
        """No product, a part of the columns, no weight."""

        def half(x):
            return x[:, :4] * 1

        half.__name__ = "to_local"
        for write in (
            lambda w, x, r: w.call(to_local, w.call(torch.cumsum, linear(w, x, r), 1)),
            lambda w, x, r: w.call(half, linear(w, x, r)),
            lambda w, x, r: w.call(to_local, w.call(torch.matmul, x, w.call(torch.exp, w.given(HIDDEN, EXPERTS)))),
            lambda w, x, r: w.graph.call_function(to_local, (3,)),
        ):  # fmt: skip
            skip, _, _ = traced(write)
            assert isinstance(skip, Skip)


@pytest.mark.parametrize(
    "write",
    [
        lambda w, x, r: w.call(torch.sum, w.call(torch.mul, w.call("unsqueeze", x, -2), r), -1, True),
        lambda w, x, r: w.call(torch.sum, w.call(torch.mul, w.call("unsqueeze", x, -2), r), 1),
        lambda w, x, r: w.call(torch.sum, w.call(torch.mul, w.call("unsqueeze", x, -2), r), [1, 2]),
        lambda w, x, r: w.call(torch.sum, w.call(torch.add, w.call("unsqueeze", x, -2), r), -1),
        lambda w, x, r: w.call(torch.mean, w.call(torch.mul, w.call("unsqueeze", x, -2), r), -1),
        lambda w, x, r: w.call(torch.sum, w.call(torch.mul, w.call("unsqueeze", x, -2), w.given(8, 6)), -1),
        lambda w, x, r: w.call(torch.sum, w.call(torch.mul, w.call("unsqueeze", x, -2), w.weight(4, 8, 6)), -1),
        lambda w, x, r: w.call(torch.sum, w.mul(w.call("unsqueeze", x, -2), w.call(torch.exp, w.given(8, 6))), -1),
        lambda w, x, r: w.call(torch.sum, w.call(torch.mul, r, 2.0), -1),
        lambda w, x, r: w.call(torch.t, w.call(torch.matmul, w.given(8, 6), w.call(torch.t, x))),
        lambda w, x, r: w.call(torch.t, w.call(torch.matmul, r, w.given(6, 4))),
        lambda w, x, r: w.call(torch.t, w.call(torch.add, w.given(8, 4), w.call(torch.t, w.given(4, 8)))),
        lambda w, x, r: w.call(torch.sum, w.given(8), 0),
    ],
    ids=[
        "a column stays", "another dimension", "two dimensions", "a sum", "a mean", "no parameter", "weights by token",
        "a computed factor",
        "by a number", "no parameter first", "what is not turned", "an addition turned", "one dimension",
    ],
)  # fmt: skip
def test_what_is_no_product_written_out(write):
    skip, _, _ = traced(write)
    assert isinstance(skip, Skip)


def negated(w, node, times):
    """A node, negated so often."""
    for _ in range(times):
        node = w.call(torch.neg, node)
    return node


class TestComputedWeights:
    """A weight that is computed of the model's own is known by the matrix that has its sizes."""

    @pytest.mark.parametrize(
        "compute",
        [
            lambda w, r: w.call(torch.mul, r, 2.0),
            lambda w, r: w.call(torch.div, r, w.call("norm", r, 2, -1, True)),
            lambda w, r: w.call(torch.add, r, w.call(torch.matmul, w.weight(EXPERTS, 2), w.weight(2, HIDDEN))),
            lambda w, r: w.call(torch.mul, r, w.weight(EXPERTS, 1)),
            lambda w, r: w.call("contiguous", w.call(torch.mul, r, w.weight(HIDDEN))),
        ],
        ids=["scaled", "normed", "with small matrices", "with a column", "with a vector"],
    )
    def test_found(self, compute):
        found, _, weight = traced(lambda w, x, r: w.call(F.linear, x, compute(w, r)))
        assert isinstance(found, Router), found
        assert found.weight is weight

    @pytest.mark.parametrize(
        "compute",
        [
            lambda w, x, r: w.call(torch.mul, r, w.given(HIDDEN)),
            lambda w, x, r: w.call(torch.add, r, w.weight(EXPERTS, HIDDEN)),
            lambda w, x, r: w.call(torch.outer, w.weight(EXPERTS), w.weight(HIDDEN)),
            lambda w, x, r: negated(w, r, 30),
            lambda w, x, r: w.mul(r, negated(w, w.given(HIDDEN), 30)),
            lambda w, x, r: w.mul(negated(w, w.given(HIDDEN), 30), r),
            lambda w, x, r: w.call(
                torch.mul, w.input(nn.Parameter(torch.ones(EXPERTS, HIDDEN, dtype=torch.int8), False)), 2.0
            ),
        ],
        ids=[
            "with an input",
            "two of its sizes",
            "of vectors",
            "far away",
            "times an input far away",
            "an input far away",
            "whole numbers",
        ],
    )
    def test_not_found(self, compute):
        skip, _, _ = traced(lambda w, x, r: w.call(F.linear, x, compute(w, x, r)))
        assert isinstance(skip, Skip)
        assert "stopped at linear" in skip.detail

    def test_sizes_that_nobody_recorded(self):
        """They tell none of two matrices apart; where there is but one, they need not."""

        def write(w, x, factor):
            made = w.call(F.linear, x, w.weight(EXPERTS, HIDDEN))
            projection = w.graph.call_function(F.linear, (x, factor))
            projection.meta.update(made.meta)
            return projection

        skip, _, _ = traced(lambda w, x, r: write(w, x, w.graph.call_function(torch.add, (r, w.weight(2, HIDDEN)))))
        assert isinstance(skip, Skip)
        found, _, weight = traced(lambda w, x, r: write(w, x, w.graph.call_function(torch.mul, (r, 2.0))))
        assert found.weight is weight

    def test_within_some_steps(self):
        found, _, weight = traced(lambda w, x, r: w.call(F.linear, x, negated(w, r, 20)))
        assert found.weight is weight
