"""The graph behind `explain`: it reports, and computes what the program computes."""

import dataclasses

import pytest
import torch

from sere_compile import SereConfig
from sere_compile.compiler import observed_graph
from sere_compile.compiler.gate_plan import GatePlan
from sere_compile.compiler.observed_graph import ObservedGraph
from sere_compile.passes import Skip, SkipReason, extract_dispatch
from sere_compile.passes.graph.nodes import source_line
from sere_compile.report import SKIPPED
from sere_compile.similarity import binding

from ..passes.moe_modules import EXPERTS, Indexed, from_dynamo, one_gate, rows, similarity

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def told():
    """What is told while the test runs: rows, how often one graph was all of a call, and lines."""
    rows, whole, lines = [], [], []
    tokens = [
        (observed_graph.observer, observed_graph.observer.set(rows.append)),
        (observed_graph.on_whole_call, observed_graph.on_whole_call.set(lambda: whole.append(1))),
        (observed_graph.on_lines, observed_graph.on_lines.set(lines.append)),
    ]
    yield rows, whole, lines
    for variable, token in tokens:
        variable.reset(token)


def traced():
    """A module, its graph, the plan of its gate by the weight that a call brings, and a refused selection."""
    module, config = Indexed(), SereConfig(select_top_k=1)
    graph = from_dynamo(module, rows())
    gate = one_gate(graph)
    inputs = list(graph.graph.find_nodes(op="placeholder"))
    region = extract_dispatch(gate)
    plan = GatePlan(gate, "router", config, config, region, None, position=inputs.index(gate.router_weight))
    return module, graph, plan, Skip(SkipReason.NO_IDS, gate.selection, "none")


@pytest.mark.parametrize("whole_call", [True, False])
def test_reports_each_time_that_it_runs(whole_call, told):
    module, graph, plan, skip = traced()
    reported, whole, lines = told
    observed = ObservedGraph(graph, [plan], [skip], whole_call=whole_call)
    assert (reported, whole, lines) == ([], [], []), "tracing is no run"
    for _ in range(2):
        got = observed(*graph.captured_inputs)
        assert torch.equal(got[0], module(rows()))
    assert [(row.name, row.status) for row in reported] == [("router", "identity"), (skip_name(skip), SKIPPED)] * 2
    assert reported[0].num_experts == EXPERTS
    assert len(whole) == (2 if whole_call else 0)
    assert lines == [frozenset(map(source_line, graph.graph.nodes))] * 2
    assert any("moe_modules.py" in line for line in lines[0])


def skip_name(skip):
    return f"{skip.node.name} ({source_line(skip.node)})"


def test_a_gate_is_named_by_the_weight_of_the_call(told):
    """One graph serves many layers."""
    module, graph, plan, _ = traced()
    other, third = torch.rand_like(module.router), torch.rand_like(module.router)
    binding.assign(other, "layers.1.router", (similarity() + similarity().T) / 2, "profile")
    binding.name(third, "layers.2.router")
    observed = ObservedGraph(graph, [plan, dataclasses.replace(plan)], [], whole_call=True)
    for weight in (other, third):
        arguments = list(graph.captured_inputs)
        arguments[plan.position] = weight
        observed(*arguments)
    assert [row.name for row in told[0]] == ["layers.1.router"] * 2 + ["layers.2.router"] * 2


def test_nobody_needs_to_listen():
    module, graph, plan, skip = traced()
    got = ObservedGraph(graph, [plan], [skip], whole_call=True)(*graph.captured_inputs)
    assert torch.equal(got[0], module(rows()))
