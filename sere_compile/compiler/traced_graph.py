"""What rewriting needs of a graph, whoever traced it: values of its inputs, and places for matrices."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.fx import GraphModule, Node

from .gate_plan import GatePlan


def attribute(module: GraphModule, node: Node) -> torch.Tensor:
    """The tensor behind a get_attr node."""
    owner, _, name = str(node.target).rpartition(".")
    return getattr(module.get_submodule(owner), name)


class TracedGraph(Protocol):
    """A graph that is being rewritten: `DynamoGraph` during torch.compile, `Program` ahead of time."""

    module: GraphModule
    fuses_experts: bool  # whether experts have to become one operator of ours, whatever that gains
    takes_kernels: bool  # whether the speed passes may put operators of ours into it
    others_follow: bool  # whether it is a part of a call, which may go on with what leaves it
    is_piece: bool  # whether Dynamo cut the graph that it traced, and this is a part of it
    has_gradients: bool  # whether a call may ask for gradients, which those operators do not give

    def value_of(self, node: Node) -> Any:
        """What a graph input or attribute holds; None for what only a call has."""

    def place(self, plan: GatePlan, kind: str, value: torch.Tensor) -> Node:
        """A graph input or attribute for what a gate reads beside the graph's own inputs.

        Args:
            plan: of the gate.
            kind: "similarity", "projection" or "counts".
            value: what it holds, or a tensor like it where each call brings its own.
        """

    def drop_unused(self, plan: GatePlan) -> None:
        """Take back what was placed for a gate and is not read."""
