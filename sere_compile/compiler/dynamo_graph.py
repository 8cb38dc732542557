"""A graph that Dynamo traced, while it is rewritten: matrices become further inputs of it.

Dynamo reuses one compiled graph for every layer with the same code, so a matrix cannot be part of
the graph: each call brings the matrices of the weights that it passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..passes import separate_statistics
from ..passes.graph.run_part import ValueOf
from . import dynamo
from .gate_plan import GatePlan
from .traced_graph import attribute


@dataclass(frozen=True)
class AppendedInput:
    """One input appended to the graph: what a gate reads or writes beside the graph's own inputs."""

    plan: GatePlan
    kind: str  # "similarity", "projection" or "counts"


class GraphInputs:
    """A graph's own inputs, without their values: those belong to a call."""

    def __init__(self, module: GraphModule) -> None:
        self._module = module
        self.nodes = list(module.graph.find_nodes(op="placeholder"))

    def values_of(self, arguments: Sequence[Any]) -> ValueOf:
        """What inputs hold in a call with these arguments, and attributes always; sizes as numbers."""
        held = dict(zip(self.nodes, arguments, strict=False))

        def value_of(node: Node) -> Any:
            value = attribute(self._module, node) if node.op == "get_attr" else held.get(node)
            return value.node.hint if isinstance(value, torch.SymInt) else value

        return value_of


class DynamoGraph:
    """A copy of one graph, with the inputs that Dynamo compiles it for; see `TracedGraph`.

    A weight that two gates of a graph share has one matrix and one counter: two graph inputs with
    the same memory would be taken for different memory.

    Attributes:
        module: the copy.
        own_inputs: of the graph, as it was traced.
        inputs: what to compile it for: the example inputs, and those appended since.
        appended: what the inputs behind the graph's own ones are.
        held: what its own inputs hold in the call that is compiled, where the example is a fake tensor of it.
    """

    fuses_experts = False
    takes_kernels = True

    def __init__(self, module: GraphModule, example_inputs: Sequence[Any]) -> None:
        self.module = dynamo.copy_graph(module)
        separate_statistics(self.module.graph)
        self.own_inputs = GraphInputs(self.module)
        self.inputs = list(example_inputs)
        self.appended: list[AppendedInput] = []
        self.held = list(map(dynamo.held_by, self.own_inputs.nodes, example_inputs))
        self.is_piece = dynamo.is_piece(module)
        self.others_follow = not dynamo.is_outermost() or dynamo.has_graph_break(module)
        self.has_gradients = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in example_inputs)
        self.value_of = self.own_inputs.values_of(self.held)
        self._places: dict[tuple[Node, str], Node] = {}

    def place(self, plan: GatePlan, kind: str, value: torch.Tensor) -> Node:
        """See `TracedGraph`; calls will pass tensors like `value`."""
        key = (plan.gate.router_weight, kind)
        if key not in self._places:
            name = f"sere_{kind}_{len(self.inputs)}"
            self._places[key], fake = dynamo.append_input(self.module, name, value, self.inputs)
            self.inputs.append(fake)
            self.appended.append(AppendedInput(plan, kind))
        return self._places[key]

    def drop_unused(self, plan: GatePlan) -> None:
        """See `TracedGraph`; what was placed last for the gate, unless another gate reads it."""
        for kind in ("projection", "similarity"):
            key = (plan.gate.router_weight, kind)
            if key in self._places and not self._places[key].users:
                node = self._places.pop(key)
                node.graph.erase_node(node)
                self.inputs.pop()
                self.appended.pop()

    def finish(self) -> GraphModule:
        """The rewritten graph, checked."""
        self.module.graph.lint()
        self.module.recompile()
        return self.module
