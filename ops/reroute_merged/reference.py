"""What `sere::reroute_merged` computes, in plain ATen: no data-dependent shape, no loop over tokens.

This file defines the operator. It is also its implementation off CUDA and, with `named_by_comparison`, its
decomposition for exporters: `reroute_merged_reference` has the operator's own signature.

Why a token's experts stay distinct. Let its original ids be distinct. (1) A kept slot, the first of its
group, carries the group's expert; different groups, different experts. (2) Every expert of the active set A
and every group's expert is a value of the map, and a value of the map is a fixed point of it. (3) A filler
is in A and not named by a kept slot; fillers of one token differ. (4) A freed slot that gets no filler falls
back on an original id that is no fixed point, so it is neither a kept expert nor a filler: its own, unless
that is the group's expert v. Then the group's first slot was re-routed to v, its original id is no fixed
point and nobody else falls back on it, because that slot is kept and only one slot of the group was v.
"""

import torch
from torch import Tensor

from ..reroute.reference import Named, in_range, named_by_scatter, reroute_reference


def first_of_same(ids: Tensor, named: Tensor, slots: Tensor) -> Tensor:
    """For every slot the first slot of its token with the same id, int64 [T, K]; its own where `named` is false.

    slots: 0 to K - 1.
    """
    same = (ids[:, :, None] == ids[:, None, :]) & named[:, :, None]
    same = same | (slots[:, None] == slots)
    # The first of equal maxima.
    return same.int().argmax(2)


def first_slots(ids: Tensor, new_ids: Tensor, num_experts: int) -> Tensor:
    """For every slot the first slot of its token that names the same expert: int64 [T, K].

    A slot with an out-of-range id, and every slot of a token that re-routing did not change, is its own.
    """
    num_slots = ids.shape[1]
    slots = torch.arange(num_slots, device=ids.device)
    first = first_of_same(new_ids, in_range(new_ids, num_experts), slots)
    changed = (new_ids != ids).any(1, keepdim=True)
    return torch.where(changed, first, slots)


def merged_weights(weights: Tensor, first: Tensor) -> Tensor:
    """Weights [T, K] with every group's sum in its first slot and 0 in the freed ones."""
    slots = torch.arange(weights.shape[1], device=weights.device)
    accumulate = torch.float64 if weights.dtype == torch.float64 else torch.float32
    owned = first[:, None, :] == slots[:, None]
    sums = torch.where(owned, weights.to(accumulate)[:, None, :], 0.0).sum(2)
    # A slot that is alone keeps its weight's bits (0.0 + -0.0 would not).
    merged = torch.where(owned.sum(2) > 1, sums.to(weights.dtype), weights)
    return torch.where(first == slots, merged, 0.0)


def filled_ids(
    ids: Tensor, new_ids: Tensor, first: Tensor, num_experts: int, token_mask: Tensor | None, named_of: Named
) -> Tensor:
    """Re-routed ids [T, K] whose freed slots name distinct experts."""
    num_tokens, num_slots = ids.shape
    slots = torch.arange(num_slots, device=ids.device)
    freed = first != slots
    named = named_of(new_ids, num_experts) > 0
    active = (named if token_mask is None else named & token_mask[:, None]).any(0)
    # The K lowest candidates in ascending order; E means that there are no more. Not by cumsum: TensorRT's takes no
    # integers.
    experts = torch.arange(num_experts, device=ids.device)
    candidates = torch.where(active & ~named, experts, num_experts)
    none = torch.full((num_tokens, num_slots), num_experts, dtype=torch.int64, device=ids.device)
    fillers = torch.cat([candidates, none], 1).topk(num_slots, largest=False, sorted=True).values
    # The n-th freed slot takes filler n - 1.
    place = (freed[:, None, :] & (slots < slots[:, None])).sum(2)
    filler = fillers.gather(1, place).to(ids.dtype)
    original = torch.where(ids == new_ids, ids.gather(1, first), ids)
    return torch.where(freed, torch.where(filler < num_experts, filler, original), new_ids)


def reroute_merged_reference(
    topk_ids: Tensor,
    topk_weights: Tensor,
    similarity: Tensor,
    select_top_k: int,
    threshold: float = 0.0,
    min_active: int = 0,
    token_mask: Tensor | None = None,
    *,
    named: Named = named_by_scatter,
) -> tuple[Tensor, Tensor]:
    """See `sere_compile.ops.reroute_merged`. Returns two fresh contiguous tensors; `named` as in `primary_experts`."""
    num_slots, num_experts = topk_ids.shape[-1], similarity.shape[0]
    if select_top_k <= 0 or select_top_k >= num_slots:
        contiguous = torch.contiguous_format
        return topk_ids.clone(memory_format=contiguous), topk_weights.clone(memory_format=contiguous)
    ids = topk_ids.contiguous().view(-1, num_slots)
    weights = topk_weights.contiguous().view(-1, num_slots)
    mask = None if token_mask is None else token_mask.reshape(-1)
    new_ids = reroute_reference(ids, similarity, select_top_k, threshold, min_active, mask, named=named)
    first = first_slots(ids, new_ids, num_experts)
    out_ids = filled_ids(ids, new_ids, first, num_experts, mask, named)
    return out_ids.view(topk_ids.shape), merged_weights(weights, first).view(topk_ids.shape)
