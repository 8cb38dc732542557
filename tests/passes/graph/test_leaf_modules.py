"""Calls of `nn.Linear` become calls of the function: the same numbers, in a graph that shows the weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import symbolic_trace
from torch.nn.utils import parametrizations

from sere_compile.passes.graph import nodes
from sere_compile.passes.graph.leaf_modules import open_linears


class Two(nn.Module):
    """One layer has a bias, and takes its input by keyword."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(input=self.first(x).relu())


def kinds(graph):
    return [nodes.kind(node) for node in graph.graph.nodes]


def test_they_become_functions():
    """With names, metadata and places of what they were."""
    module, x = Two(), torch.randn(5, 3)
    graph = symbolic_trace(module)
    before = {node.name: node for node in graph.graph.nodes}
    before["first"].meta["seen"] = 1
    open_linears(graph)
    graph.graph.lint()
    graph.recompile()
    assert kinds(graph) == [
        "placeholder", "get_attr", "linear", "relu", "get_attr", "get_attr", "linear", "output",
    ]  # fmt: skip
    assert [node.target for node in graph.graph.find_nodes(op="get_attr")] == [
        "first.weight",
        "second.weight",
        "second.bias",
    ]
    linears = list(graph.graph.find_nodes(op="call_function", target=F.linear))
    assert [node.name for node in linears] == ["first", "second"]
    assert linears[0].meta["seen"] == 1
    assert torch.equal(graph(x), module(x))


def hooked(layer):
    layer.register_forward_hook(lambda module, given, result: 2 * result)
    return layer


def overridden(layer):
    layer.forward = lambda x: F.linear(x, -layer.weight)
    return layer


class Derived(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        overridden,
        parametrizations.weight_norm,
        lambda layer: Derived(3, 4, bias=False),
        lambda layer: nn.ReLU(),
    ],
    ids=["hook", "forward", "parametrized", "subclass", "no linear"],
)
def test_what_does_something_else_stays(change):
    module, x = Two(), torch.randn(5, 3)
    graph = symbolic_trace(module)
    graph.first = change(graph.first)
    expected = graph(x) if not isinstance(graph.first, nn.ReLU) else None
    open_linears(graph)
    graph.recompile()
    assert kinds(graph)[1] == "call_module"
    assert kinds(graph).count("linear") == 1
    if expected is not None:
        assert torch.equal(graph(x), expected)


def test_hooks_on_every_module():
    graph = symbolic_trace(Two())
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, result: None)
    try:
        open_linears(graph)
    finally:
        handle.remove()
    assert "linear" not in kinds(graph)
