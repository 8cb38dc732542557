"""Experts as one `com.microsoft.MoE` of onnxruntime, which chooses experts itself: told so that it chooses ours.

    out = sere.expert_mlp(hidden, ids, weights, ..)     ->     out = MoE(hidden, scores, ..) * sum of weights

The operator takes the softmax of scores [T, E], the k largest, and gives each expert's output that weight, over their
sum. Scores are the logarithms of what a token's slots give each expert. Where ids repeat after re-routing a token names
fewer than k: others that are active anyway come next, and weigh less than rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LoweringError
from ..ops.expert_mlp.reference import GPT_OSS_ALPHA, GPT_OSS_LIMIT
from .standard_operators import weights_by_expert

# alpha and beta of gate * sigmoid(alpha * gate) * (up + beta), and the limit of both.
SWIGLU: dict[str, dict[str, float]] = {
    "silu_glu": {"activation_alpha": 1.0, "activation_beta": 0.0},
    "gpt_oss": {"activation_alpha": GPT_OSS_ALPHA, "activation_beta": 1.0, "swiglu_limit": GPT_OSS_LIMIT},
}
# Scores of experts that a token does not name: e^-60 is no part of a float32 sum; the others come last.
_ACTIVE, _INACTIVE = -60.0, -10000.0


def moe_node(
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
    """`sere::expert_mlp` as that operator, for weights of slots that are not negative.

    Raises:
        LoweringError: another activation than a gated SiLU, or weights with scales.
    """
    check_activation("MoE", activation, gate_up_scale, down_scale)
    weight, named = weights_by_expert(topk_ids, topk_weights, gate_up.shape[0])
    others = torch.where(named.any(0), _ACTIVE, _INACTIVE)
    total = weight.sum(-1, keepdim=True)
    # Of the token's own sum: a logarithm of weights as they are could come near the others.
    scores = torch.where(weight > 0, (weight / total).clamp(min=1e-20).log(), others)
    if transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if not interleaved:
        gate_up = interleave(gate_up)
        gate_up_bias = None if gate_up_bias is None else interleave(gate_up_bias)
    out = torch.onnx.ops.symbolic(
        "com.microsoft::MoE",
        (hidden, scores.to(hidden.dtype), gate_up, gate_up_bias, down, down_bias),
        {
            "k": topk_ids.shape[1],
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "normalize_routing_weights": 1,
            **SWIGLU[activation],
        },
        dtype=hidden.dtype,
        shape=hidden.shape,
        version=1,
    )
    return (out.float() * total).to(hidden.dtype)


def check_activation(operator: str, activation: str, *scales: Tensor | None) -> None:
    """Raise for what neither operator of onnxruntime computes."""
    if activation not in SWIGLU or any(scale is not None for scale in scales):
        raise LoweringError(
            f"onnxruntime's {operator} on a CPU computes gated SiLU and gpt-oss's activation, not {activation}, and "
            "takes no scales of weights"
        )


def interleave(columns: Tensor) -> Tensor:
    """[E, 2 * I, ..]: gate and up in turn, where the gate came first."""
    experts, count, *rest = columns.shape
    return columns.view(experts, 2, count // 2, *rest).transpose(1, 2).reshape(columns.shape)
