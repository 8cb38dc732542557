"""The operator `sere::route`: argument checks, shape rule, choice between kernel and reference."""

import torch
from torch import Tensor

from ..registration import register_triton_op
from .reference import SCORINGS, route_reference

# The K maxima are unrolled, and a token's scores stay in registers.
KERNEL_MAX_SLOTS = 32
KERNEL_MAX_EXPERTS = 1024


def check_arguments(logits: Tensor, bias: Tensor | None, top_k: int, scoring: str, dtype: torch.dtype) -> None:
    """Raise TypeError (dtype) or ValueError (shape, device, value), naming argument, expected and actual."""
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"logits: expected dtype float32, bfloat16 or float16, got {logits.dtype}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating point dtype, got {dtype}")
    if logits.dim() == 0 or not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(f"top_k: expected 1 to E of logits {list(logits.shape)}, got {top_k}")
    if scoring not in SCORINGS:
        raise ValueError(f"scoring: expected one of {', '.join(SCORINGS)}, got {scoring!r}")
    if bias is not None:
        if bias.shape != logits.shape[-1:]:
            raise ValueError(f"bias: expected shape {list(logits.shape[-1:])}, got {list(bias.shape)}")
        if bias.device != logits.device:
            raise ValueError(f"bias: expected device {logits.device} (of logits), got {bias.device}")


def _route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool = False,
    epsilon: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    check_arguments(logits, bias, top_k, scoring, dtype)
    options = int(top_k), scoring, bool(renormalize), float(epsilon), float(scale), dtype
    if logits.is_cuda and options[0] <= KERNEL_MAX_SLOTS and logits.shape[-1] <= KERNEL_MAX_EXPERTS:
        from .kernel import device_guard, launch_route

        with device_guard(logits):
            return launch_route(logits, bias, *options)
    return route_reference(logits, bias, *options)


_route_op = register_triton_op("sere::route", _route)


@_route_op.register_fake
def _route_fake(
    logits, bias, top_k, scoring, renormalize=False, epsilon=0.0, scale=1.0, dtype=torch.float32
):  # fmt: skip
    check_arguments(logits, bias, top_k, scoring, dtype)
    shape = (*logits.shape[:-1], top_k)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=torch.int64)


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool = False,
    epsilon: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Score router logits, select the top K experts of each token, and weigh them, in one launch on CUDA.

    Args:
        logits: fp32, bf16 or fp16 [..., E], any strides; everything is computed in fp32.
        bias: [E], added to the scores for the selection only; the weights are the scores without it.
        top_k: K, at most E.
        scoring: "softmax" or "sigmoid" over all experts before the selection, "softmax_after" over the selected
            logits, or "none".
        renormalize: divide the weights of a token by their sum plus epsilon.
        epsilon: see renormalize.
        scale: a factor on the weights, last.
        dtype: of the weights.

    Returns:
        (weights, ids), both new and contiguous [..., K], ids int64, in descending order of score plus bias; the
        lowest expert first among equals, NaN above everything.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device, `top_k` or the name of the scoring does not fit.

    No gradient.
    """
    return torch.ops.sere.route.default(logits, bias, top_k, scoring, renormalize, epsilon, scale, dtype)
