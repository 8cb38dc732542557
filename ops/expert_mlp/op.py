"""The operator `sere::expert_mlp`: argument checks, shape rule, choice between kernels and reference.

Registered as a `triton_op`: torch.compile sees through it, torch.export keeps it whole. What it decomposes to where
CUDA C++ is faster than Triton, and on CPUs, are operators of their own, `sere::expert_mlp_stream` and
`sere::expert_mlp_cpu`, which compilers call as they are.
"""

import torch
from torch import Tensor

from ..checks import check_ids
from ..registration import register_triton_op
from . import cpu
from .mxfp4 import MX_BLOCK, mxfp4_sizes
from .reference import ACTIVATIONS, Call, expert_mlp_reference, gate_width, scale_sizes

# Up to here the weights are read once or nearly so; beyond, a matmul that sorts the tokens is better.
MAX_TOKENS = 256
# The plan looks at all slots at once.
MAX_SLOTS = 4096
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(num_tokens: int, num_slots: int, dtype: torch.dtype, activation: str) -> bool:
    """Whether the Triton kernels can run a layer of T tokens and K slots each on CUDA.

    Args:
        num_tokens: T, concrete.
        num_slots: K.
        dtype: of hidden and of both weights.
        activation: one of `ACTIVATIONS`.
    """
    return (
        num_tokens <= MAX_TOKENS
        and num_tokens * num_slots <= MAX_SLOTS
        and dtype in DTYPES
        and activation in ACTIVATIONS
    )


