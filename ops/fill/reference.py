"""What `sere::fill` computes, in plain ATen: no data-dependent shape, no loop over tokens.

This file defines the operator. It is also its implementation off CUDA, its decomposition for exporters, and the
evaluator's rule: all but `fill_reference` take P independent batches of B tokens. Experts are compared with ids and
reduced over instead of scattered into, which every exporter takes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reroute.reference import in_range

# Fixed by measurement on one model's text (docs/quality.md), not options: a score is worth three quarters of what the
# token's chosen scores are, and three quarters of a lost sum, on a logarithmic scale, are given back.
WORTH = 0.75
RESTORE = 0.75
# A selection score that is not above this (what masks put there, -inf, NaN) closes the expert to the token.
CLOSED = -3.0e38


@dataclass(frozen=True)
class Keeping:
    """The numbers that decide which experts a batch keeps, as in `sere_compile.ops.fill`."""

    select_top_k: int
    threshold: float = 0.0
    min_active: int = 0
    max_active: int = 0

    def acts_on(self, top_k: int) -> bool:
        """Whether any slot can change."""
        return 0 < self.select_top_k < top_k


def batch_statistics(ids: Tensor, weights: Tensor, num_experts: int, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a batch says about each expert: (mass fp32 [P, E], standing int64 [P, E]).

    The mass is the sum of squared weights of the slots that name the expert, in fp32; NaN adds nothing. The standing
    is K for an expert that a token names first, 1 for one that is at best named last, 0 for one that is not named.

    Args:
        ids: [P, B, K].
        weights: [P, B, K].
        num_experts: E.
        real: bool [P, B] or None; False rows say nothing.
    """
    top_k = ids.shape[-1]
    named = ids[..., None] == torch.arange(num_experts, device=ids.device)
    if real is not None:
        named = named & real[..., None, None]
    squares = weights.float().square()
    squares = torch.where(squares >= 0, squares, 0.0)
    mass = torch.where(named, squares[..., None], 0.0).sum((1, 2))
    places = top_k - torch.arange(top_k, device=ids.device)
    # In two steps: there is no maximum over no token.
    return mass, torch.where(named.any(1), places[:, None], 0).amax(1)


def kept_experts(mass: Tensor, standing: Tensor, top_k: int, keeping: Keeping) -> Tensor:
    """The experts that a batch keeps: bool [P, E], all of them where all that it uses stay.

    Args:
        mass: [P, E], of `batch_statistics`.
        standing: [P, E], likewise.
        top_k: K.
        keeping: with 0 < S < K.
    """
    used = standing > 0
    # K distinct ids need K experts.
    least = max(keeping.min_active, top_k)
    if keeping.max_active:
        count = torch.full_like(standing[:, :1], max(keeping.max_active, least))
    else:
        widths = torch.arange(keeping.select_top_k, top_k + 1, device=mass.device)
        sizes = (standing[:, None, :] > top_k - widths[:, None]).sum(-1)
        too_few = (sizes[:, :-1] < least).sum(1, keepdim=True)
        steps = torch.arange(top_k - keeping.select_top_k + 1, device=mass.device)
        count = torch.where(steps == too_few, sizes, 0).sum(1, keepdim=True)
    kept = used & (_places(mass, standing, top_k) < count)
    if keeping.threshold > 0:
        kept = kept | (used & (mass > keeping.threshold * mass.sum(1, keepdim=True)))
    return kept | ~(used & ~kept).any(1, keepdim=True)


def _places(mass: Tensor, standing: Tensor, top_k: int) -> Tensor:
    """How many experts come before each: first choices first, then by mass, then the lowest; unused ones last."""
    rank = (standing == top_k).long() + (standing > 0)
    experts = torch.arange(mass.shape[1], device=mass.device)
    # [P, E, E]: whether the expert of the last dimension comes before the other one.
    heavier = mass[:, None, :] > mass[:, :, None]
    lower = (mass[:, None, :] == mass[:, :, None]) & (experts < experts[:, None])
    same = rank[:, None, :] == rank[:, :, None]
    before = (rank[:, None, :] > rank[:, :, None]) | (same & (heavier | lower))
    return before.sum(-1)


