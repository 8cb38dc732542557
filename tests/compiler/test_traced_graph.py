"""What a graph holds itself."""

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from sere_compile.compiler.traced_graph import attribute


@pytest.mark.parametrize("name", ["table", "layers.1.weight", "layers.0.inner.table"])
def test_attributes_by_their_path(name):
    """Parameters and buffers, of the module itself and of those inside it."""
    root = nn.Module()
    root.register_buffer("table", torch.arange(3))
    root.layers = nn.ModuleList([nn.Module(), nn.Linear(2, 2)])
    root.layers[0].inner = nn.Module()
    root.layers[0].inner.register_buffer("table", torch.arange(4))
    graph = Graph()
    node = graph.get_attr(name)
    graph.output(node)
    held = dict([*root.named_parameters(), *root.named_buffers()])[name]
    module = GraphModule(root, graph)
    assert attribute(module, node) is held
    assert module() is held
