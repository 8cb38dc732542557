"""The Triton kernel of `sere::reroute_merged` and its launcher.

Two launches: the expert map of `sere::reroute` once per expert, then this file's kernel over tokens. The
proof that a token's experts stay distinct is in reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ..launching import launchable
from ..reroute.kernel import (
    LaunchConfig,
    expert_block,
    expert_words,
    launch_expert_map,
    slot_words,
    word_bits,
)


@triton.jit
def load_ids(ids_ptr, map_ptr, inside, E: tl.constexpr):
    """Original ids, re-routed ids and whether they are experts, for one slot of a block of tokens."""
    ids = tl.load(ids_ptr, mask=inside, other=-1)
    is_expert = (ids >= 0) & (ids < E)
    target = tl.load(map_ptr + ids, mask=is_expert, other=0)
    return ids, tl.where(is_expert, target.to(ids.dtype), ids), is_expert


@triton.jit
def active_experts(
    ids_ptr,
    map_ptr,
    mask_ptr,
    num_tokens,
    stride_t,
    stride_k,
    stride_m,
    K: tl.constexpr,
    E: tl.constexpr,
    E_BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The experts that real tokens name after re-routing: bool [1, E_BLOCK]."""
    used = slot_words(
        ids_ptr, mask_ptr, num_tokens, stride_t, stride_k, stride_m, 0, K, E, HAS_MASK, E_BLOCK // 32, CHUNK
    )
    expert = tl.arange(0, E_BLOCK)
    is_used = (tl.reshape(word_bits(used), (E_BLOCK,)) != 0) & (expert < E)
    target = tl.load(map_ptr + expert, mask=is_used, other=0)
    words = tl.reduce_or(expert_words(target, is_used, E_BLOCK // 32), axis=1)
    return tl.reshape(word_bits(words), (1, E_BLOCK)) != 0


@triton.jit(do_not_specialize=["num_tokens"])
def merge_slots_kernel(
    ids_ptr,
    weights_ptr,
    map_ptr,
    mask_ptr,
    out_ids_ptr,
    out_weights_ptr,
    num_tokens,
    stride_t,
    stride_k,
    weight_stride_t,
    weight_stride_k,
    stride_m,
    K: tl.constexpr,
    E: tl.constexpr,
    E_BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Re-route and merge TOKENS rows of ids and weights [T, K] per program.

    What a token knows of its experts is kept in tiles [TOKENS, E_BLOCK]; two passes over its slots, in order.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < num_tokens
    column = tl.arange(0, E_BLOCK)[None, :]
    accumulate: tl.constexpr = tl.float64 if weights_ptr.dtype.element_ty == tl.float64 else tl.float32
    active = active_experts(
        ids_ptr, map_ptr, mask_ptr, num_tokens, stride_t, stride_k, stride_m, K, E, E_BLOCK, HAS_MASK, CHUNK
    )
    # First pass. Per expert: how many of the token's slots name it, the sum of their weights, the original
    # id of the first of them.
    count = tl.zeros([TOKENS, E_BLOCK], tl.int32)
    total = tl.zeros([TOKENS, E_BLOCK], accumulate)
    first_id = tl.zeros([TOKENS, E_BLOCK], ids_ptr.dtype.element_ty)
    changed = tl.zeros([TOKENS], tl.int32)
    for k in range(0, K):
        ids, new_ids, is_expert = load_ids(ids_ptr + token * stride_t + k * stride_k, map_ptr, inside, E)
        weight_offset = token * weight_stride_t + k * weight_stride_k
        weight = tl.load(weights_ptr + weight_offset, mask=inside, other=0).to(accumulate)
        here = (column == new_ids[:, None]) & is_expert[:, None]
        first_id = tl.where(here & (count == 0), ids[:, None], first_id)
        total = tl.where(here, total + weight[:, None], total)
        count += here.to(tl.int32)
        changed = changed | (new_ids != ids).to(tl.int32)
    candidate = active & (count == 0)
    rank = tl.cumsum(candidate.to(tl.int32), axis=1)
    # Second pass: write. The n-th freed slot takes the n-th candidate.
    seen = tl.zeros([TOKENS, E_BLOCK], tl.int32)
    num_freed = tl.zeros([TOKENS], tl.int32)
    for k in range(0, K):
        ids, new_ids, is_expert = load_ids(ids_ptr + token * stride_t + k * stride_k, map_ptr, inside, E)
        weight_offset = token * weight_stride_t + k * weight_stride_k
        weight = tl.load(weights_ptr + weight_offset, mask=inside, other=0)
        here = (column == new_ids[:, None]) & is_expert[:, None]
        freed = (changed != 0) & (tl.max((here & (seen != 0)).to(tl.int32), axis=1) != 0)
        seen = seen | here.to(tl.int32)
        num_freed += freed.to(tl.int32)
        is_filler = candidate & (rank == num_freed[:, None])
        filler = tl.max(tl.where(is_filler, column, -1), axis=1)
        group_first_id = tl.sum(tl.where(here, first_id, 0), axis=1)
        fallback = tl.where(ids == new_ids, group_first_id, ids)
        out_ids = tl.where(freed, tl.where(filler >= 0, filler.to(ids.dtype), fallback), new_ids)
        group_total = tl.sum(tl.where(here, total, 0.0), axis=1).to(weight.dtype)
        merged = (changed != 0) & (tl.sum(tl.where(here, count, 0), axis=1) > 1)
        # A slot that is alone keeps its weight's bits.
        out_weight = tl.where(merged, group_total, weight)
        out_offset = token * K + k
        tl.store(out_ids_ptr + out_offset, out_ids, mask=inside)
        tl.store(out_weights_ptr + out_offset, tl.where(freed, 0.0, out_weight), mask=inside)


def merge_launch_config(e_block: int) -> LaunchConfig:
    """`slots` is tokens per program here: about five tiles [slots, e_block] of 4 registers a thread."""
    return LaunchConfig(max(1, 512 // e_block), max(64, 4096 // (e_block // 32)), 4)


def launch_reroute_merged(
    topk_ids: Tensor,
    topk_weights: Tensor,
    similarity: Tensor,
    select_top_k: int,
    threshold: float,
    min_active: int,
    token_mask: Tensor | None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`sere::reroute_merged` for 0 < select_top_k < K on checked arguments; `config` replaces the heuristics."""
    num_slots, num_experts = int(topk_ids.shape[-1]), int(similarity.shape[0])
    ids = topk_ids.reshape(-1, num_slots)
    weights = topk_weights.reshape(-1, num_slots)
    mask = None if token_mask is None else token_mask.reshape(-1)
    num_tokens = ids.shape[0]
    out_ids = torch.empty(topk_ids.shape, dtype=topk_ids.dtype, device=topk_ids.device)
    out_weights = torch.empty(topk_ids.shape, dtype=topk_weights.dtype, device=topk_ids.device)
    if guard_or_false(num_tokens == 0):
        return out_ids, out_weights
    mapping = launch_expert_map(ids, similarity, select_top_k, threshold, min_active, mask, config)
    e_block = expert_block(num_experts)
    config = config or merge_launch_config(e_block)
    launchable(merge_slots_kernel)[(triton.cdiv(num_tokens, config.slots),)](
        ids,
        weights,
        mapping,
        ids if mask is None else mask,
        out_ids,
        out_weights,
        num_tokens,
        ids.stride(0),
        ids.stride(1),
        weights.stride(0),
        weights.stride(1),
        0 if mask is None else mask.stride(0),
        K=num_slots,
        E=num_experts,
        E_BLOCK=e_block,
        HAS_MASK=mask is not None,
        TOKENS=config.slots,
        CHUNK=config.chunk,
        num_warps=config.num_warps,
    )
    return out_ids, out_weights
