"""Experts as one `com.microsoft.QMoE` of onnxruntime: their weights in 8 or 4 bits, routed as the ids say.

    out = sere.expert_mlp(hidden, ids, weights, gate_up [E, ..], down [E, ..])                       before
    out = QMoE(hidden, ranks [T, E], codes and scales of both, router_weights [T, E])                 after

The operator takes the k experts of highest rank for every token, and gives each the weight that stands in
`router_weights`: no softmax, no sum of ours. Where ids repeat a token names fewer than k: others that are active anyway
come next, with weight 0. An expert of negative weight is left out, so that there may be none.

A weight is (code - 2^(bits - 1)) * scale, scales being the largest weight of a row (8 bits) or of a block of a row
(4 bits) over the largest code: what onnxruntime computes exactly with float activations on a CPU. Blocks of 8 bits it
multiplies by activations of 8 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import LoweringError
from .conditional_experts import constant_of
from .onnxruntime_moe import SWIGLU, check_activation, interleave
from .standard_operators import QUANTISED, weights_by_expert

_DOMAIN, _NAME = "sere", "quantised_experts"
# What ranks experts of a token: those it names, others that are active, the rest.
_NAMED, _ACTIVE, _INACTIVE = 0.0, -60.0, -10000.0
# Sizes of blocks, the best first.
_BLOCKS = (32, 16)
# Inputs of QMoE from fc3's weights to fc3's zero points, none of which is given.
_NOT_GIVEN = 6


def qmoe_node(
    experts: str,
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
    """`sere::expert_mlp` with one node in it, which `quantise_experts` replaces in the translated graph.

    `experts` is one of `QUANTISED`; the weights of slots are not negative.

    Raises:
        LoweringError: another activation than a gated SiLU, or weights with scales.
    """
    check_activation("QMoE", activation, gate_up_scale, down_scale)
    weight, named = weights_by_expert(topk_ids, topk_weights, gate_up.shape[0])
    ranks = torch.where(named, _NAMED, torch.where(named.any(0), _ACTIVE, _INACTIVE))
    if not interleaved and gate_up_bias is not None:
        gate_up_bias = interleave(gate_up_bias)
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::{_NAME}",
        (hidden, ranks.to(hidden.dtype), weight.to(hidden.dtype), gate_up, gate_up_bias, down, down_bias),
        {
            "bits": QUANTISED[experts],
            "k": topk_ids.shape[1],
            "activation": activation,
            "interleaved": interleaved,
            "transposed": transposed,
        },
        dtype=hidden.dtype,
        shape=hidden.shape,
        version=1,
    )


def quantise_experts(model: Any) -> None:
    """Replace the nodes of `qmoe_node` in a translated model (of onnxscript's `ir`), in place.

    Raises:
        LoweringError: the weights of experts are no constants of the model.
    """
    for node in [node for node in model.graph if (node.domain, node.op_type) == (_DOMAIN, _NAME)]:
        _replace(model.graph, node)
        model.graph.opset_imports["com.microsoft"] = 1


def _replace(graph: Any, node: Any) -> None:
    from onnxscript import ir

    hidden, ranks, weight, gate_up, gate_up_bias, down, down_bias = (*node.inputs, None)[:7]
    own = {attribute.name: attribute.value for attribute in node.attributes.values()}
    matrices = [constant_of(value, node).raw.detach() for value in (gate_up, down)]
    if own["transposed"]:
        matrices = [matrix.transpose(1, 2) for matrix in matrices]
    if not own["interleaved"]:
        matrices[0] = interleave(matrices[0])
    block = None
    if own["bits"] == 4:
        block = next((b for b in _BLOCKS if all(matrix.shape[-1] % b == 0 for matrix in matrices)), None)
    quantised = []
    for value, matrix in zip((gate_up, down), matrices, strict=True):
        for kind, tensor in zip(("codes", "scales"), quantise(matrix, own["bits"], block), strict=True):
            quantised.append(_initializer(graph, f"{value.name}.{kind}", tensor))
    fc1, fc1_scales, fc2, fc2_scales = quantised
    options = {
        "k": own["k"],
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "normalize_routing_weights": 0,
        "expert_weight_bits": own["bits"],
        "weights_prepacked": 0,
        **SWIGLU[own["activation"]],
        **({} if block is None else {"block_size": block}),
    }
    new = ir.node(
        "QMoE",
        [hidden, ranks, fc1, fc1_scales, gate_up_bias, fc2, fc2_scales, down_bias, *[None] * _NOT_GIVEN, weight],
        options,
        domain="com.microsoft",
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    _take_place(graph, node, new)
    for value in (gate_up, down):
        if not value.uses():
            graph.initializers.pop(value.name, None)


def _take_place(graph: Any, node: Any, new: Any) -> None:
    """Put a node with one output where another was."""
    from onnxscript import ir

    [old], [out] = node.outputs, new.outputs
    out.type, out.shape = old.type, old.shape
    graph.insert_before(node, new)
    for i, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[i] = out
    ir.convenience.replace_all_uses_with(old, out)
    graph.remove(node, safe=True)
    out.name = old.name


def _initializer(graph: Any, name: str, tensor: Tensor) -> Any:
    """A tensor as an initializer; a module that runs twice has its weights once."""
    from onnxscript import ir

    if name in graph.initializers:
        return graph.initializers[name]
    constant = ir.tensor(tensor.contiguous(), name=name)
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(constant.dtype), const_value=constant)
    graph.register_initializer(value)
    return value


def quantise(weights: Tensor, bits: int, block: int | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of weights.

    Args:
        weights: [E, N, M], N outputs.
        bits: 8 or 4.
        block: how many weights of a row share a scale, a divisor of M; None for all of them.

    Returns:
        uint8 [E, N, M * bits / 8], two codes of 4 bits in a byte, the first in the lower half; and scales in the type
        of the weights, [E, N] or, with blocks, [E, N, M / block].

    Raises:
        LoweringError: a weight is not finite, or rows of 4 bits do not fill whole bytes.
    """
    experts, rows, width = weights.shape
    if bits == 4 and width % 2:
        raise LoweringError(f"rows of {width} weights of 4 bits do not fill whole bytes: use 8 bits")
    if not bool(weights.isfinite().all()):
        raise LoweringError("a weight of an expert is not finite, and has no code")
    parts = weights.reshape(experts, rows, -1, block or width)
    half = 2 ** (bits - 1)
    # Of the type that is written, or codes would be those of another scale. A row of zeros has any.
    scales = (parts.float().abs().amax(-1) / (half - 1)).to(weights.dtype)
    scales = torch.where(scales > 0, scales, 1.0).to(weights.dtype)
    codes = (parts.float() / scales[..., None].float()).round().clamp(-half, half - 1) + half
    codes = codes.to(torch.uint8).view(experts, rows, width)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes, scales if block is not None else scales[..., 0]
