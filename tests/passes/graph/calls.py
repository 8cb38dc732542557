"""Small traced functions whose nodes the tests of this folder look at."""

import torch
from torch import nn

from sere_compile.passes.graph import nodes

from ..moe_modules import from_export


class Call(nn.Module):
    """A function of (x, ids) as a module with one weight."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.function = function

    def forward(self, x, ids):
        return self.function(self, x, ids)


def graph_of(function, trace=from_export, **options):
    return trace(Call(function), torch.randn(3, 4), torch.tensor([0, 2, 1]), **options)


def calls(graph):
    return [node for node in graph.graph.nodes if node.op in ("call_function", "call_method")]


def find(graph, kind):
    return next(node for node in graph.graph.nodes if nodes.kind(node) == kind)
