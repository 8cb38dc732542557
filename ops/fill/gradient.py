"""The gradient of `sere::fill`: which experts are kept and who takes what is constant, the weights are a formula."""

import torch
from torch import Tensor

from ..reroute.reference import in_range
from .reference import CLOSED, RESTORE, WORTH, Keeping, batch_statistics, filled_ids, kept_experts


def fill_gradient(
    ids: Tensor, weights: Tensor, scores: Tensor, choice: Tensor, real: Tensor | None, keeping: Keeping, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of weights and scores, in their dtypes; tensors as for `fill_batches`, grad [P, B, K]."""
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    mass, standing = batch_statistics(ids, weights, scores.shape[-1], real)
    new_ids, lost = filled_ids(ids, choice, kept_experts(mass, standing, ids.shape[-1], keeping))
    is_expert = in_range(ids, scores.shape[-1])
    index, new_index = (torch.where(is_expert, i.long(), 0) for i in (ids, new_ids))
    filled = lost & (choice.float().gather(-1, new_index) > CLOSED) & (new_ids != ids)
    old, new_scores = weights.to(dtype), scores.gather(-1, new_index).to(dtype)

    def total(values: Tensor) -> Tensor:
        return torch.where(is_expert, values, 0.0).sum(-1, keepdim=True)

    before, chosen = total(old), total(scores.gather(-1, index).to(dtype))
    per_score = torch.where(chosen > 0, WORTH / chosen, 0.0)
    new = torch.where(lost, torch.where(filled, per_score * before * new_scores, 0.0), old)
    after = total(new)
    restores = (before > 0) & (after > 0)
    factor = torch.where(restores, before / after, 1.0) ** RESTORE
    changed = lost.any(-1, keepdim=True) & is_expert

    own = torch.where(changed, grad.to(dtype), 0.0)
    of_factor = RESTORE * factor * total(own * new)
    of_before = torch.where(restores, of_factor / before, 0.0)
    of_new = own * factor - torch.where(changed & restores, of_factor / after, 0.0)
    of_filled = torch.where(filled, of_new, 0.0)
    of_worth = (of_filled * new_scores).sum(-1, keepdim=True)
    of_before = of_before + of_worth * per_score
    of_chosen = torch.where(chosen > 0, -of_worth * per_score * before / chosen, 0.0)
    of_weights = torch.where(changed, torch.where(lost, 0.0, of_new) + of_before, grad.to(dtype))
    of_scores = torch.zeros(scores.shape, dtype=dtype, device=scores.device)
    of_scores = of_scores.scatter_add(-1, new_index, of_filled * per_score * before)
    of_scores = of_scores.scatter_add(-1, index, torch.where(is_expert, of_chosen, 0.0))
    return of_weights.to(weights.dtype), of_scores.to(scores.dtype)
