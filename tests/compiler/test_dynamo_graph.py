"""`DynamoGraph`: a copy of one of Dynamo's graphs, and the inputs behind its own ones."""

import types

import pytest
import torch
from torch import nn

from sere_compile.compiler import dynamo_graph
from sere_compile.compiler.dynamo_graph import AppendedInput, DynamoGraph, GraphInputs

from ..passes.moe_modules import from_dynamo

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.weight


def graph_of(**options):
    return from_dynamo(Scaled(), torch.ones(2, 3), **options)


def plan_of(graph, position=0):
    weight = graph.own_inputs.nodes[position]
    return types.SimpleNamespace(gate=types.SimpleNamespace(router_weight=weight))


class TestWhatInputsHold:
    def test_values_of_a_call(self):
        traced = graph_of()
        traced.register_buffer("table", torch.arange(3))
        with traced.graph.inserting_before(next(iter(traced.graph.nodes))):
            attribute = traced.graph.get_attr("table")
        inputs = GraphInputs(traced)
        assert [node.op for node in inputs.nodes] == ["placeholder"] * 2
        value_of = inputs.values_of(["first", "second"])
        assert [value_of(node) for node in inputs.nodes] == ["first", "second"]
        assert value_of(attribute) is traced.table
        assert value_of(traced.graph.output_node()) is None
        assert inputs.values_of(["first"])(inputs.nodes[1]) is None

    def test_sizes_are_numbers(self):
        """Those of the call that is compiled, without asking the symbol."""
        traced = graph_of(dynamic=True)
        graph = DynamoGraph(traced, traced.captured_inputs)
        held = [graph.value_of(node) for node in graph.own_inputs.nodes]
        assert [value for value in held if not isinstance(value, torch.Tensor)] == [2]
        assert not any(isinstance(value, torch.SymInt) for value in held)


def test_statistics_read_tables_of_their_own(monkeypatch):
    """In the copy, before anything is looked for."""
    separated = []
    monkeypatch.setattr(dynamo_graph, "separate_statistics", separated.append)
    traced = graph_of()
    graph = DynamoGraph(traced, traced.captured_inputs)
    assert separated == [graph.module.graph]


def test_a_graph_that_is_broken_is_not_run():
    traced = graph_of()
    graph = DynamoGraph(traced, traced.captured_inputs)
    with graph.module.graph.inserting_before(next(iter(graph.module.graph.nodes))):
        graph.module.graph.call_function(torch.exp, (graph.own_inputs.nodes[0],))
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        graph.finish()


@pytest.mark.parametrize(
    ("enabled", "requires", "has"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_a_call_that_may_ask_for_gradients(enabled, requires, has):
    inputs = [torch.ones(3, requires_grad=requires), 7]
    with torch.set_grad_enabled(enabled):
        assert DynamoGraph(graph_of(), inputs).has_gradients is has


class TestPlaces:
    def graph(self):
        traced = graph_of()
        return DynamoGraph(traced, traced.captured_inputs), traced

    def test_behind_the_own_inputs(self):
        graph, traced = self.graph()
        first, second = plan_of(graph), plan_of(graph, 1)
        value = torch.rand(4, 4)
        node = graph.place(first, "similarity", value)
        assert graph.place(first, "similarity", value) is node
        others = [graph.place(first, "projection", value), graph.place(second, "similarity", value)]
        assert [n.target for n in (node, *others)] == ["sere_similarity_2", "sere_projection_3", "sere_similarity_4"]
        assert list(graph.module.graph.find_nodes(op="placeholder"))[2:] == [node, *others]
        assert len(graph.inputs) == 5
        assert graph.appended == [
            AppendedInput(first, "similarity"), AppendedInput(first, "projection"), AppendedInput(second, "similarity")
        ]  # fmt: skip
        assert len(traced.graph.find_nodes(op="placeholder")) == 2, "Dynamo's own graph stays"
        assert len(graph.own_inputs.nodes) == 2

    def test_one_weight_of_two_gates_has_one_place(self):
        graph, _ = self.graph()
        assert graph.place(plan_of(graph), "counts", torch.ones(2)) is graph.place(
            plan_of(graph), "counts", torch.ones(2)
        )
        assert len(graph.appended) == 1

    def test_what_is_not_read_is_dropped(self):
        """The last first; what another gate reads, and counters, stay."""
        graph, _ = self.graph()
        plan = plan_of(graph)
        for kind in ("counts", "similarity", "projection"):
            graph.place(plan, kind, torch.rand(4, 4))
        graph.drop_unused(plan)
        assert [item.kind for item in graph.appended] == ["counts"]
        assert len(graph.inputs) == 3
        assert len(graph.module.graph.find_nodes(op="placeholder")) == 3
        graph.drop_unused(plan)
        assert [item.kind for item in graph.appended] == ["counts"]
        node = graph.place(plan, "similarity", torch.rand(4, 4))
        with graph.module.graph.inserting_after(node):
            graph.module.graph.call_function(torch.exp, (node,))
        graph.drop_unused(plan)
        assert [item.kind for item in graph.appended] == ["counts", "similarity"]

    def test_the_rewritten_graph_runs(self):
        graph, _ = self.graph()
        node = graph.place(plan_of(graph), "similarity", torch.rand(3))
        [product] = [n for n in graph.module.graph.nodes if n.op == "call_function"]
        product.replace_input_with(graph.own_inputs.nodes[1], node)
        done = graph.finish()
        assert done is graph.module
        values = dict.fromkeys(graph.own_inputs.nodes, torch.ones(2, 3))
        assert torch.equal(done(*values.values(), torch.full((3,), 5.0))[0], torch.full((2, 3), 5.0))
