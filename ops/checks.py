"""Checks of arguments that operators share: TypeError for a dtype, ValueError for anything else.

Each message names the argument, what was expected and what came.
"""

import torch
from torch import Tensor


def check_ids(topk_ids: Tensor) -> None:
    """Raise TypeError or ValueError unless the ids are int32 or int64 [..., K]."""
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_ids: expected dtype torch.int32 or torch.int64, got {topk_ids.dtype}")
    if topk_ids.dim() == 0:
        raise ValueError("topk_ids: expected shape [..., K], got a 0-dimensional tensor")


def check_weights(topk_ids: Tensor, topk_weights: Tensor) -> None:
    """Raise unless the weights are floating-point, with the shape and device of the ids."""
    if not topk_weights.is_floating_point():
        raise TypeError(f"topk_weights: expected a floating-point dtype, got {topk_weights.dtype}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights: expected shape {list(topk_ids.shape)} (of topk_ids), got {list(topk_weights.shape)}"
        )
    check_same_device(topk_ids, "topk_ids", topk_weights=topk_weights)


def check_token_mask(topk_ids: Tensor, token_mask: Tensor | None) -> None:
    """Raise unless the mask, if there is one, has one boolean per token of the ids."""
    if token_mask is None:
        return
    if token_mask.dtype != torch.bool:
        raise TypeError(f"token_mask: expected dtype torch.bool, got {token_mask.dtype}")
    if token_mask.shape != topk_ids.shape[:-1]:
        raise ValueError(
            f"token_mask: expected shape {list(topk_ids.shape[:-1])} (topk_ids without its last "
            f"dimension), got {list(token_mask.shape)}"
        )


def check_real_tokens(real_tokens: Tensor | None, name: str = "real_tokens") -> None:
    """Raise unless the number of tokens that take part, if there is one, is int64 [1]."""
    if real_tokens is None:
        return
    if real_tokens.dtype != torch.int64:
        raise TypeError(f"{name}: expected dtype torch.int64, got {real_tokens.dtype}")
    if real_tokens.shape != (1,):
        raise ValueError(f"{name}: expected shape [1], got {list(real_tokens.shape)}")


def check_similarity(similarity: Tensor, min_active: int) -> None:
    """Raise unless the matrix is fp32, bf16 or fp16 [E, E] and `min_active` at least 0."""
    if similarity.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"similarity: expected dtype torch.float32, torch.bfloat16 or torch.float16, got {similarity.dtype}"
        )
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1] or similarity.shape[0] == 0:
        raise ValueError(f"similarity: expected shape [E, E] with E >= 1, got {list(similarity.shape)}")
    check_min_active(min_active)


def check_min_active(min_active: int) -> None:
    """Raise ValueError for a negative number of experts."""
    if min_active < 0:
        raise ValueError(f"min_active: expected 0 (off) or a number of experts, got {min_active}")


def check_budget(max_active: int) -> None:
    """Raise ValueError for a negative number of experts."""
    if max_active < 0:
        raise ValueError(f"max_active: expected 0 (off) or a number of experts, got {max_active}")


def check_same_device(reference: Tensor, reference_name: str, **others: Tensor | None) -> None:
    """Raise ValueError for the first of `others` that is not where the reference is."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(f"{name}: expected device {reference.device} (of {reference_name}), got {tensor.device}")
