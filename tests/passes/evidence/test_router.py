"""`trace_router`: from scores back to the projection by a router weight, or why there is none."""

import pytest
import torch
import torch.nn.functional as F

from sere_compile.passes import Evidence, Skip, SkipReason
from sere_compile.passes.evidence.router import Router, trace_router
from sere_compile.passes.graph import nodes

from ..moe_modules import EXPERTS, HIDDEN, TRACERS, Block, rows


class Scored(Block):
    """Selects from what a function of (block, x) makes."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.second = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.wide = torch.nn.Parameter(torch.randn(EXPERTS + 2, HIDDEN))
        self.bias = torch.nn.Parameter(torch.randn(EXPERTS))
        self.up, self.down = torch.nn.Parameter(torch.randn(EXPERTS, 2)), torch.nn.Parameter(torch.randn(2, HIDDEN))
        self.length = torch.nn.Parameter(torch.rand(EXPERTS, 1) + 0.5)

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
