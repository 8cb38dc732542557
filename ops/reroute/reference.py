"""What `sere::reroute` computes, in plain ATen: no data-dependent shape, no loop over tokens.

This file defines the operator. It is also its implementation off CUDA and, with `named_by_comparison`, its
decomposition for exporters: `reroute_reference` has the operator's own signature. Nothing here flattens tokens
and slots into one dimension: an exported program does not check strides, and a view that was traced with
contiguous ids would fail on others.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Which experts each row of ids names: (ids [R, C], E) to int32 [R, E], 1 where some id of row r is e. Ids outside of
# [0, E) name none.
Named = Callable[[Tensor, int], Tensor]


def named_by_scatter(ids: Tensor, num_experts: int) -> Tensor:
    """`Named` by work of R x C: the cheaper one for PyTorch, where tokens are many."""
    # A scatter of one constant has the same result in any order. Column E takes everything invalid.
    index = torch.where(in_range(ids, num_experts), ids.long(), num_experts)
    named = torch.zeros(ids.shape[0], num_experts + 1, dtype=torch.int32, device=ids.device)
    return named.scatter(1, index, 1)[:, :num_experts]


def named_by_comparison(ids: Tensor, num_experts: int) -> Tensor:
    """`Named` by work of R x C x E, without a scatter: TensorRT takes no more indices than places."""
    experts = torch.arange(num_experts, dtype=ids.dtype, device=ids.device)
    names = (ids[:, None, :] == experts[:, None]).int()
    # A batch without tokens has no largest number. A size that is free is never asked.
    empty = isinstance(ids.shape[1], int) and ids.shape[1] == 0
    return names.sum(2, dtype=torch.int32) if empty else names.amax(2)


def in_range(ids: Tensor, num_experts: int) -> Tensor:
    """True where an id names an expert; False for expert-parallel sentinels such as -1 and E."""
    return (ids >= 0) & (ids < num_experts)


def primary_experts(
    ids: Tensor,
    num_experts: int,
    select_top_k: int,
    min_active: int,
    token_mask: Tensor | None,
    max_active: int = 0,
    named: Named = named_by_scatter,
) -> Tensor:
    """The experts that no slot may leave: a bool mask [E].

    Args:
        ids: [T, K], any integer values.
        num_experts: E.
        select_top_k: S in 1..K-1.
        min_active: widen S to the smallest S' whose union holds that many experts; with none below K every
            expert is primary, which makes the map the identity.
        token_mask: bool [T] or None; False rows contribute nothing.
        max_active: widen S, up to K, while the union holds at most that many experts; 0 does not.
        named: how the experts of a slot are found; the result is the same.
    """
    # Rows are slots; what padding names is no expert.
    rows = ids.T if token_mask is None else torch.where(token_mask, ids.T, -1)
    if max_active > 0:
        return _primary_within(named(rows, num_experts), select_top_k, min_active, max_active)
    if min_active <= 0:
        return named(rows[:select_top_k], num_experts).amax(0) > 0
    # unions[i]: the experts named in the first S + i slots; S' = K is the same as "none".
    per_slot = named(rows[:-1], num_experts)
    slots = torch.arange(per_slot.shape[0], device=ids.device)
    # Not cumsum: TensorRT's takes no integers.
    until = (slots[select_top_k - 1 :, None] >= slots)[:, :, None]
    unions = torch.where(until, per_slot, 0).amax(1) > 0
    too_few = (unions.sum(1) < min_active).sum(0, keepdim=True)
    every = torch.ones(1, num_experts, dtype=torch.bool, device=ids.device)
    return torch.cat([unions, every]).index_select(0, too_few)[0]


def _primary_within(per_slot: Tensor, select_top_k: int, min_active: int, max_active: int) -> Tensor:
    """`primary_experts` with a budget: the union of the first max(S, widest that fits, narrowest with enough) slots.

    `per_slot` is int32 [K, E].
    """
    slots = torch.arange(per_slot.shape[0], device=per_slot.device)
    # unions[i]: the experts named in the first i + 1 slots.
    unions = torch.where((slots[:, None] >= slots)[:, :, None], per_slot, 0).amax(1) > 0
    sizes = unions.sum(1)
    last = torch.maximum((sizes <= max_active).sum(0) - 1, (sizes < min_active).sum(0))
    # Not clamp: TensorRT's takes no integers.
    last = torch.where(last < select_top_k - 1, select_top_k - 1, torch.where(last > slots[-1], slots[-1], last))
    every = slots[-1:] == last
    return unions.index_select(0, last[None])[0] | every


def expert_map(similarity: Tensor, primary: Tensor, threshold: float) -> Tensor:
    """Where each expert's slots go: int64 [E], the expert itself for those that stay.

    Args:
        similarity: [E, E]; row u holds the similarities of expert u, compared in fp32.
        primary: bool [E].
        threshold: rho; an expert whose best similarity is below it stays. Not above 0: no such expert.
    """
    experts = torch.arange(similarity.shape[0], device=similarity.device)
    similarity = similarity.float()
    # A search with strict `>` from -inf never chooses NaN or -inf (`NaN > -inf` is false).
    eligible = primary & (similarity > float("-inf"))
    masked = torch.where(eligible, similarity, float("-inf"))
    best = masked.amax(1)
    # argmax returns the first of equal maxima, in eager, Inductor and ONNX alike.
    target = masked.argmax(1)
    stays = primary | (best == float("-inf"))
    if threshold > 0:
        stays = stays | (best < threshold)
    return torch.where(stays, experts, target)


def apply_map(ids: Tensor, mapping: Tensor) -> Tensor:
    """`mapping[ids]` [T, K] in the dtype of ids; ids that name no expert pass through."""
    named = in_range(ids, mapping.shape[0])
    mapped = mapping[torch.where(named, ids.long(), 0)]
    return torch.where(named, mapped.to(ids.dtype), ids)


def leading_tokens(num_tokens: int, real_tokens: Tensor) -> Tensor:
    """Which of the tokens take part, bool [T]: the first `real_tokens`, int64 [1]."""
    return torch.arange(num_tokens, device=real_tokens.device) < real_tokens


def reroute_reference(
    topk_ids: Tensor,
    similarity: Tensor,
    select_top_k: int,
    threshold: float = 0.0,
    min_active: int = 0,
    token_mask: Tensor | None = None,
    max_active: int = 0,
    real_tokens: Tensor | None = None,
    *,
    named: Named = named_by_scatter,
) -> Tensor:
    """See `sere_compile.ops.reroute`. Returns a fresh contiguous tensor; `named` as in `primary_experts`."""
    num_slots = topk_ids.shape[-1]
    if select_top_k <= 0 or select_top_k >= num_slots:
        return topk_ids.clone(memory_format=torch.contiguous_format)
    ids = topk_ids.contiguous().view(-1, num_slots)
    mask = None if token_mask is None else token_mask.reshape(-1)
    real = None if real_tokens is None else leading_tokens(ids.shape[0], real_tokens)
    counted = mask if real is None else real if mask is None else mask & real
    primary = primary_experts(ids, similarity.shape[0], select_top_k, min_active, counted, max_active, named)
    new_ids = apply_map(ids, expert_map(similarity, primary, threshold))
    new_ids = new_ids if real is None else torch.where(real[:, None], new_ids, ids)
    return new_ids.view(topk_ids.shape)
