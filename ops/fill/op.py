"""The operator `sere::fill`: argument checks, shape rule, gradient, choice of implementation."""

import torch
from torch import Tensor

from ..checks import (
    check_budget,
    check_ids,
    check_min_active,
    check_same_device,
    check_token_mask,
    check_weights,
)
from ..registration import register_triton_op
from .gradient import fill_gradient
from .reference import Keeping, fill_reference

# Sizes up to which a token's scores and slots stay in registers, and a bit for each slot in one of them.
KERNEL_MAX_EXPERTS = 1024
KERNEL_MAX_SLOTS = 31
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_arguments(
    topk_ids: Tensor,
    topk_weights: Tensor,
    scores: Tensor,
    keeping: Keeping,
    token_mask: Tensor | None,
    choice: Tensor | None,
) -> None:
    """Raise TypeError (dtype) or ValueError (shape, device, value), naming argument, expected and actual."""
    check_ids(topk_ids)
    check_weights(topk_ids, topk_weights)
    for name, rows in (("scores", scores), ("choice", choice)):
        if rows is not None and not rows.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {rows.dtype}")
        if rows is not None and (rows.dim() != topk_ids.dim() or rows.shape[:-1] != topk_ids.shape[:-1]):
            raise ValueError(f"{name}: expected shape {[*topk_ids.shape[:-1], 'E']}, got {list(rows.shape)}")
    if choice is not None and choice.shape != scores.shape:
        raise ValueError(f"choice: expected shape {list(scores.shape)} (of scores), got {list(choice.shape)}")
    if scores.shape[-1] < topk_ids.shape[-1]:
        raise ValueError(f"scores: expected at least K = {topk_ids.shape[-1]} experts, got {scores.shape[-1]}")
    check_token_mask(topk_ids, token_mask)
    check_min_active(keeping.min_active)
    check_budget(keeping.max_active)
    check_same_device(topk_ids, "topk_ids", scores=scores, token_mask=token_mask, choice=choice)


def kernel_supports(topk_ids: Tensor, topk_weights: Tensor, scores: Tensor) -> bool:
    """Whether the Triton kernels can run: on CUDA, within their size limits, in the dtypes that they compute in."""
    return (
        topk_ids.is_cuda
        and topk_ids.shape[-1] <= KERNEL_MAX_SLOTS
        and scores.shape[-1] <= KERNEL_MAX_EXPERTS
        and topk_weights.dtype in _FLOATS
        and scores.dtype in _FLOATS
    )


def _rows(tensor: Tensor) -> Tensor:
    """[T, E], the last stride 1."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _launch(
    topk_ids: Tensor,
    topk_weights: Tensor,
    scores: Tensor,
    keeping: Keeping,
    token_mask: Tensor | None,
    choice: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Triton's kernels."""
    from ..launching import device_guard
    from .launch import Ranking, launch_fill

    ranking = Ranking(_rows(scores), choice=None if choice is None else _rows(choice))
    ids, weights = topk_ids.reshape(-1, topk_ids.shape[-1]), topk_weights.reshape(-1, topk_ids.shape[-1])
    mask = None if token_mask is None else token_mask.reshape(-1)
    with device_guard(topk_ids):
        new_ids, new_weights = launch_fill(ids, weights, ranking, keeping, mask)
    return new_ids.view(topk_ids.shape), new_weights.view(topk_ids.shape)


