"""What `sere::route` computes, in plain ATen. This file defines the operator and is its implementation off CUDA."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..fill.reference import fill_reference
from ..reroute.reference import leading_tokens, reroute_reference

# How logits become weights: over all experts before the selection, or over the selected ones after it.
SCORINGS = ("softmax", "sigmoid", "softmax_after", "none")
# What a group of experts is ranked by: its best score, or the sum of its two best.
GROUP_SCORES = ("max", "top2")


@dataclass(frozen=True)
class Scoring:
    """The numbers that make weights and ids of logits, as in `sere_compile.ops.route`."""

    top_k: int
    scoring: str
    renormalize: bool = False
    epsilon: float = 0.0
    scale: float = 1.0
    dtype: torch.dtype = torch.float32
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    outside_zero: bool = True

    @property
    def is_grouped(self) -> bool:
        """Whether a mask over groups can change a selection."""
        return self.top_groups < self.num_groups


@dataclass(frozen=True)
class Rerouting:
    """What becomes of ids, as in `sere_compile.ops.route`; without a similarity, or `fill`, they are not re-routed."""

    similarity: Tensor | None = None
    select_top_k: int = 0
    threshold: float = 0.0
    min_active: int = 0
    max_active: int = 0
    projection: Tensor | None = None
    fill: bool = False
    ids_dtype: torch.dtype = torch.int64
    real_tokens: Tensor | None = None
    rerouted_tokens: Tensor | None = None

    def acts_on(self, top_k: int) -> bool:
        """Whether any id can change."""
        return (self.fill or self.similarity is not None) and 0 < self.select_top_k < top_k


def route_reference(
    logits: Tensor, bias: Tensor | None, scoring: Scoring, rerouting: Rerouting
) -> tuple[Tensor, Tensor]:
    """See `sere_compile.ops.route`. Returns fresh contiguous tensors (weights, ids)."""
    scores = logits.float()
    if scoring.scoring == "softmax":
        scores = scores.softmax(-1)
    elif scoring.scoring == "sigmoid":
        scores = scores.sigmoid()
    # Softmax and sigmoid keep the order of logits, which rounding cannot make equal.
    choice = logits.float() if bias is None and not scoring.is_grouped else scores
    choice = choice if bias is None else choice + bias.float()
    closed = choice
    if scoring.is_grouped:
        closed = _limited_to_groups(choice, scoring, float("-inf"))
        choice = _limited_to_groups(choice, scoring, 0.0) if scoring.outside_zero else closed
    # A stable sort, unlike topk, has an order among equals: the lowest index first.
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[..., : scoring.top_k].contiguous()
    weights = scores.gather(-1, ids)
    if scoring.scoring == "softmax_after":
        weights = weights.softmax(-1)
    if scoring.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + scoring.epsilon)
    weights, ids = (weights * scoring.scale).to(scoring.dtype), ids.to(rerouting.ids_dtype)
    if rerouting.real_tokens is not None:
        real = first_tokens(ids, rerouting.real_tokens)[..., None]
        weights, ids = torch.where(real, weights, 0.0), torch.where(real, ids, -1)
    if not rerouting.acts_on(scoring.top_k):
        return weights, ids
    if rerouting.fill:
        worth = scores if scoring.scoring in ("softmax", "sigmoid") else scores.softmax(-1)
        tokens = rerouting.rerouted_tokens
        taking_part = None if tokens is None else first_tokens(ids, tokens)
        numbers = (rerouting.select_top_k, rerouting.threshold, rerouting.min_active, taking_part, rerouting.max_active)
        new_ids, new = fill_reference(ids, weights, worth, *numbers, closed)
        return of_these(taking_part, (new, new_ids), (weights, ids))
    assert rerouting.similarity is not None
    numbers = (rerouting.select_top_k, rerouting.threshold, rerouting.min_active, None, rerouting.max_active)
    new_ids = reroute_reference(ids, rerouting.similarity, *numbers, rerouting.rerouted_tokens)
    return projected(weights, ids, new_ids, rerouting.projection), new_ids


def first_tokens(ids: Tensor, tokens: Tensor) -> Tensor:
    """Which tokens of ids [..., K] are the first `tokens`, int64 [1]: bool [...]."""
    return leading_tokens(ids[..., 0].numel(), tokens).view(ids.shape[:-1])


def of_these(
    taking_part: Tensor | None, new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """New (weights, ids) [..., K] of the tokens that take part, bool [...] or None for all; of the others the old."""
    if taking_part is None:
        return new
    rows = taking_part[..., None]
    return torch.where(rows, new[0], old[0]), torch.where(rows, new[1], old[1])


def projected(weights: Tensor, ids: Tensor, new_ids: Tensor, projection: Tensor | None) -> Tensor:
    """Weights [..., K] times projection[old, new] where an id has changed, in the dtype of weights."""
    if projection is None:
        return weights
    factor = projection[ids, new_ids]
    return torch.where(new_ids != ids, (weights * factor).to(weights.dtype), weights)


def _limited_to_groups(choice: Tensor, scoring: Scoring, outside: float) -> Tensor:
    """Scores [..., E] with `outside` outside the best groups of consecutive experts; the lowest group among equals."""
    groups = choice.unflatten(-1, (scoring.num_groups, -1))
    best = groups.sort(dim=-1, descending=True).values[..., : 1 if scoring.group_score == "max" else 2].sum(-1)
    kept = best.sort(dim=-1, descending=True, stable=True).indices[..., : scoring.top_groups]
    is_kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, kept, True)
    return torch.where(is_kept.unsqueeze(-1), groups, outside).flatten(-2)
