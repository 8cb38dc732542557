"""Programs of torch.export, and other graphs that were traced ahead of time: matrices become buffers of them."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node

from ..errors import ConfigError
from ..experts.owner import Owners
from ..passes import Gate, separate_statistics
from ..passes.graph import nodes
from ..passes.graph.copy import copy_module
from ..passes.graph.leaf_modules import open_linears
from .gate_plan import GatePlan
from .traced_graph import attribute

# make_fx forgets where a parameter comes from; the live model still has its name.
_NAMED_BY_MAKE_FX = re.compile(r"_(param|tensor)_constant\d+")


class Program:
    """A copy of a GraphModule or ExportedProgram behind one face, while it is rewritten; see `TracedGraph`.

    Attributes:
        module: the graph, which shares the weights.
        owners: of the weights, for what a tracer does not name.
    """

    takes_kernels = False
    others_follow = False
    is_piece = False
    has_gradients = False

    def __init__(self, traced: GraphModule | ExportedProgram, *, fuses_experts: bool = False) -> None:
        self.fuses_experts = fuses_experts
        self._exported = traced if isinstance(traced, ExportedProgram) else None
        source = traced.graph_module if isinstance(traced, ExportedProgram) else traced
        self.module, _ = copy_module(source)
        open_linears(self.module)
        separate_statistics(self.module.graph)
        self.owners = Owners()
        self._buffers: dict[Node, tuple[str, torch.Tensor]] = {}
        self._places: dict[int, dict[str, Node]] = {}  # by identity of the plan, and kind

    def has_shapes(self) -> bool:
        """Whether the tracer recorded what the operations yield."""
        return any(nodes.shape(node) is not None for node in self.module.graph.nodes if node.op.startswith("call"))

    def weight_name(self, gate: Gate) -> str:
        """The fully qualified name of the gate's router weight."""
        node = gate.router_weight
        if self._exported is None:
            owner = self.owners.find(self.value_of(node)) if _NAMED_BY_MAKE_FX.fullmatch(str(node.target)) else None
            return str(node.target) if owner is None else owner.name
        signature = self._exported.graph_signature
        return _lifted(signature).get(node.name, node.name)

    def value_of(self, node: Node) -> Any:
        """The tensor behind a graph input or attribute; None for what only a call has."""
        if node.op == "get_attr":
            return attribute(self.module, node)
        if self._exported is None:
            return None
        lifted = _lifted(self._exported.graph_signature).get(node.name)
        state = self._exported.state_dict
        if lifted is None or lifted in state:
            return None if lifted is None else state[lifted]
        return self._exported.constants[lifted]

    def has_more_tokens(self, gate: Gate, limit: int) -> bool:
        """Compares the batch with a limit; a program cannot take both sides, unlike a model that compiles again.

        Raises:
            ConfigError: the program takes batches on both sides of the limit.
        """
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # here, because it imports sympy

        above = math.prod(nodes.value(gate.ids).shape[:-1]) > limit
        if statically_known_true(above):
            return True
        if statically_known_true(torch.sym_not(above)):
            return False
        raise ConfigError(
            f"max_tokens={limit} lies inside the range of batch sizes of this program. Export prefill and decoding "
            f"apart, and rewrite the decoding program"
        )

    def place(self, plan: GatePlan, kind: str, value: torch.Tensor) -> Node:
        """See `TracedGraph`; what is placed becomes a buffer, ahead of every computation."""
        places = self._places.setdefault(id(plan), {})
        if kind in places:
            return places[kind]
        name = f"sere_{kind}_{sum(known.startswith(f'sere_{kind}_') for known, _ in self._buffers.values())}"
        node = self._attribute(name, value) if self._exported is None else self._input(name, value, self._exported)
        self._buffers[node] = (name, value)
        places[kind] = node
        return node

    def _attribute(self, name: str, value: torch.Tensor) -> Node:
        self.module.register_buffer(name, value)
        graph = self.module.graph
        with graph.inserting_before(next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))):
            return graph.get_attr(name)

    def _input(self, name: str, value: torch.Tensor, exported: ExportedProgram) -> Node:
        graph, user_inputs = self.module.graph, set(exported.graph_signature.user_inputs)
        placeholders = list(graph.find_nodes(op="placeholder"))
        first_user = next((n for n in placeholders if n.name in user_inputs), None)
        anchor = first_user if first_user is not None else placeholders[-1].next
        with graph.inserting_before(anchor):
            node = graph.placeholder(f"b_{name}")
        mode = torch._guards.detect_fake_mode([n.meta.get("val") for n in placeholders])
        node.meta["val"] = mode.from_tensor(value, static_shapes=True) if mode is not None else value
        return node

    def drop_unused(self, plan: GatePlan) -> None:
        """See `TracedGraph`."""
        for node in reversed(self._places.pop(id(plan), {}).values()):
            if node.users:
                continue
            name, _ = self._buffers.pop(node)
            node.graph.erase_node(node)
            if self._exported is None:
                delattr(self.module, name)

    def finish(self) -> Any:
        """The rewritten program, checked."""
        self.module.graph.lint()
        self.module.recompile()
        if self._exported is None:
            return self.module
        old = self._exported
        return ExportedProgram(
            root=self.module,
            graph=self.module.graph,
            graph_signature=self._signature(old.graph_signature),
            state_dict={**old.state_dict, **dict(self._buffers.values())},
            range_constraints=copy.deepcopy(old.range_constraints),
            module_call_graph=copy.deepcopy(old.module_call_graph),
            example_inputs=old.example_inputs,
            constants=old.constants,
            verifiers=old.verifiers,
        )

    def _signature(self, old: ExportGraphSignature) -> ExportGraphSignature:
        added = {
            node.name: InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), name, persistent=True)
            for node, (name, _) in self._buffers.items()
        }
        known = {spec.arg.name: spec for spec in old.input_specs} | added
        order = [node.name for node in self.module.graph.find_nodes(op="placeholder")]
        # Ids and weights that leave the graph are named after the nodes that made them.
        returned: Any = self.module.graph.output_node().args[0]
        outputs = [
            dataclasses.replace(spec, arg=TensorArgument(name=node.name)) if isinstance(node, Node) else spec
            for spec, node in zip(old.output_specs, returned, strict=True)
        ]
        return ExportGraphSignature([known[name] for name in order], outputs)


def _lifted(signature: ExportGraphSignature) -> dict[str, str]:
    """Names of lifted parameters, buffers and constants by the name of their placeholder."""
    return {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
