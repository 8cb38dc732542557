"""`values`: what the tracer recorded of a node's result, and where in the user's code it came from."""

import pytest
import torch
from torch.fx import Graph, GraphModule, symbolic_trace

from sere_compile.passes.graph import nodes

from ..moe_modules import TRACERS, Indexed, from_dynamo, from_make_fx, rows
from .calls import Call, find, graph_of


class TestValues:
    @pytest.mark.parametrize("tracer", TRACERS)
    def test_sizes(self, tracer):
        """Shapes are known under every tracer, also of attributes."""
        graph = TRACERS[tracer](Indexed(), rows())
        shapes = {nodes.shape(node) for node in graph.graph.nodes if nodes.is_tensor(node)}
        assert {(10, 8), (10, 3), (8, 6), (8, 6, 6)} <= shapes
        assert nodes.last_size(find(graph, "softmax")) == 8

    def test_nothing_recorded(self):
        """Without recorded shapes the answers are None, not errors."""
        node = find(symbolic_trace(Call(lambda m, x, ids: x.softmax(-1))), "softmax")
        assert (nodes.shape(node), nodes.last_size(node), nodes.is_tensor(node)) == (None, None, False)
        assert not nodes.same_shape(node, node)

    def test_symbolic_sizes(self):
        """Symbolic sizes compare by their name, and their product without a guard."""
        batch, width = torch.export.Dim("batch"), torch.export.Dim("width")
        graph = graph_of(
            lambda m, x, ids: (x * 2, x.sum(-1, keepdim=True), x + 1),
            dynamic_shapes=({0: batch, 1: width}, {0: torch.export.Dim("other")}),
        )
        double, total, one_more = find(graph, "mul"), find(graph, "sum"), find(graph, "add")
        assert nodes.same_shape(double, one_more)
        assert not nodes.same_shape(double, total)
        assert nodes.last_size(double) is None
        assert nodes.leading_count(double) == nodes.leading_count(total)
        assert nodes.leading_count(double) != nodes.leading_count(find(graph, "placeholder").next)

    def test_shape_in_call(self):
        """Symbolic sizes become those of one call, and the graph keeps its symbols."""
        graph = graph_of(lambda m, x, ids: torch.cat([x, x]) @ m.weight, from_dynamo, dynamic=True)
        product = find(graph, "matmul")
        symbol = next(node for node in graph.graph.nodes if isinstance(nodes.value(node), torch.SymInt))
        assert nodes.shape_in_call(product, {symbol: 5}) == (10, 6)
        assert nodes.shape_in_call(product, {symbol: 7}) == (14, 6)
        assert isinstance(nodes.shape(product)[0], torch.SymInt)


class TestSourceLine:
    @pytest.mark.parametrize("tracer", ["dynamo", "export"])
    def test_names_the_innermost_line_of_the_user(self, tracer):
        """Reports point at the user's file."""
        graph = TRACERS[tracer](Indexed(), rows())
        assert nodes.source_line(find(graph, "topk")).startswith("moe_modules.py:")

    def test_without_stack_trace(self):
        """make_fx keeps none by default: an empty text."""
        assert nodes.source_line(find(from_make_fx(Indexed(), rows()), "topk")) == ""

    def test_place(self):
        """A refusal names the node, and the line where there is one."""
        traced, bare = (find(trace(Indexed(), rows()), "topk") for trace in (TRACERS["export"], from_make_fx))
        assert nodes.place(traced) == f"{traced.name} at {nodes.source_line(traced)}"
        assert nodes.place(bare) == bare.name


def test_graph_module_without_owner():
    """An attribute of a graph that belongs to no module has no value, and raises nothing."""
    graph = Graph()
    assert nodes.value(graph.get_attr("weight")) is None
    assert nodes.value(GraphModule({"weight": torch.ones(2)}, graph).graph.find_nodes(op="get_attr")[0]) is not None
