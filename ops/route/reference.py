"""What `sere::route` computes, in plain ATen. This file defines the operator and is its implementation off CUDA."""

import torch
from torch import Tensor

# How logits become weights: over all experts before the selection, or over the selected ones after it.
SCORINGS = ("softmax", "sigmoid", "softmax_after", "none")


def route_reference(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool = False,
    epsilon: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """See `sere_compile.ops.route`. Returns fresh contiguous tensors (weights, ids)."""
    scores = logits.float()
    if scoring == "softmax":
        scores = scores.softmax(-1)
    elif scoring == "sigmoid":
        scores = scores.sigmoid()
    choice = scores if bias is None else scores + bias.float()
    # A stable sort, unlike topk, has an order among equals: the lowest index first.
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[..., :top_k].contiguous()
    weights = scores.gather(-1, ids)
    if scoring == "softmax_after":
        weights = weights.softmax(-1)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + epsilon)
    return (weights * scale).to(dtype), ids
