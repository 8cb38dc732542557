"""Graphs written node by node: what a tracer would hardly ever write, or not in so few nodes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map_only


class Written:
    """A graph whose nodes are computed as they are written, so that each has its value, as of a tracer."""

    def __init__(self) -> None:
        self.graph = Graph()

    def given(self, *sizes: int) -> Node:
        """An input of floating-point numbers."""
        return self.input(torch.rand(sizes))

    def weight(self, *sizes: int) -> Node:
        """An input that is a parameter of the model."""
        return self.input(nn.Parameter(torch.rand(sizes)))

    def input(self, value: Any) -> Node:
        node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        node.meta["example_value"] = value
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A function, or a method by its name."""
        make = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = make(target, args, kwargs)
        values, options = tree_map_only(Node, lambda source: source.meta["example_value"], (args, kwargs))
        with torch.no_grad():
            run = getattr(values[0], target) if isinstance(target, str) else target
            node.meta["example_value"] = run(*(values[1:] if isinstance(target, str) else values), **options)
        return node

    def pick(self, source: Node, index: Any) -> Node:
        """`source[index]`."""
        return self.call(operator.getitem, source, index)

    def mul(self, left: Any, right: Any) -> Node:
        """Their product."""
        return self.call(torch.mul, left, right)

    def column(self, node: Node) -> Node:
        """With a last dimension of one more."""
        return self.call(torch.unsqueeze, node, -1)

    def top_k(self, scores: Node, k: int) -> tuple[Node, Node]:
        """Values and ids."""
        best = self.call(torch.topk, scores, k)
        return self.pick(best, 0), self.pick(best, 1)

    def give(self, *results: Node) -> None:
        """The graph's output."""
        self.graph.output(results)
