"""`memory`: what an operation writes in place, and who sees it."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph

from sere_compile.passes.graph import nodes

from ..moe_modules import TRACERS, from_dynamo
from .calls import calls, graph_of


@torch.library.custom_op("sere_tests::doubled", mutates_args=["x"])
def doubled(x: torch.Tensor) -> None:
    x.mul_(2)


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

    def test_lists_and_operators_without_an_overload(self):
        """`torch._foreach_mul_` writes each of a list; a custom operator what its schema says."""
        graph = Graph()
        x, y = graph.placeholder("x"), graph.placeholder("y")
        listed = graph.call_function(torch._foreach_mul_, ([x, y], 2.0))
        assert nodes.writes(listed) == [x, y]
        assert nodes.writers(y) == [listed]
        scaled = graph.call_function(torch.ops.sere_tests.doubled, (x,))
        assert nodes.writes(scaled) == [x]

    @pytest.mark.parametrize("tracer", ["dynamo", "export"])
    @pytest.mark.parametrize(
        ("function", "written"),
        [
            (lambda x, mean, var: F.batch_norm(x, mean, var, training=True), 2),
            (lambda x, mean, var: F.batch_norm(x, mean, var), 0),
            (lambda x, mean, var: torch.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, False), 2),
            (lambda x, mean, var: torch.batch_norm(x, None, None, mean, var, False, 0.1, 1e-5, False), 0),
            (lambda x, mean, var: F.instance_norm(x.T[None], mean, var), 2),
            (lambda x, mean, var: F.instance_norm(x.T[None], mean, var, use_input_stats=False), 0),
        ],
    )
    def test_statistics(self, function, written, tracer):
        """Of a norm in training mode, which no schema marks."""
        graph = graph_of(lambda m, x, ids: function(x, m.weight[0, :4] + 1, m.weight[1, :4] + 1), TRACERS[tracer])
        norms = [node for node in calls(graph) if "norm" in nodes.kind(node)]
        found = [source for node in norms for source in nodes.writes(node)]
        assert [nodes.kind(source) for source in found] == ["add"] * written

    @pytest.mark.parametrize(("options", "written"), [({"max_norm": 1.0}, 1), ({}, 0)])
    def test_rows_that_are_normalised_as_they_are_read(self, options, written):
        graph = graph_of(lambda m, x, ids: F.embedding(ids, m.weight + 1, **options), from_dynamo)
        assert [nodes.kind(n) for node in calls(graph) for n in nodes.writes(node)] == ["add"] * written

    @pytest.mark.parametrize(
        "view",
        [lambda x: x.data, lambda x: x.hsplit(2)[1], lambda x: x.adjoint(), lambda x: x.moveaxis(0, 1)],
        ids=["data", "hsplit", "adjoint", "moveaxis"],
    )
    def test_through_a_view(self, view):
        """What a view in any spelling writes is seen at the tensor that owns the memory."""

        def write(m, x, ids):
            y = x + 1
            view(y).mul_(2)
            return y

        graph = graph_of(write, from_dynamo)
        owner = next(node for node in calls(graph) if nodes.kind(node) == "add")
        assert [nodes.kind(node) for node in nodes.writers(owner)] == ["mul"]

    def test_parts_of_a_split(self):
        graph = Graph()
        x = graph.placeholder("x")
        x.meta["val"] = torch.zeros(3, 4)
        part = graph.call_function(operator.getitem, (graph.call_method("chunk", (x, 2)), 0))
        write = graph.call_method("mul_", (part, 2))
        reader = graph.call_function(torch.relu, (x,))
        assert nodes.writers(x) == [write]
        assert reader in nodes.followers(write)

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
