"""The operator `sere::reroute_merged`: argument checks, shape rule, gradient, choice of implementation."""

import torch
from torch import Tensor

from ..checks import check_weights
from ..registration import register_triton_op
from ..reroute.op import check_arguments, kernel_supports
from .reference import first_slots, reroute_merged_reference


def _reroute_merged(
    topk_ids: Tensor,
    topk_weights: Tensor,
    similarity: Tensor,
    select_top_k: int,
    threshold: float = 0.0,
    min_active: int = 0,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_arguments(topk_ids, similarity, min_active, token_mask)
    check_weights(topk_ids, topk_weights)
    # Under torch.compile(dynamic=True) these can be symbolic; the generated code depends on their value.
    options = int(select_top_k), float(threshold), int(min_active)
    if kernel_supports(topk_ids, similarity, options[0]):
        from ..launching import device_guard
        from .kernel import launch_reroute_merged

        with device_guard(topk_ids):
            return launch_reroute_merged(topk_ids, topk_weights, similarity, *options, token_mask)
    return reroute_merged_reference(topk_ids, topk_weights, similarity, *options, token_mask)


_reroute_merged_op = register_triton_op("sere::reroute_merged", _reroute_merged)


@_reroute_merged_op.register_fake
def _reroute_merged_fake(
    topk_ids, topk_weights, similarity, select_top_k, threshold=0.0, min_active=0, token_mask=None
):
    check_arguments(topk_ids, similarity, min_active, token_mask)
    check_weights(topk_ids, topk_weights)
    return topk_ids.new_empty(topk_ids.shape), topk_weights.new_empty(topk_weights.shape)


def _setup_context(ctx, inputs, output) -> None:
    topk_ids, _, similarity, ctx.select_top_k, ctx.threshold, ctx.min_active, token_mask = inputs
    ctx.save_for_backward(topk_ids, similarity, token_mask)


def _backward(ctx, _, grad_weights):
    """A weight's gradient is that of the slot its weight was added to. Re-routing again is cheap."""
    topk_ids, similarity, token_mask = ctx.saved_tensors
    new_ids = torch.ops.sere.reroute.default(
        topk_ids, similarity, ctx.select_top_k, ctx.threshold, ctx.min_active, token_mask
    )
    num_slots = topk_ids.shape[-1]
    rows = (topk_ids.reshape(-1, num_slots), new_ids.reshape(-1, num_slots))
    first = first_slots(*rows, similarity.shape[0]).view(topk_ids.shape)
    return None, grad_weights.gather(-1, first), None, None, None, None, None


_reroute_merged_op.register_autograd(_backward, setup_context=_setup_context)


def reroute_merged(
    topk_ids: Tensor,
    topk_weights: Tensor,
    similarity: Tensor,
    select_top_k: int,
    threshold: float = 0.0,
    min_active: int = 0,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Re-route expert ids and merge the slots of a token that then name one expert (SERE, arXiv 2602.07616).

    For consumers that are wrong when a token names an expert twice. The ids are mapped as by `reroute`. Then,
    within each token that this changed, slots with the same expert are merged: the first of them gets the
    sum of their weights, the others are freed and get weight 0. The freed slots of a token take, in slot
    order, the lowest experts that it does not name from the active set: the experts that the real tokens of
    the call name after re-routing, so that no expert is loaded for them. When these run out a freed slot
    keeps its original id, or that of its group's first slot if its own is the group's expert. A token
    whose ids are distinct comes out with distinct ids. A token that re-routing leaves alone is unchanged, bit
    for bit.

    Args:
        topk_ids: int32 or int64 [..., K]; ids outside [0, E) are never merged and keep their weight.
        topk_weights: floating point, shape of `topk_ids`. Summed in fp32 (fp64 for fp64 weights).
        similarity: fp32, bf16 or fp16 [E, E], as in `reroute`.
        select_top_k: S, as in `reroute`; `S <= 0` and `S >= K` change nothing.
        threshold: rho, as in `reroute`.
        min_active: a number of experts, as in `reroute`.
        token_mask: bool, shape of `topk_ids` without K; False rows (padding) are re-routed and merged, but make
            no expert primary and none active.

    Returns:
        New contiguous tensors (ids, weights) of the shapes and dtypes of `topk_ids` and `topk_weights`.
        Differentiable with respect to `topk_weights`.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a shape, a device or `min_active` does not fit.
    """
    return torch.ops.sere.reroute_merged.default(
        topk_ids, topk_weights, similarity, select_top_k, threshold, min_active, token_mask
    )
