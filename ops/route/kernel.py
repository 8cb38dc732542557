"""The Triton kernel of `sere::route` and its launcher. Imported when a CUDA tensor arrives, and by interpreter tests.

A program holds the scores of a few tokens in registers and takes their maximum K times. Scores are compared as
integers that sort like the floats, with the expert's number in the low half, so that one maximum gives score and
number and equal scores have an order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ..reroute.kernel import device_guard, launchable

__all__ = ["device_guard", "launch_route", "route_kernel"]


@triton.jit
def sortable(scores):
    """int32 that sort like the fp32 scores; 0.0 and -0.0 are equal, NaN is above everything, as in torch.topk."""
    key = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    key = key ^ ((key >> 31) & 0x7FFFFFFF)
    return tl.where(scores != scores, 0x7FFFFFFF, key)


@triton.jit
def softmax_rows(x):
    """Softmax over the last of two dimensions; columns outside hold -inf."""
    numerator = tl.exp(x - tl.max(x, axis=1)[:, None])
    return numerator / tl.sum(numerator, axis=1)[:, None]


@triton.jit(do_not_specialize=["num_tokens", "epsilon", "scale"])
def route_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    num_tokens,
    stride_t,
    epsilon,
    scale,
    K: tl.constexpr,
    E: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    K_BLOCK: tl.constexpr,
    E_BLOCK: tl.constexpr,
):
    """Weights and ids [T, K] of TOKENS consecutive rows of logits [T, E] per program."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, E_BLOCK)[None, :]
    inside = (token < num_tokens)[:, None] & (column < E)
    scores = tl.load(logits_ptr + token[:, None] * stride_t + column, mask=inside, other=float("-inf")).to(tl.float32)
    if SCORING == "softmax":
        scores = softmax_rows(scores)
    elif SCORING == "sigmoid":
        scores = 1 / (1 + tl.exp(-scores))
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + column, mask=column < E, other=0.0).to(tl.float32)
    ranked = (sortable(choice).to(tl.int64) << 32) | (E_BLOCK - 1 - column)
    # Below every real candidate: -inf is -0x7F800001 as a key.
    taken = tl.full([TOKENS, E_BLOCK], -0x8000000000000000, tl.int64)
    ranked = tl.where(column < E, ranked, taken)
    slot = tl.arange(0, K_BLOCK)[None, :]
    ids = tl.zeros([TOKENS, K_BLOCK], tl.int32)
    weights = tl.full([TOKENS, K_BLOCK], float("-inf"), tl.float32)
    for k in tl.static_range(K):
        winner = tl.max(ranked, axis=1)[:, None]
        expert = E_BLOCK - 1 - (winner & 0xFFFFFFFF).to(tl.int32)
        if HAS_BIAS:
            weight = tl.sum(tl.where(column == expert, scores, 0.0), axis=1)[:, None]
        else:
            key = (winner >> 32).to(tl.int32)
            weight = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        ids = tl.where(slot == k, expert, ids)
        weights = tl.where(slot == k, weight, weights)
        ranked = tl.where(column == expert, taken, ranked)
    if SCORING == "softmax_after":
        weights = softmax_rows(weights)
    if RENORMALIZE:
        weights = weights / (tl.sum(tl.where(slot < K, weights, 0.0), axis=1)[:, None] + epsilon)
    offset = token[:, None] * K + slot
    stored = (token < num_tokens)[:, None] & (slot < K)
    tl.store(weights_ptr + offset, (weights * scale).to(weights_ptr.dtype.element_ty), mask=stored)
    tl.store(ids_ptr + offset, ids.to(tl.int64), mask=stored)


def launch_route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool,
    epsilon: float,
    scale: float,
    dtype: torch.dtype,
    tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`sere::route` on checked arguments; `tokens` (per program) replaces the heuristic."""
    num_experts = int(logits.shape[-1])
    rows = logits.reshape(-1, num_experts)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    shape = (*logits.shape[:-1], top_k)
    weights = torch.empty(shape, dtype=dtype, device=logits.device)
    ids = torch.empty(shape, dtype=torch.int64, device=logits.device)
    if guard_or_false(rows.shape[0] == 0):
        return weights, ids
    e_block = triton.next_power_of_2(num_experts)
    # One token in one warp at 128 experts: four scores a lane, K short reductions without a barrier.
    tokens = tokens or 1
    launchable(route_kernel)[(triton.cdiv(rows.shape[0], tokens),)](
        rows, logits if bias is None else bias.contiguous(), weights, ids, rows.shape[0], rows.stride(0),
        epsilon=epsilon, scale=scale,
        K=top_k, E=num_experts, SCORING=scoring, RENORMALIZE=renormalize, HAS_BIAS=bias is not None, TOKENS=tokens,
        K_BLOCK=triton.next_power_of_2(top_k), E_BLOCK=e_block, num_warps=1 if e_block <= 256 else 4,
    )  # fmt: skip
    return weights, ids
