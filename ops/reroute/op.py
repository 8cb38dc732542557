"""The operator `sere::reroute`: argument checks, shape rule, choice between kernel and reference.

Registered as a `triton_op`: torch.compile sees through it (the kernel on CUDA, ATen elsewhere),
torch.export keeps it whole.
"""

import torch
from torch import Tensor

from ..checks import (
    check_budget,
    check_ids,
    check_real_tokens,
    check_same_device,
    check_similarity,
    check_token_mask,
)
from ..registration import register_triton_op
from .reference import reroute_reference

# Sizes up to which the kernels keep an expert row and a token's slots in registers.
KERNEL_MAX_EXPERTS = 1024
KERNEL_MAX_SLOTS = 64


def check_arguments(
    topk_ids: Tensor,
    similarity: Tensor,
    min_active: int,
    token_mask: Tensor | None,
    max_active: int = 0,
    real_tokens: Tensor | None = None,
) -> None:
    """Raise TypeError (dtype) or ValueError, naming the argument, what is expected and what came."""
    check_ids(topk_ids)
    check_similarity(similarity, min_active)
    check_token_mask(topk_ids, token_mask)
    check_real_tokens(real_tokens)
    check_same_device(topk_ids, "topk_ids", similarity=similarity, token_mask=token_mask, real_tokens=real_tokens)
    check_budget(max_active)


def kernel_supports(topk_ids: Tensor, similarity: Tensor, select_top_k: int) -> bool:
    """Whether the Triton kernels can run: on CUDA, S < K, and within their size limits."""
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
    real_tokens: Tensor | None = None,
) -> Tensor:
    check_arguments(topk_ids, similarity, min_active, token_mask, max_active, real_tokens)
    # Under torch.compile(dynamic=True) these can be symbolic; the generated code depends on their
    # value.
    options = int(select_top_k), float(threshold), int(min_active)
    if kernel_supports(topk_ids, similarity, options[0]):
        from ..launching import device_guard
        from .kernel import launch_reroute

        with device_guard(topk_ids):
            return launch_reroute(topk_ids, similarity, *options, token_mask, None, int(max_active), real_tokens)
    return reroute_reference(topk_ids, similarity, *options, token_mask, int(max_active), real_tokens)


_reroute_op = register_triton_op("sere::reroute", _reroute)


@_reroute_op.register_fake
def _reroute_fake(
    topk_ids, similarity, select_top_k, threshold=0.0, min_active=0, token_mask=None, max_active=0, real_tokens=None
):
    check_arguments(topk_ids, similarity, min_active, token_mask, max_active, real_tokens)
    return topk_ids.new_empty(topk_ids.shape)


def reroute(
    topk_ids: Tensor,
    similarity: Tensor,
    select_top_k: int,
    threshold: float = 0.0,
    min_active: int = 0,
    token_mask: Tensor | None = None,
    max_active: int = 0,
    real_tokens: Tensor | None = None,
) -> Tensor:
    """Re-route expert ids to the most similar primary expert (SERE, arXiv 2602.07616).

    The tokens of one call are one batch. The experts that its tokens name in their first
    `select_top_k` slots are primary. Every other expert u is replaced by the primary expert v with
    the largest `similarity[u, v]` (the lowest v among equals; NaN and -inf are never chosen),
    unless `threshold > 0` and that similarity is below it, or there is none to choose. Router
    weights are not part of it: they stay with their slots.

    Args:
        topk_ids: int32 or int64 [..., K] in descending router score, any leading shape and strides.
            Ids outside [0, E), such as the sentinels -1 and E of expert parallelism, pass through
            unchanged and never become primary.
        similarity: fp32, bf16 or fp16 [E, E], compared in fp32; it need not be symmetric.
        select_top_k: S, a number of slots. `S <= 0` and `S >= K` change nothing.
        threshold: rho, in the unit of `similarity`; 0 (or less) replaces every non-primary expert.
        min_active: a number of experts. When fewer are primary, the smallest larger S with at least
            this many is used; when that S is K or does not exist, nothing changes. 0 switches it
            off.
        token_mask: bool, shape of `topk_ids` without K; True marks a real token. The others
            (padding of a static batch) are re-routed like the rest but make no expert primary.
        max_active: a budget of experts. Above 0 the largest S from `select_top_k` to K is used
            whose primary experts are at most that many, or `select_top_k` when none is;
            `min_active` may still ask for more. 0 is off.
        real_tokens: int64 [1], how many of the tokens take part, the first ones in memory order;
            the others neither make an expert primary nor change. 0 or less: nothing changes. None:
            all. A tensor, so that a recorded CUDA graph serves batches of every size and can be
            told to leave one alone.

    Returns:
        A new contiguous tensor of the shape, dtype and device of `topk_ids`; never a view of it.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a shape, a device, `min_active` or `max_active` does not fit.

    On CUDA one kernel is launched for up to 1024 tokens and two above; no synchronisation with the
    host, so CUDA graphs can capture it. Integer output: no gradient.
    """
    return torch.ops.sere.reroute.default(
        topk_ids, similarity, select_top_k, threshold, min_active, token_mask, max_active, real_tokens
    )
