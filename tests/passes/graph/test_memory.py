"""`memory`: what an operation writes in place, and who sees it."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph

from sere_compile.passes.graph import nodes

from ..moe_modules import TRACERS, from_dynamo
from .calls import calls, graph_of


class TestWrites:
    IN_PLACE = (
        ("method", lambda x: x.div_(2)),
        ("out", lambda x: torch.add(x, 1, out=x)),
        ("flag", lambda x: F.relu(x, inplace=True)),
    )

    @pytest.mark.parametrize(("name", "function"), IN_PLACE)
    @pytest.mark.parametrize("tracer", ["dynamo", "export"])
    def test_in_place(self, name, function, tracer):
        """The written operand is known for every way to write in place."""
        graph = graph_of(lambda m, x, ids: function(x + 1), TRACERS[tracer])
        written = [source for node in calls(graph) for source in nodes.writes(node)]
        assert [nodes.kind(source) for source in written] == ["add"]

    @pytest.mark.parametrize(
        "function", [operator.iadd, operator.imod, operator.ifloordiv, operator.itruediv, operator.ipow]
    )
    def test_operators(self, function):
        """Python's in-place operators, which Dynamo keeps, write their left side."""
        graph = graph_of(lambda m, x, ids: function(x + 1, 2.0), from_dynamo)
        assert [nodes.kind(n) for node in calls(graph) for n in nodes.writes(node)] == ["add"]

    def test_pure_operations_write_nothing(self):
        """Reading is not writing."""
        graph = graph_of(lambda m, x, ids: (x / 2).softmax(-1)[ids])
        assert not any(nodes.writes(node) for node in graph.graph.nodes)

    def test_followers_of_a_write_without_users(self):
        """What reads the tensor after an in-place operation on a view of it follows that operation."""
        graph = Graph()
        x = graph.placeholder("x")
        x.meta["val"] = torch.zeros(3, 4)
        early = graph.call_function(torch.relu, (x,))
        view = graph.call_method("view", (x, -1))
        write = graph.call_method("add_", (view, 1))
        late = graph.call_function(torch.relu, (x,))
        graph.output((early, late))
        assert nodes.followers(write) == [late]
        assert nodes.writers(x) == [write]
