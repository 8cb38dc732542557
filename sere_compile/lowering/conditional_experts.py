"""Experts that are computed only where an id names them: one ONNX `If` for each.

    out = sere.expert_mlp(hidden, ids, weights, gate_up [E, ..], down [E, ..])          before
    for e in 0 .. E - 1:                                                                after
        total = If(active[e], then=total + where(named[:, e], expert_e(hidden) * weight[:, e], 0), else=total)

A runtime takes one branch of an `If`, so what a layer costs follows the experts that are active: their weights alone
are read, in place, where an indexed dispatch copies the weights of every slot. Each expert's weights are initializers
of their own. An active expert computes every token of the batch: gathering the tokens that name it takes `NonZero`,
which TensorRT for RTX does not have. In decoding, where reading weights is the cost, that is no loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from ..errors import LoweringError
from ..ops.expert_mlp.reference import activate
from .onnx_functions import initializers_to_constants, scopes_of, translate
from .standard_operators import weights_by_expert

_DOMAIN, _NAME = "sere", "conditional_experts"
# Of `_Expert.forward`: what differs from expert to expert, in its order.
_OF_AN_EXPERT = ("gate_up", "down", "gate_up_bias", "down_bias")


def as_one_node(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu_glu",
    interleaved: bool = False,
    transposed: bool = False,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    fp8_activations: bool = False,
) -> Tensor:
    """`sere::expert_mlp` in plain ATen but for one node, which `build_conditions` replaces in the translated graph.

    Raises:
        LoweringError: the weights have scales.
    """
    if gate_up_scale is not None or down_scale is not None:
        raise LoweringError("conditional experts take weights as they are, without scales")
    weight, named = weights_by_expert(topk_ids, topk_weights, gate_up.shape[0])
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    of_experts = dict(zip(_OF_AN_EXPERT, (gate_up, down, gate_up_bias, down_bias), strict=True))
    given = {name: tensor for name, tensor in of_experts.items() if tensor is not None}
    out = torch.onnx.ops.symbolic(
        f"{_DOMAIN}::{_NAME}",
        (total, hidden, weight, named, named.any(0), *given.values()),
        {"tensors": list(given), "activation": activation, "interleaved": interleaved, "transposed": transposed},
        dtype=torch.float32,
        shape=hidden.shape,
        version=1,
    )
    return out.to(hidden.dtype)


class _Expert(nn.Module):
    """What one expert adds, as `ops/expert_mlp/reference.py` has it; its weights are [N, M], N outputs."""

    def __init__(self, names: tuple[str, ...], activation: str, interleaved: bool) -> None:
        super().__init__()
        self._names, self._activation, self._interleaved = names, activation, interleaved

    def forward(self, total: Tensor, hidden: Tensor, weight: Tensor, named: Tensor, *own: Tensor) -> Tensor:
        """float32 [T, H]; weight and named are [T, 1]."""
        given = dict(zip(self._names, own, strict=True))
        out = F.linear(hidden, given["gate_up"], given.get("gate_up_bias")).float()
        act = activate(out, self._activation, self._interleaved).to(hidden.dtype)
        out = F.linear(act, given["down"], given.get("down_bias")).float() * weight
        # where, not a product with 0: what a token computes in an expert that it does not name may be inf or NaN.
        return total + torch.where(named, out, 0.0)


def build_conditions(model: Any, opset: int) -> None:
    """Replace the nodes of `as_one_node` in a translated model (of onnxscript's `ir`), in place.

    Raises:
        LoweringError: the weights of experts are no constants of the model.
    """
    found = [node for node in model.graph if (node.domain, node.op_type) == (_DOMAIN, _NAME)]
    taken: set[str] = set()
    for node in found:
        name = next((scope for scope in reversed(scopes_of(node)[:-1]) if scope), node.name)
        # A module that runs twice has two layers in the graph.
        name = f"{name}/{node.name}" if name in taken else name
        taken.add(name)
        _Layer(model.graph, node, name, opset).build()


class _Layer:
    """The experts of one layer, as a node that becomes `If` nodes."""

    def __init__(self, graph: Any, node: Any, name: str, opset: int) -> None:
        self._graph, self._node, self._name = graph, node, name
        self._total, self._hidden, self._weight, self._named, self._active, *self._stacked = node.inputs
        attributes = {attribute.name: attribute.value for attribute in node.attributes.values()}
        self._names = tuple(attributes["tensors"])
        self._transposed = bool(attributes["transposed"])
        self._weights = [constant_of(value, node) for value in self._stacked]
        self._body = self._translated(attributes["activation"], bool(attributes["interleaved"]), opset)

    def build(self) -> None:
        """The `If` nodes in the place of the node, and weights of single experts in the place of stacked ones."""
        from onnxscript import ir

        weights, named, active = (
            self._split(value, axis) for value, axis in ((self._weight, 1), (self._named, 1), (self._active, 0))
        )
        total = self._total
        for e in range(len(active)):
            values = {"total": total, "hidden": self._hidden, "weight": weights[e], "named": named[e]}
            branches = [
                ir.AttrGraph("then_branch", self._then(e, values | self._initializers(e))),
                ir.AttrGraph("else_branch", self._else(e, total)),
            ]
            node = ir.Node("", "If", [active[e]], branches, name=f"{self._name}/expert_{e}")
            total = node.outputs[0]
            self._typed(total, f"{self._name}/expert_{e}", self._node.outputs[0].shape)
            self._graph.insert_before(self._node, node)
        [old] = self._node.outputs
        for i, output in enumerate(self._graph.outputs):
            if output is old:
                self._graph.outputs[i] = total
        ir.convenience.replace_all_uses_with(old, total)
        self._graph.remove(self._node, safe=True)
        total.name = old.name
        for value in self._stacked:
            if not value.uses():
                self._graph.initializers.pop(value.name, None)

    def _translated(self, activation: str, interleaved: bool, opset: int) -> Any:
        """What one expert adds, as an ONNX graph, for any number of tokens."""
        tokens, width = 2, int(self._hidden.shape[1])
        own = tuple(self._of_expert(i, 0).contiguous() for i in range(len(self._names)))
        total, hidden = torch.zeros(tokens, width), torch.zeros(tokens, width, dtype=own[0].dtype)
        example = (total, hidden, torch.zeros(tokens, 1), torch.zeros(tokens, 1, dtype=torch.bool))
        free = tuple({0: Dim.DYNAMIC} for _ in example), tuple(None for _ in own)
        module = _Expert(self._names, activation, interleaved).eval()
        with torch.no_grad():
            program = torch.export.export(module, (*example, *own), dynamic_shapes=(*free[0], free[1]), strict=False)
        names = ["total", "hidden", "weight", "named", *self._names]
        graph = translate(program, opset, names, ["out"]).model.graph
        initializers_to_constants(graph)
        return graph

    def _of_expert(self, i: int, e: int) -> Tensor:
        """Tensor i of expert e: a view, with one row for each output where it is a matrix."""
        own = self._weights[i].raw[e]
        return own.T if self._transposed and own.dim() == 2 else own

    def _initializers(self, e: int) -> dict[str, Any]:
        """The tensors of expert e as initializers of the graph."""
        from onnxscript import ir

        made = {}
        for i, (name, stacked) in enumerate(zip(self._names, self._stacked, strict=True)):
            # A view, which is copied when the file is written.
            constant = type(self._weights[i])(self._of_expert(i, e), name=f"{stacked.name}.{e}")
            value = ir.Value(name=constant.name, shape=constant.shape, type=stacked.type, const_value=constant)
            self._graph.register_initializer(value)
            made[name] = value
        return made

    def _split(self, value: Any, axis: int) -> list[Any]:
        """The parts of a tensor with one for each expert along an axis."""
        from onnxscript import ir

        count = len(self._weights[0].raw)
        attributes = [ir.AttrInt64("axis", axis), ir.AttrInt64("num_outputs", count)]
        node = ir.Node("", "Split", [value], attributes, num_outputs=count, name=f"{self._name}/split_{value.name}")
        for e, part in enumerate(node.outputs):
            part.name, part.type = f"{value.name}_{e}", value.type
        self._graph.insert_before(self._node, node)
        return list(node.outputs)

    def _then(self, e: int, values: Mapping[str, Any]) -> Any:
        """A copy of the body with the values of expert e."""
        from onnxscript import ir

        known: dict[Any, Any] = {given: values[given.name] for given in self._body.inputs}
        nodes = list(self._copies(f"{self._name}/expert_{e}", known))
        out = known[self._body.outputs[0]]
        self._typed(out, str(out.name), [None, *self._node.outputs[0].shape[1:]])
        return ir.Graph([], [out], nodes=nodes, name=f"{self._name}/expert_{e}/then")

    def _copies(self, scope: str, known: dict[Any, Any]) -> Iterator[Any]:
        from onnxscript import ir

        for node in self._body:
            inputs = [None if value is None else known[value] for value in node.inputs]
            copy = ir.Node(
                node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs),
                name=f"{scope}/{node.name}",
            )  # fmt: skip
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.name, new.type = f"{scope}/{old.name}", old.type
                known[old] = new
            yield copy

    def _else(self, e: int, total: Any) -> Any:
        from onnxscript import ir

        node = ir.Node("", "Identity", [total], name=f"{self._name}/expert_{e}/not_named")
        self._typed(node.outputs[0], f"{self._name}/expert_{e}/same", [None, *self._node.outputs[0].shape[1:]])
        return ir.Graph([], list(node.outputs), nodes=[node], name=f"{self._name}/expert_{e}/else")

    def _typed(self, value: Any, name: str, shape: Any) -> None:
        from onnxscript import ir

        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)


def constant_of(value: Any, node: Any) -> Any:
    """The tensor behind a value, which holds one of torch."""
    constant = value.const_value
    if constant is None or not isinstance(getattr(constant, "raw", None), Tensor):
        raise LoweringError(f"{value.name}, which {node.name} takes as weights of experts, is no constant of the model")
    return constant