@torch.library.custom_op("sere::fill_cluster", mutates_args=())
def fill_cluster(
    topk_ids: Tensor,
    topk_weights: Tensor,
    scores: Tensor,
    select_top_k: int,
    threshold: float,
    min_active: int,
    token_mask: Tensor | None,
    max_active: int,
    choice: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`sere::fill` by `cluster.cu` on Hopper and later, by Triton where that cannot be had there after all."""
    from ..cuda.cluster import Rows, Selection, launch_cluster
    from ..launching import device_guard
    from ..route.reference import Rerouting

    numbers = select_top_k, threshold, min_active, max_active
    ids, weights = (t.reshape(-1, t.shape[-1]).contiguous() for t in (topk_ids, topk_weights))
    mask = None if token_mask is None else token_mask.reshape(-1)
    rows = Rows(_rows(scores), None if choice is None else _rows(choice), None, ids, weights, mask)
    outs = torch.empty_like(ids), torch.empty_like(weights)
    with device_guard(ids):
        if launch_cluster(rows, Rerouting(None, *numbers, fill=True), Selection(), *outs):
            return outs[0].view(topk_ids.shape), outs[1].view(topk_ids.shape)
    return _launch(topk_ids, topk_weights, scores, Keeping(*numbers), token_mask, choice)


@fill_cluster.register_fake
def _fill_cluster_fake(topk_ids, topk_weights, *_):
    return topk_ids.new_empty(topk_ids.shape), topk_weights.new_empty(topk_weights.shape)


def _fill(
    topk_ids: Tensor,
    topk_weights: Tensor,
    scores: Tensor,
    select_top_k: int,
    threshold: float = 0.0,
    min_active: int = 0,
    token_mask: Tensor | None = None,
    max_active: int = 0,
    choice: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    # Under torch.compile(dynamic=True) these can be symbolic; the generated code depends on their value.
    keeping = Keeping(int(select_top_k), float(threshold), int(min_active), int(max_active))
    check_arguments(topk_ids, topk_weights, scores, keeping, token_mask, choice)
    if kernel_supports(topk_ids, topk_weights, scores) and keeping.acts_on(topk_ids.shape[-1]):
        from ..cuda import cluster

        if cluster.takes(scores.shape, topk_ids.shape[-1], scores, topk_weights, choice):
            numbers = keeping.select_top_k, keeping.threshold, keeping.min_active
            return torch.ops.sere.fill_cluster.default(
                topk_ids, topk_weights, scores, *numbers, token_mask, keeping.max_active, choice
            )
        return _launch(topk_ids, topk_weights, scores, keeping, token_mask, choice)
    numbers = keeping.select_top_k, keeping.threshold, keeping.min_active
    return fill_reference(topk_ids, topk_weights, scores, *numbers, token_mask, keeping.max_active, choice)


_fill_op = register_triton_op("sere::fill", _fill)


@_fill_op.register_fake
def _fill_fake(
    topk_ids, topk_weights, scores, select_top_k, threshold=0.0, min_active=0, token_mask=None, max_active=0,
    choice=None,
):  # fmt: skip
    keeping = Keeping(select_top_k, threshold, min_active, max_active)
    check_arguments(topk_ids, topk_weights, scores, keeping, token_mask, choice)
    return topk_ids.new_empty(topk_ids.shape), topk_weights.new_empty(topk_weights.shape)


def _setup_context(ctx, inputs, output) -> None:
    ids, weights, scores, select_top_k, threshold, min_active, token_mask, max_active, choice = inputs
    ctx.keeping = Keeping(select_top_k, threshold, min_active, max_active)
    ctx.save_for_backward(ids, weights, scores, token_mask, choice)


def _backward(ctx, _, grad):
    ids, weights, scores, token_mask, choice = ctx.saved_tensors
    others = (None,) * 6
    if not ctx.keeping.acts_on(ids.shape[-1]):
        return None, grad, None, *others
    real = None if token_mask is None else token_mask.reshape(1, -1)
    flat_ids, flat_weights, flat_scores = (t.reshape(1, -1, t.shape[-1]) for t in (ids, weights, scores))
    ranks = flat_scores if choice is None else choice.reshape(flat_scores.shape)
    flat_grad = grad.reshape(flat_weights.shape)
    of_weights, of_scores = fill_gradient(flat_ids, flat_weights, flat_scores, ranks, real, ctx.keeping, flat_grad)
    return None, of_weights.view(weights.shape), of_scores.view(scores.shape), *others


_fill_op.register_autograd(_backward, setup_context=_setup_context)


def fill(
    topk_ids: Tensor,
    topk_weights: Tensor,
    scores: Tensor,
    select_top_k: int,
    threshold: float = 0.0,
    min_active: int = 0,
    token_mask: Tensor | None = None,
    max_active: int = 0,
    choice: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep the experts that matter most to a batch and give lost slots to kept experts by the tokens' own scores.

    The tokens of one call are one batch. Of the experts that they name, as many are kept as their first
    `select_top_k` slots name: those in some token's first slot, then those with the largest sum of squared weights (the
    lowest of equals; with fewer kept than there are first choices, the heaviest of these). At least K are, since a
    token's ids are distinct. Slots on kept experts stay. A lost slot goes to the best kept expert by `choice` that the
    token does not name yet, the lowest of equals, in slot order, and weighs three quarters of what its score is worth:
    the sum of the token's weights over the sum of the scores of its experts, times the score. Then all weights of the
    token are multiplied by (old sum / new sum) ** 0.75, where both sums are above 0. A token that loses no slot keeps
    its ids and weights bit for bit; where every expert in use is kept, so do all. Distinct ids stay distinct.

    An expert is closed to a token where `choice` is NaN or not above -3e38, as masks of groups leave it. A lost slot
    for which only closed experts are left takes the lowest of these at weight 0, and one for which none is left (a
    token outside of `token_mask` may name experts that no real token names) keeps its id at weight 0.

    Args:
        topk_ids: int32 or int64 [..., K] in descending router score, any leading shape and strides. Slots with ids
            outside [0, E), such as the sentinels -1 and E of expert parallelism, pass through unchanged and count
            nowhere.
        topk_weights: floating point, shape of `topk_ids`. Sums are in fp32 (fp64 weights of a token in fp64); experts
            whose masses differ by no more than its rounding may be kept either way.
        scores: floating point [..., E], what the weights were made from: probabilities or sigmoids, without a bias.
        select_top_k: S, a number of slots. `S <= 0` and `S >= K` change nothing.
        threshold: a share of the batch's sum of squared weights; an expert with more stays. 0 (or less) is off.
        min_active: a number of experts. While the first S slots name fewer, S grows; when it reaches K, nothing
            changes. Less than K is K.
        token_mask: bool, shape of `topk_ids` without K; True marks a real token. The others (padding of a static batch)
            are filled like the rest but keep no expert.
        max_active: a budget. Above 0, this many experts are kept, or `min_active` where that is more, whatever S.
        choice: floating point [..., E], what the experts were selected by, where that is not `scores`: with a bias,
            limited to groups, logits.

    Returns:
        New contiguous tensors (ids, weights) of the shapes and dtypes of `topk_ids` and `topk_weights`.
        Differentiable with respect to `topk_weights` and `scores`.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a shape, a device, `min_active` or `max_active` does not fit.

    On CUDA one kernel is launched for up to 256 tokens and experts on Hopper and later, else two; no synchronisation
    with the host, so CUDA graphs can capture them.
    """
    return torch.ops.sere.fill.default(
        topk_ids, topk_weights, scores, select_top_k, threshold, min_active, token_mask, max_active, choice
    )
