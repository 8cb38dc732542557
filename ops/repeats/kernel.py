"""The Triton kernel of `merge_repeats` and its launcher. Imported only when a CUDA tensor arrives, and by tests."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launchable

# Pairs of slots of a program.
PAIRS = 1024


@triton.jit(do_not_specialize=["num_tokens"])
def merge_repeats_kernel(
    ids_ptr, weights_ptr, out_ids_ptr, out_weights_ptr, num_tokens,
    K: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS rows of [T, K] per program; SLOTS is K or more, a power of two."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.arange(0, SLOTS)
    at = token[:, None] * K + slot[None, :]
    inside = (token < num_tokens)[:, None] & (slot < K)[None, :]
    ids = tl.load(ids_ptr + at, mask=inside, other=-1)
    weights = tl.load(weights_ptr + at, mask=inside, other=0.0)
    accumulate: tl.constexpr = tl.float64 if weights_ptr.dtype.element_ty == tl.float64 else tl.float32
    same = (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]
    earlier = same & (slot[None, None, :] < slot[None, :, None])
    merged = tl.sum(earlier.to(tl.int32), axis=2) > 0
    sums = tl.sum(tl.where(same, weights.to(accumulate)[:, None, :], 0.0), axis=2).to(weights.dtype)
    total = tl.where(tl.sum(same.to(tl.int32), axis=2) > 1, sums, weights)
    tl.store(out_ids_ptr + at, tl.where(merged, -1, ids), mask=inside)
    tl.store(out_weights_ptr + at, tl.where(merged, 0.0, total), mask=inside)


def launch_merge_repeats(topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_repeats` in one launch."""
    num_tokens, num_slots = topk_ids.shape
    ids, weights = topk_ids.contiguous(), topk_weights.contiguous()
    out_ids, out_weights = torch.empty_like(ids), torch.empty_like(weights)
    if num_tokens * num_slots == 0:
        return out_ids, out_weights
    slots = triton.next_power_of_2(num_slots)
    tokens = max(1, PAIRS // slots**2)
    launchable(merge_repeats_kernel)[(triton.cdiv(num_tokens, tokens),)](
        ids, weights, out_ids, out_weights, num_tokens, K=num_slots, SLOTS=slots, TOKENS=tokens, num_warps=4
    )
    return out_ids, out_weights
