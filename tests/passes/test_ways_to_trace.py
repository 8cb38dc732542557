"""Gates under every way to trace, under casts, two in a layer; and what `explain` says of what was nearly one."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sere_compile
from sere_compile.passes import SkipReason, find_gates
from sere_compile.passes.graph import nodes
from sere_compile.passes.graph.run_part import plain_number

from .moe_modules import (
    EXPERTS,
    HIDDEN,
    TRACERS,
    BiasCorrected,
    ExpertLoop,
    Grouped,
    Indexed,
    ScatterCombine,
    expected,
    from_dynamo,
    from_export,
    one_gate,
    reroute,
    rows,
    run,
    similarity,
)
from .test_find_gates import Function, Routed, pick


def cast_weights(b, x):
    ids, values = pick(F.linear(x.float(), b.router.float()).softmax(-1))
    return ids, (values / values.sum(-1, keepdim=True)).to(x.dtype)


# Where models in bfloat16 cast: scores, router and input, hidden states alone, or nothing.
CASTS = {
    "scores": lambda b, x: pick(F.softmax(F.linear(x, b.router), -1, dtype=torch.float32).to(x.dtype)),
    "router and input": cast_weights,
    "there and back": lambda b, x: pick(F.linear(x.double(), b.router.to(torch.float64)).float().bfloat16().sigmoid()),
    "type_as": lambda b, x: pick(F.linear(x.float(), b.router.type(torch.float32)).type_as(x)),
    "nothing": lambda b, x: pick(F.linear(x, b.router).softmax(-1)),
}


class TwoRouters(nn.Module):
    """A layer whose attention and MLP have experts, and a router each."""

    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Indexed(), Grouped()

    def forward(self, x):
        y = x + self.attention(x)
        mixed = torch.softmax(y @ y.T, -1) @ y
        return mixed + self.mlp(mixed)


def from_strict_export(module, *inputs):
    with torch.no_grad():
        return torch.export.export(module, inputs, strict=True).module()


def from_decomposed_export(module, *inputs):
    with torch.no_grad():
        return torch.export.export(module, inputs).run_decompositions().module()


def from_dynamic_dynamo(module, *inputs):
    graph = from_dynamo(module, *inputs, dynamic=True)
    graph.captured_inputs = [plain_number(value) for value in graph.captured_inputs]
    return graph


def from_dynamic_export(module, *inputs):
    return from_export(module, *inputs, dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))


FURTHER_TRACERS = {
    "strict export": from_strict_export,
    "decomposed export": from_decomposed_export,
    "dynamic Dynamo": from_dynamic_dynamo,
    "dynamic export": from_dynamic_export,
}


@pytest.mark.parametrize("tracer", TRACERS | FURTHER_TRACERS)
class TestEveryWayToTrace:
    def test_two_routers_in_a_layer(self, tracer):
        """Each is found with its own weight and experts."""
        graph = (TRACERS | FURTHER_TRACERS)[tracer](TwoRouters(), rows())
        found = find_gates(graph).gates
        assert [gate.dispatch for gate in found] == ["indexed weights", "grouped by expert"]
        assert len({gate.router_weight for gate in found}) == 2

    @pytest.mark.parametrize("module", [Indexed, Grouped, ScatterCombine, BiasCorrected, ExpertLoop])
    def test_same_numbers(self, module, tracer):
        """Whatever the tracer writes, the rewritten graph gives what SERE defines."""
        block, x = module(), rows()
        graph = (TRACERS | FURTHER_TRACERS)[tracer](block, x)
        reroute(graph)
        with torch.no_grad():
            torch.testing.assert_close(run(graph, x), expected(block, x, similarity(), 1), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("casts", CASTS)
    def test_bfloat16_cast_chains(self, casts, tracer):
        """A model in bfloat16 casts around its router in many ways; the router's weight is found behind all."""
        module = Routed(CASTS[casts]).bfloat16()
        gate = one_gate((TRACERS | FURTHER_TRACERS)[tracer](module, rows().bfloat16()))
        assert nodes.shape(gate.router_weight) == (EXPERTS, HIDDEN)
        assert gate.num_experts == EXPERTS


# name -> (a selection that is nearly a gate, what is missing of it)
NEARLY = {
    "over tokens": (lambda b, x: torch.topk(b.scores(x), 2, dim=0)[1], SkipReason.NOT_LAST_DIM),
    "no projection": (lambda b, x: b.experts[torch.topk(x.cumsum(-1), 2)[1]], SkipReason.NO_ROUTER),
    "two projections": (
        lambda b, x: b.experts[torch.topk(F.linear(x, b.router) + F.linear(x, b.labels.weight), 2)[1]],
        SkipReason.AMBIGUOUS_ROUTER,
    ),
    "in groups": (lambda b, x: torch.topk(F.linear(x, b.router).view(-1, 2, 4), 2)[1], SkipReason.ROUTER_SIZE),
    "values only": (lambda b, x: torch.topk(b.scores(x), 2)[0].sum(-1), SkipReason.NO_IDS),
    "no experts": (lambda b, x: b.labels(torch.topk(b.scores(x), 1)[1]), SkipReason.NO_DISPATCH),
    "argmax without experts": (lambda b, x: b.labels(b.scores(x).argmax(-1)), SkipReason.NO_DISPATCH),
    "the worst": (lambda b, x: b.experts[torch.topk(b.scores(x), 2, largest=False)[1]], SkipReason.SMALLEST),
}


@pytest.mark.parametrize("name", NEARLY)
def test_explain_says_what_was_missing_and_where(name):
    """The row of a near miss names the evidence that failed, and the line of the user's source."""
    function, reason = NEARLY[name]
    module = Function(function)
    torch._dynamo.reset()
    [row] = [row for row in sere_compile.explain(module, rows()) if row.num_experts is None]
    assert row.status == "skipped"
    assert row.reason.startswith(reason.value)
    first = function.__code__.co_firstlineno
    place = re.search(r"\(test_ways_to_trace\.py:(\d+)\)", row.name)
    assert place, row.name
    assert first <= int(place.group(1)) <= first + 2
