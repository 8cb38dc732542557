"""`merge_repeats`: its definition in plain ATen, which is also what runs off CUDA, and the choice of the kernel."""

import torch
from torch import Tensor


def merge_repeats(topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Give the first of a token's slots that name one expert the weights of all of them.

    The others name no expert. A slot that is alone keeps its id and its weight's bits.

    Args:
        topk_ids: integers [T, K]; negative ones name no expert.
        topk_weights: floats [T, K].

    Returns:
        Ids, -1 in the slots that were merged into an earlier one; weights, summed in fp32 (fp64 for fp64), 0 there.
    """
    if topk_ids.is_cuda:
        from ..launching import device_guard
        from .kernel import launch_merge_repeats

        with device_guard(topk_ids):
            return launch_merge_repeats(topk_ids, topk_weights)
    return merge_repeats_reference(topk_ids, topk_weights)


def merge_repeats_reference(topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_repeats` by comparing all pairs of slots."""
    same = (topk_ids[:, :, None] == topk_ids[:, None, :]) & (topk_ids >= 0)[:, :, None]
    merged = same.tril(-1).any(2)
    accumulate = torch.float64 if topk_weights.dtype == torch.float64 else torch.float32
    sums = torch.where(same, topk_weights.to(accumulate)[:, None, :], 0.0).sum(2).to(topk_weights.dtype)
    weights = torch.where(same.sum(2) > 1, sums, topk_weights)
    return torch.where(merged, -1, topk_ids), torch.where(merged, 0.0, weights)
