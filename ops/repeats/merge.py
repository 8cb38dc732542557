"""`merge_repeats`: its definition in plain ATen, which is also what runs off CUDA, and the choice of the kernel."""

import torch
from torch import Tensor

from ..reroute_merged.reference import first_of_same, merged_weights


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
    slots = torch.arange(topk_ids.shape[1], device=topk_ids.device)
    first = first_of_same(topk_ids, topk_ids >= 0, slots)
    return torch.where(first == slots, topk_ids, -1), merged_weights(topk_weights, first)
