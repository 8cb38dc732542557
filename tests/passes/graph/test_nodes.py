"""`nodes`: what is asked of a node that takes more than its own kind, value or arguments."""

import pytest
import torch
from torch.fx import Graph

from sere_compile.passes.graph import nodes

from ..moe_modules import TRACERS, Indexed, rows
from .calls import find, graph_of


class TestTensors:
    @pytest.mark.parametrize("tracer", TRACERS)
    def test_model_state(self, tracer):
        """Weights are model state under every tracer, inputs and results are not."""
        graph = TRACERS[tracer](Indexed(), rows())
        state = [node for node in graph.graph.nodes if nodes.is_model_state(node)]
        assert {nodes.shape(node) for node in state} == {(8, 6), (8, 6, 6)}

    @pytest.mark.parametrize("tracer", TRACERS)
    def test_parameter_root(self, tracer):
        """A weight is recognised behind transposes, casts and views, a product of weights is none."""
        graph = graph_of(
            lambda m, x, ids: (m.weight.T.double().reshape(2, 3, 4).sigmoid(), (m.weight * 2).tanh()), TRACERS[tracer]
        )
        root = nodes.parameter_root(nodes.operand(find(graph, "sigmoid")))
        assert nodes.shape(root) == (4, 6)
        assert nodes.is_model_state(root)
        assert nodes.parameter_root(nodes.operand(find(graph, "tanh"))) is None

    @pytest.mark.parametrize("tracer", TRACERS)
    def test_index_tensors(self, tracer):
        """The indices of every spelling of indexing."""
        spellings = (lambda m, x, ids: x[ids], lambda m, x, ids: x.index_select(0, ids), lambda m, x, ids: x[:, ids])
        for function in spellings:
            found = nodes.index_tensors(find(graph_of(function, TRACERS[tracer]), "index"))
            assert [nodes.shape(node) for node in found] == [(3,)]

    @pytest.mark.parametrize("tracer", TRACERS)
    def test_picked(self, tracer):
        """`r[1]` and `r.indices` are both found, whether the tracer keeps them apart or not."""

        def function(m, x, ids):
            result = x.topk(2)
            return result.values * result[0], result[1] + result.indices

        graph = graph_of(function, TRACERS[tracer])
        selection = find(graph, "topk")
        assert {nodes.kind(user) for node in nodes.picked(selection, 0) for user in node.users} == {"mul"}
        assert {nodes.kind(user) for node in nodes.picked(selection, 1) for user in node.users} == {"add"}


class TestReadsNumbers:
    @pytest.mark.parametrize("tracer", TRACERS)
    def test_sizes_and_types_are_not_numbers(self, tracer):
        """Operations that only copy a tensor's size or type do not read it."""

        def function(m, x, ids):
            return x[:, 0].view_as(ids) + torch.zeros_like(ids) + ids.new_ones(3) + x[0, 0].expand_as(ids)

        graph = graph_of(function, TRACERS[tracer])
        ids = list(graph.graph.find_nodes(op="placeholder"))[-1]
        assert [u for u in ids.users if u.op != "call_module" and nodes.reads_numbers(u, ids)] == []

    def test_transposing_attribute_reads(self):
        """Dynamo writes `x.T` as an attribute: it is a use, unlike `x.shape`."""
        graph = Graph()
        x = graph.placeholder("x")
        assert nodes.reads_numbers(graph.call_function(getattr, (x, "T")), x)
        assert not nodes.reads_numbers(graph.call_function(getattr, (x, "shape")), x)
