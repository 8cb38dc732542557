"""The operator `sere::reroute`: argument checks, shape rule, choice between kernel and reference.

Registered as a `triton_op`: torch.compile sees through it (the kernel on CUDA, ATen elsewhere), torch.export
keeps it whole.
"""

import torch
from torch import Tensor

from ..registration import register_triton_op
from .reference import reroute_reference

# Sizes up to which the kernels keep an expert row and a token's slots in registers.
KERNEL_MAX_EXPERTS = 1024
KERNEL_MAX_SLOTS = 64


def check_arguments(topk_ids: Tensor, similarity: Tensor, min_active: int, token_mask: Tensor | None) -> None:
    """Raise TypeError (dtype) or ValueError (shape, device, value), naming argument, expected and actual."""
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_ids: expected dtype torch.int32 or torch.int64, got {topk_ids.dtype}")
    if topk_ids.dim() == 0:
        raise ValueError("topk_ids: expected shape [..., K], got a 0-dimensional tensor")
    check_similarity(similarity, min_active)
    if token_mask is not None:
        if token_mask.dtype != torch.bool:
            raise TypeError(f"token_mask: expected dtype torch.bool, got {token_mask.dtype}")
        if token_mask.shape != topk_ids.shape[:-1]:
            raise ValueError(
                f"token_mask: expected shape {list(topk_ids.shape[:-1])} (topk_ids without its last "
                f"dimension), got {list(token_mask.shape)}"
            )
    check_same_device(topk_ids, similarity=similarity, token_mask=token_mask)


def check_similarity(similarity: Tensor, min_active: int) -> None:
    """Raise TypeError or ValueError for a matrix that is none, and for a number of experts."""
    if similarity.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"similarity: expected dtype torch.float32, torch.bfloat16 or torch.float16, got {similarity.dtype}"
        )
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1] or similarity.shape[0] == 0:
        raise ValueError(f"similarity: expected shape [E, E] with E >= 1, got {list(similarity.shape)}")
    if min_active < 0:
        raise ValueError(f"min_active: expected 0 (off) or a number of experts, got {min_active}")


def check_same_device(topk_ids: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError for the first of `others` that is not where topk_ids is."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != topk_ids.device:
            raise ValueError(f"{name}: expected device {topk_ids.device} (of topk_ids), got {tensor.device}")


def check_budget(max_active: int) -> None:
    """Raise ValueError for a number of experts that is none."""
    if max_active < 0:
        raise ValueError(f"max_active: expected 0 (off) or a number of experts, got {max_active}")


def kernel_supports(topk_ids: Tensor, similarity: Tensor, select_top_k: int) -> bool:
    """Whether the Triton kernels can run: on CUDA, something to re-route, and within their size limits."""
    num_slots = topk_ids.shape[-1]
    return (
        topk_ids.is_cuda
        and 0 < select_top_k < num_slots <= KERNEL_MAX_SLOTS
        and similarity.shape[0] <= KERNEL_MAX_EXPERTS
    )


def _reroute(
    topk_ids: Tensor,
    similarity: Tensor,
    select_top_k: int,
    threshold: float = 0.0,
    min_active: int = 0,
    token_mask: Tensor | None = None,
    max_active: int = 0,
) -> Tensor:
    check_arguments(topk_ids, similarity, min_active, token_mask)
    check_budget(max_active)
    # Under torch.compile(dynamic=True) these can be symbolic; the generated code depends on their value.
    options = int(select_top_k), float(threshold), int(min_active)
    if kernel_supports(topk_ids, similarity, options[0]):
        from .kernel import device_guard, launch_reroute

        with device_guard(topk_ids):
            return launch_reroute(topk_ids, similarity, *options, token_mask, max_active=int(max_active))
    return reroute_reference(topk_ids, similarity, *options, token_mask, int(max_active))


_reroute_op = register_triton_op("sere::reroute", _reroute)


@_reroute_op.register_fake
def _reroute_fake(topk_ids, similarity, select_top_k, threshold=0.0, min_active=0, token_mask=None, max_active=0):
    check_arguments(topk_ids, similarity, min_active, token_mask)
    check_budget(max_active)
    return topk_ids.new_empty(topk_ids.shape)


def reroute(
    topk_ids: Tensor,
    similarity: Tensor,
    select_top_k: int,
    threshold: float = 0.0,
    min_active: int = 0,
    token_mask: Tensor | None = None,
    max_active: int = 0,
) -> Tensor:
    """Re-route expert ids to the most similar primary expert (SERE, arXiv 2602.07616).

    The tokens of one call are one batch. The experts that its tokens name in their first `select_top_k` slots
    are primary. Every other expert u is replaced by the primary expert v with the largest `similarity[u, v]`
    (the lowest v among equals; NaN and -inf are never chosen), unless `threshold > 0` and that similarity is
    below it, or there is none to choose. Router weights are not part of it: they stay with their slots.

    Args:
        topk_ids: int32 or int64 [..., K] in descending router score, any leading shape and strides. Ids
            outside [0, E), such as the sentinels -1 and E of expert parallelism, pass through unchanged and
            never become primary.
        similarity: fp32, bf16 or fp16 [E, E], compared in fp32; it need not be symmetric.
        select_top_k: S, a number of slots. `S <= 0` and `S >= K` change nothing.
        threshold: rho, in the unit of `similarity`; 0 (or less) replaces every non-primary expert.
        min_active: a number of experts. When fewer are primary, the smallest larger S with at least this many
            is used; when that S is K or does not exist, nothing changes. 0 switches it off.
        token_mask: bool, shape of `topk_ids` without K; True marks a real token. The others (padding of a
            static batch) are re-routed like the rest but make no expert primary.
        max_active: a budget of experts. Above 0 the largest S from `select_top_k` to K is used whose primary experts
            are at most that many, or `select_top_k` when none is; `min_active` may still ask for more. 0 is off.

    Returns:
        A new contiguous tensor of the shape, dtype and device of `topk_ids`; never a view of it.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a shape, a device, `min_active` or `max_active` does not fit.

    On CUDA one kernel is launched for up to 1024 tokens and two above; no synchronisation with the host, so
    CUDA graphs can capture it. Integer output: no gradient.
    """
    return torch.ops.sere.reroute.default(
        topk_ids, similarity, select_top_k, threshold, min_active, token_mask, max_active
    )