def check_arguments(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    transposed: bool,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    fp8_activations: bool = False,
) -> None:
    """Raise TypeError (dtype) or ValueError (shape, device, value), naming argument, expected and actual."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if hidden.dtype not in DTYPES:
        raise TypeError(f"hidden: expected dtype {', '.join(map(str, DTYPES))}, got {hidden.dtype}")
    check_ids(topk_ids)
    if not topk_weights.dtype.is_floating_point:
        raise TypeError(f"topk_weights: expected a floating-point dtype, got {topk_weights.dtype}")
    for name, tensor, dims in (("hidden", hidden, "[T, H]"), ("topk_ids", topk_ids, "[T, K]")):
        if tensor.dim() != 2:
            raise ValueError(f"{name}: expected shape {dims}, got {list(tensor.shape)}")
    if down.dim() != 3 or down.shape[0] == 0:
        layout = "[E, I, H]" if transposed else "[E, H, I]"
        raise ValueError(f"down: expected shape {layout} with E >= 1, got {list(down.shape)}")
    packed = 2 if down_scale is not None and down.dtype == torch.uint8 else 1  # numbers in an element
    experts, inner = down.shape[0], down.shape[1 if transposed else 2] * packed
    width = hidden.shape[1]
    columns = gate_width(activation) * inner
    expected = {
        "topk_ids": (topk_ids, [hidden.shape[0], topk_ids.shape[1]]),
        "topk_weights": (topk_weights, list(topk_ids.shape)),
        "gate_up": (gate_up, [experts, width, columns] if transposed else [experts, columns, width // packed]),
        "down": (down, [experts, inner, width] if transposed else [experts, width, inner // packed]),
        "gate_up_bias": (gate_up_bias, [experts, columns]),
        "down_bias": (down_bias, [experts, width]),
    }
    for name, (argument, shape) in expected.items():
        if argument is None:
            continue
        if list(argument.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {list(argument.shape)}")
        if argument.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device} (of hidden), got {argument.device}")
    check_weight_dtypes(hidden, {"gate_up": (gate_up, gate_up_scale), "down": (down, down_scale)}, transposed)
    if fp8_activations and gate_up.dtype != torch.float8_e4m3fn:
        raise ValueError("fp8_activations: expected False without FP8 weights, got True")


def check_weight_dtypes(hidden: Tensor, weights: dict[str, tuple[Tensor, Tensor | None]], transposed: bool) -> None:
    """Raise unless both weights have the dtype of hidden, or both are FP8 or both MXFP4 and have scales."""
    if any(scale is not None for _, scale in weights.values()):
        return check_scaled_weights(hidden, weights, transposed)
    for name, (weight, _) in weights.items():
        if weight.dtype != hidden.dtype:
            raise TypeError(f"{name}: expected dtype {hidden.dtype} (of hidden), got {weight.dtype}")


def check_scaled_weights(hidden: Tensor, weights: dict[str, tuple[Tensor, Tensor | None]], transposed: bool) -> None:
    """Raise TypeError or ValueError unless both weights are FP8 or MXFP4 and have a scale for each of their blocks."""
    if transposed:
        raise ValueError("transposed: expected False with scales, got True")
    dtype = torch.uint8 if any(weight.dtype == torch.uint8 for weight, _ in weights.values()) else torch.float8_e4m3fn
    if dtype == torch.uint8 and hidden.dtype == torch.float16:
        raise TypeError("hidden: expected dtype torch.bfloat16 or torch.float32 with MXFP4 weights, got torch.float16")
    for name, (weight, scale) in weights.items():
        if weight.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype} with scales, got {weight.dtype}")
        blocks = list(_scale_sizes(name, weight))
        if scale is None:
            raise ValueError(f"{name}_scale: expected shape {blocks}, as the other weight has scales, got None")
        if list(scale.shape) != blocks:
            raise ValueError(f"{name}_scale: expected shape {blocks}, got {list(scale.shape)}")
        kind = torch.uint8 if dtype == torch.uint8 else torch.float32
        if scale.dtype != kind:
            raise TypeError(f"{name}_scale: expected dtype {kind}, got {scale.dtype}")
        if scale.device != weight.device:
            raise ValueError(f"{name}_scale: expected device {weight.device} (of {name}), got {scale.device}")


def _scale_sizes(name: str, weight: Tensor) -> tuple[int, ...]:
    if weight.dtype != torch.uint8:
        return scale_sizes(weight.shape)
    numbers = 2 * weight.shape[-1]
    if numbers % MX_BLOCK:
        raise ValueError(f"{name}: expected rows of a multiple of {MX_BLOCK} MXFP4 numbers, got {numbers}")
    return mxfp4_sizes((*weight.shape[:-1], numbers))[1]


def _expert_mlp(
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
    tensors = (hidden, topk_ids, topk_weights, gate_up, down, gate_up_bias, down_bias)
    fp8 = (gate_up_scale, down_scale, fp8_activations)
    check_arguments(*tensors, activation, interleaved, transposed, *fp8)
    call = Call(*tensors, *fp8)
    if hidden.is_cuda and supports(hidden.shape[0], topk_ids.shape[1], hidden.dtype, activation):
        from .stream import takes

        if takes(call, transposed):
            return torch.ops.sere.expert_mlp_stream.default(*tensors, *fp8, activation, interleaved)
        from ..launching import device_guard
        from .kernel import launch_expert_mlp, multiplies_fp8

        if not call.fp8 or multiplies_fp8(hidden.device):
            with device_guard(hidden):
                return launch_expert_mlp(*tensors, activation, interleaved, transposed, None, *fp8)
    if cpu.takes(call):
        scales = gate_up_scale, down_scale
        return torch.ops.sere.expert_mlp_cpu.default(*tensors, *scales, activation, interleaved, transposed)
    return expert_mlp_reference(*tensors, activation, interleaved, transposed, *fp8)


@torch.library.custom_op("sere::expert_mlp_cpu", mutates_args=())
def expert_mlp_cpu(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    activation: str,
    interleaved: bool,
    transposed: bool,
) -> Tensor:
    """`sere::expert_mlp` on a CPU, whose weights are not FP8."""
    tensors = (hidden, topk_ids, topk_weights, gate_up, down, gate_up_bias, down_bias, gate_up_scale, down_scale)
    return cpu.launch_cpu(Call(*tensors), activation, interleaved, transposed)


@expert_mlp_cpu.register_fake
def _expert_mlp_cpu_fake(hidden, *_):
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("sere::expert_mlp_stream", mutates_args=())
def expert_mlp_stream(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    fp8_activations: bool,
    activation: str,
    interleaved: bool,
) -> Tensor:
    """`sere::expert_mlp` by `stream.cu` on Hopper and later, by Triton where that cannot be had there after all."""
    from ..launching import device_guard
    from .kernel import launch_expert_mlp
    from .stream import launch_stream

    tensors = (hidden, topk_ids, topk_weights, gate_up, down, gate_up_bias, down_bias)
    fp8 = (gate_up_scale, down_scale, fp8_activations)
    with device_guard(hidden):
        out = launch_stream(Call(*tensors, *fp8), activation, interleaved)
        return launch_expert_mlp(*tensors, activation, interleaved, False, None, *fp8) if out is None else out


@expert_mlp_stream.register_fake
def _expert_mlp_stream_fake(hidden, *_):
    return hidden.new_empty(hidden.shape)


_expert_mlp_op = register_triton_op("sere::expert_mlp", _expert_mlp)


@_expert_mlp_op.register_fake
def _expert_mlp_fake(
    hidden, topk_ids, topk_weights, gate_up, down, gate_up_bias=None, down_bias=None,
    activation="silu_glu", interleaved=False, transposed=False, gate_up_scale=None, down_scale=None,
    fp8_activations=False,
):  # fmt: skip
    tensors = (hidden, topk_ids, topk_weights, gate_up, down, gate_up_bias, down_bias)
    check_arguments(*tensors, activation, interleaved, transposed, gate_up_scale, down_scale, fp8_activations)
    return hidden.new_empty(hidden.shape)


def expert_mlp(
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
    """The weighted sum over each token's experts of `down(activation(gate_up(x)))`.

    Args:
        hidden: x, bf16, fp16 or fp32 [T, H], any strides.
        topk_ids: int32 or int64 [T, K], any strides. A slot whose id is outside [0, E), such as the sentinels of
            expert parallelism, contributes nothing. A token may name one expert twice.
        topk_weights: [T, K] in any floating point dtype, multiplied with the expert's output in fp32.
        gate_up: [E, G * I, H], or [E, H, G * I] with transposed; G = `gate_width(activation)`; dtype of hidden, or
            float8_e4m3fn with scales; or MXFP4 in uint8 [E, G * I, H / 2] with scales.
        down: [E, H, I], or [E, I, H] with transposed; dtype of hidden, or float8_e4m3fn with scales; or MXFP4 in uint8
            [E, H, I / 2] with scales.
        gate_up_bias: [E, G * I] or None.
        down_bias: [E, H] or None; added before the multiplication with the slot's weight.
        activation: one of `ACTIVATIONS`. "silu": f(x); "silu_glu": f(gate) * up; "gpt_oss": gpt-oss's clamped
            SwiGLU (alpha 1.702, limit 7).
        interleaved: gate and up alternate along G * I (gate first); otherwise the first I are the gate.
        transposed: how both weights are laid out.
        gate_up_scale: fp32 [E, ceil(G * I / 128), ceil(H / 128)], what each block of 128 x 128 of gate_up is to be
            multiplied with, as in DeepSeek-V3's and Qwen3's FP8 checkpoints; of MXFP4 weights uint8 [E, G * I, H / 32],
            as in gpt-oss's (see `mxfp4.py`); or None.
        down_scale: fp32 [E, ceil(H / 128), ceil(I / 128)], or uint8 [E, H, I / 32]; given where gate_up_scale is.
        fp8_activations: with FP8 weights, round what each weight is multiplied with to FP8 as well, 128 numbers of a
            row with one factor, their largest over 448, as these checkpoints' `activation_scheme: "dynamic"` asks.

    Returns:
        A new contiguous tensor [T, H] in the dtype of hidden.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a shape, a device or the name of the activation does not fit.

    On CUDA up to 256 tokens, and on CPUs, the weights of active experts are read from memory once, those of others not
    at all. On CPUs a token that names an expert twice is computed once, with the sum of its weights; FP8 weights
    run as the slow reference does, MXFP4 weights are unpacked one active expert after the other.
    The first projection is rounded to the dtype of hidden after the activation only; everything else is in fp32.
    FP8 weights are multiplied as they are, exactly, with activations in the dtype of hidden (or FP8), and each block's
    part of a sum with its scale. GPUs older than compute capability 8.9 run them as the slow reference does. MXFP4
    weights are multiplied as the numbers that they stand for, with hidden states in bf16 or fp32.
    Deterministic. No gradient.
    """
    return torch.ops.sere.expert_mlp.default(
        hidden, topk_ids, topk_weights, gate_up, down, gate_up_bias, down_bias, activation, interleaved, transposed,
        gate_up_scale, down_scale, fp8_activations,
    )  # fmt: skip


def expert_mlp_into(
    out: Tensor,
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu_glu",
    interleaved: bool = False,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> None:
    """`expert_mlp` into a tensor that is there: for an engine, which owns the memory of its layers' outputs.

    No operator: compilers do not see it, and nothing is checked that `expert_mlp` checks.

    `out` is [T, H] in the dtype of hidden, contiguous, and not hidden itself; what it held is lost. The others are as
    `expert_mlp` takes them, on one device; weights with scales are MXFP4.

    Raises:
        ValueError: out has another shape, dtype or layout, or lies where hidden does.
    """
    if out.shape != hidden.shape or out.dtype != hidden.dtype or not out.is_contiguous():
        raise ValueError(
            f"out: expected contiguous {hidden.dtype} {list(hidden.shape)}, got {out.dtype} {list(out.shape)}"
        )
    if out.numel() and out.data_ptr() == hidden.data_ptr():
        raise ValueError("out: expected memory of its own, got that of hidden")
    tensors = (hidden, topk_ids, topk_weights, gate_up, down, gate_up_bias, down_bias)
    scales = (gate_up_scale, down_scale)
    call = Call(*tensors, *scales)
    if not (hidden.is_cuda and supports(hidden.shape[0], topk_ids.shape[1], hidden.dtype, activation)):
        if cpu.takes(call):
            out.copy_(cpu.launch_cpu(call, activation, interleaved, False))
        else:
            out.copy_(expert_mlp_reference(*tensors, activation, interleaved, False, *scales))
        return
    from ..launching import device_guard
    from .kernel import launch_expert_mlp
    from .stream import launch_stream, takes

    with device_guard(hidden):
        if takes(call, False) and launch_stream(call, activation, interleaved, out=out) is not None:
            return
        launch_expert_mlp(*tensors, activation, interleaved, False, None, *scales, into=out)
