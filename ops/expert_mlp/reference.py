"""What `sere::expert_mlp` computes, in plain ATen: static shapes, no sort, no loop over experts.

This file defines the operator. It is also its decomposition for exporters, and its implementation where no kernel
is. It copies the weights of every slot, one slot column at a time, so it is slow where T is large.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .mxfp4 import unpack_mxfp4

# alpha and limit of gpt-oss's clamped SwiGLU; the kernel has the same numbers.
GPT_OSS_ALPHA = 1.702
GPT_OSS_LIMIT = 7.0

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}

# Rows and columns of a weight that share one scale.
SCALE_BLOCK = 128

# Every value of `activation`: f(x), or f(gate) * up, or gpt-oss's own.
ACTIVATIONS = (*_PLAIN, *(f"{name}_glu" for name in _PLAIN), "gpt_oss")


@dataclasses.dataclass(frozen=True)
class Call:
    """The tensors of a call, real or fake."""

    hidden: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    fp8_activations: bool = False

    @property
    def mxfp4(self) -> bool:
        """Whether weights are MXFP4, two numbers to a byte."""
        return self.gate_up_scale is not None and self.gate_up.dtype == torch.uint8

    @property
    def fp8(self) -> bool:
        """Whether weights are FP8 with scales."""
        return self.gate_up_scale is not None and not self.mxfp4


def activation_number(activation: str) -> int:
    """By this number C++ knows an activation, with a gate or without: `ACTIVATION` of stream.cu and cpu.cpp."""
    return (*_PLAIN, "gpt_oss").index(activation.removesuffix("_glu"))


def scale_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """[E, ceil(M / 128), ceil(N / 128)], the shape of the scales of FP8 weights [E, M, N]."""
    experts, *matrix = sizes
    return (experts, *(-(-size // SCALE_BLOCK) for size in matrix))


def gate_width(activation: str) -> int:
    """G, how many columns of `gate_up` make one of the activation: 2 with a gate, else 1."""
    return 2 if activation.endswith("_glu") or activation == "gpt_oss" else 1


def activate(x: Tensor, activation: str, interleaved: bool) -> Tensor:
    """The activation of the first projection: fp32 [..., G * I] to fp32 [..., I]."""
    if gate_width(activation) == 1:
        return _PLAIN[activation](x)
    gate, up = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    if activation == "gpt_oss":
        gate = gate.clamp(max=GPT_OSS_LIMIT)
        up = up.clamp(min=-GPT_OSS_LIMIT, max=GPT_OSS_LIMIT)
        return (up + 1) * (gate * torch.sigmoid(gate * GPT_OSS_ALPHA))
    return _PLAIN[activation.removesuffix("_glu")](gate) * up


def expert_mlp_reference(
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
    """See `sere_compile.ops.expert_mlp`. Returns a fresh contiguous tensor [T, H] in the dtype of hidden."""
    if not transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    valid = (topk_ids >= 0) & (topk_ids < gate_up.shape[0])
    experts = torch.where(valid, topk_ids, 0).long()
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    x = round_to_fp8(hidden) if fp8_activations else hidden
    for k in range(topk_ids.shape[1]):
        out = _linear(x, experts[:, k], gate_up, gate_up_bias, gate_up_scale)
        act = activate(out, activation, interleaved).to(hidden.dtype)
        act = round_to_fp8(act) if fp8_activations else act
        out = _linear(act, experts[:, k], down, down_bias, down_scale) * topk_weights[:, k, None].float()
        # where, not a product with 0: what a slot of no expert computes may be inf or NaN.
        total = total + torch.where(valid[:, k, None], out, 0.0)
    return total.to(hidden.dtype)


def round_to_fp8(x: Tensor) -> Tensor:
    """[T, N] to fp32: each `SCALE_BLOCK` numbers of a row as e4m3 with a factor, the largest of them over 448."""
    width = x.shape[1]
    blocks = F.pad(x.float(), (0, -width % SCALE_BLOCK)).unflatten(1, (-1, SCALE_BLOCK))
    # At least 1e-10, for blocks of zeros; NaN stays.
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    rounded = (blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(1)[:, :width]


def _linear(x: Tensor, experts: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """Each row of x [T, N] through the weight [N, M] of its own expert: fp32 [T, M]."""
    chosen = weight[experts]
    if scale is not None and weight.dtype == torch.uint8:
        x, chosen = x.float(), unpack_mxfp4(chosen.transpose(1, 2), scale[experts]).transpose(1, 2)
    elif scale is not None:
        # Of weights as they are stored, [M, N].
        rows, columns = weight.shape[2], weight.shape[1]
        wide = scale[experts].repeat_interleave(SCALE_BLOCK, 1).repeat_interleave(SCALE_BLOCK, 2)
        x, chosen = x.float(), chosen.float() * wide[:, :rows, :columns].transpose(1, 2)
    out = torch.bmm(x[:, None], chosen)[:, 0].float()
    return out if bias is None else out + bias[experts].float()