def filled_ids(ids: Tensor, choice: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """New ids [P, B, K], and which slots are lost, bool [P, B, K].

    The lost slots of a token, in slot order, take the kept experts that it does not name, in descending order of
    `choice` [P, B, E], the lowest of equals; closed ones come last. A slot for which none is left keeps its id.
    """
    num_experts = choice.shape[-1]
    experts = torch.arange(num_experts, device=ids.device)
    named = ids[..., None] == experts
    lost = in_range(ids, num_experts) & ~(named & kept[:, None, None, :]).any(-1)
    choice = choice.float()
    key = torch.where(choice > CLOSED, choice, CLOSED)
    key = torch.where(kept[:, None, :] & ~named.any(-2), key, float("-inf"))
    columns = []
    # argmax gives the first of equal maxima, in eager, Inductor and ONNX alike; topk has no order among them.
    for slot in range(ids.shape[-1]):
        taken = lost[..., slot] & (key.amax(-1) > float("-inf"))
        column = torch.where(taken, key.argmax(-1), ids[..., slot].long())
        key = torch.where(taken[..., None] & (experts == column[..., None]), float("-inf"), key)
        columns.append(column)
    return torch.stack(columns, -1).to(ids.dtype), lost


def filled_weights(
    ids: Tensor, new_ids: Tensor, lost: Tensor, weights: Tensor, scores: Tensor, choice: Tensor
) -> Tensor:
    """Weights [P, B, K] of the new ids, in the dtype of weights (fp64 is computed in fp64, all else in fp32)."""
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    old, num_experts = weights.to(dtype), scores.shape[-1]
    is_expert = in_range(ids, num_experts)
    index = torch.where(is_expert, ids.long(), 0)
    chosen = torch.where(is_expert, scores.gather(-1, index).to(dtype), 0.0).sum(-1, keepdim=True)
    total = torch.where(is_expert, old, 0.0).sum(-1, keepdim=True)
    worth = WORTH * torch.where(chosen > 0, total / chosen, 0.0)
    index = torch.where(is_expert, new_ids.long(), 0)
    # A closed expert, and an original id for want of a kept one, contribute nothing.
    open_to = (choice.float().gather(-1, index) > CLOSED) & (new_ids != ids)
    new = torch.where(lost, torch.where(open_to, worth * scores.gather(-1, index).to(dtype), 0.0), old)
    filled = torch.where(is_expert, new, 0.0).sum(-1, keepdim=True)
    restored = new * torch.where((total > 0) & (filled > 0), total / filled, 1.0) ** RESTORE
    # What a token does not lose it keeps bit for bit.
    return torch.where(lost.any(-1, keepdim=True) & is_expert, restored.to(weights.dtype), weights)


def fill_batches(
    ids: Tensor, weights: Tensor, scores: Tensor, choice: Tensor, real: Tensor | None, keeping: Keeping
) -> tuple[Tensor, Tensor]:
    """New (ids, weights) [P, B, K] of P independent batches; scores and choice [P, B, E], real bool [P, B] or None."""
    mass, standing = batch_statistics(ids, weights, scores.shape[-1], real)
    kept = kept_experts(mass, standing, ids.shape[-1], keeping)
    new_ids, lost = filled_ids(ids, choice, kept)
    return new_ids, filled_weights(ids, new_ids, lost, weights, scores, choice)


def fill_reference(
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
    """See `sere_compile.ops.fill`. Returns two fresh contiguous tensors."""
    top_k = topk_ids.shape[-1]
    keeping = Keeping(select_top_k, threshold, min_active, max_active)
    if not keeping.acts_on(top_k):
        contiguous = torch.contiguous_format
        return topk_ids.clone(memory_format=contiguous), topk_weights.clone(memory_format=contiguous)

    def batch(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(1, -1, tensor.shape[-1])

    ids, weights, scores = batch(topk_ids), batch(topk_weights), batch(scores)
    choice = scores if choice is None else batch(choice)
    real = None if token_mask is None else token_mask.reshape(1, -1)
    new_ids, new_weights = fill_batches(ids, weights, scores, choice, real, keeping)
    return new_ids.view(topk_ids.shape), new_weights.view(topk_ids.shape)
