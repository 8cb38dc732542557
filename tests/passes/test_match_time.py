"""The passes' work grows with the graph, not with its square (in milliseconds: `benchmarks/match_time.py`)."""

import pytest
import torch
from torch import nn

from sere_compile.passes import DispatchRegion, RoutingSettings, extract_dispatch, find_gates, reroute_dispatch
from sere_compile.passes.graph import nodes

from .moe_modules import BiasCorrected, Grouped, Indexed, ScatterCombine, from_dynamo, from_make_fx, rows


class Layers(nn.Module):
    """Blocks of several kinds, one after the other, each with a residual."""

    def __init__(self, count):
        super().__init__()
        kinds = (Indexed, Grouped, ScatterCombine, BiasCorrected)
        self.blocks = nn.ModuleList(kinds[i % len(kinds)]() for i in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def find_and_cut(graph):
    """Everything that happens before a graph is changed."""
    gates = find_gates(graph).gates
    assert all(isinstance(extract_dispatch(gate), DispatchRegion) for gate in gates)
    return gates


def rewrite_all(graph, gates):
    graph.register_buffer("similarity", torch.eye(gates[0].num_experts))
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        matrix = graph.graph.get_attr("similarity")
    for gate in gates:
        reroute_dispatch(gate, matrix, RoutingSettings(1))


def visits(count, trace, monkeypatch):
    """How often a node is looked at for each node of a model of `count` layers."""
    graph = trace(Layers(count), rows())
    seen = [0]
    original = nodes.raw_name

    def counted(node):
        seen[0] += 1
        return original(node)

    size = len(graph.graph.nodes)
    with monkeypatch.context() as patch:
        patch.setattr(nodes, "raw_name", counted)
        gates = find_and_cut(graph)
        rewrite_all(graph, gates)
    assert len(gates) == count
    return seen[0] / size


@pytest.mark.parametrize("trace", [from_make_fx, from_dynamo])
def test_work_is_linear_in_the_graph(trace, monkeypatch):
    """Four times the layers: as many looks at each node as before."""
    few, many = (visits(count, trace, monkeypatch) for count in (4, 16))
    assert many < 1.2 * few, (few, many)
