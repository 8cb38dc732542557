"""Routing rules: what happens to slots of experts that a decoding batch should not activate.

A rule is any callable from a `RoutingBatch` to ids and weights; those here are small frozen dataclasses. All but
`TopS` keep to the batch's primary set, the union of its tokens' first S experts, and so activate equally many experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingBatch:
    """What one gate decided for P independent routing batches of B tokens.

    Attributes:
        name: of the router's weight.
        ids: [P, B, K] in descending order of score.
        weights: [P, B, K].
        scores: [P, B, E], probabilities.
        real: bool [P, B]; False where a row is padding.
        choice: [P, B, E], what the gate selected by where that is not the scores (a bias, groups), or None.
    """

    name: str
    ids: Tensor
    weights: Tensor
    scores: Tensor
    real: Tensor
    choice: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.scores.shape[-1]


Rule = Callable[[RoutingBatch], tuple[Tensor, Tensor]]
Matrices = Mapping[str, Tensor]


def primary_experts(
    batch: RoutingBatch, select_top_k: int, min_active: int | None = None, max_active: int | None = None
) -> Tensor:
    """The experts that stay in each routing batch: bool [P, E].

    Padding rows add none. S grows while the union holds at most `max_active`, and until it holds `min_active` (None:
    K). Where S reaches K, every expert is primary, which is the identity.
    """
    top_k = batch.ids.shape[-1]
    if not 0 < select_top_k < top_k:
        return batch.scores.new_ones(batch.ids.shape[0], batch.num_experts, dtype=torch.bool)
    unions = _named(batch).cumsum(1) > 0  # [P, K, E]: named in the first i + 1 slots
    sizes = unions.sum(-1)
    last = (sizes < (top_k if min_active is None else min_active)).sum(1)
    if max_active is not None:
        last = torch.maximum(last, (sizes <= max_active).sum(1) - 1)
    last = last.clamp(select_top_k - 1, top_k - 1)
    chosen = unions[torch.arange(len(unions), device=unions.device), last]
    return chosen | (last == top_k - 1)[:, None]


def active_experts(batch: RoutingBatch, ids: Tensor, weights: Tensor) -> Tensor:
    """Number of experts that each routing batch activates, [P]; slots of weight 0 and padding activate none."""
    used = _in_range(ids, batch.num_experts) & (weights != 0) & batch.real[:, :, None]
    index = torch.where(used, ids.long(), batch.num_experts).flatten(1)
    named = torch.zeros(len(ids), batch.num_experts + 1, device=ids.device).scatter_(1, index, 1.0)
    return named[:, :-1].sum(1)


@dataclass(frozen=True)
class TopS:
    """Every token keeps its S best experts, their weights scaled up to the old sum: the naive rule."""

    select_top_k: int

    def __call__(self, batch: RoutingBatch) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        kept = torch.arange(batch.ids.shape[-1], device=batch.ids.device) < self.select_top_k
        return batch.ids, _with_sum_of(batch.weights, batch.weights * kept)


@dataclass(frozen=True)
class Drop:
    """Slots outside the primary set get weight 0; `renormalise` scales the others up to the old sum."""

    select_top_k: int
    renormalise: bool = False
    min_active: int | None = None

    def __call__(self, batch: RoutingBatch) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        primary = primary_experts(batch, self.select_top_k, self.min_active)
        kept = batch.weights * _look_up(primary, batch.ids)
        return batch.ids, _with_sum_of(batch.weights, kept) if self.renormalise else kept


@dataclass(frozen=True)
class Reroute:
    """SERE (arXiv 2602.07616): a slot outside the primary set goes to the most similar primary expert.

    Attributes:
        similarity: [E, E] for each gate.
        select_top_k: S.
        threshold: rho; experts less similar than this to their substitute stay.
        min_active: as in `SereConfig`.
        max_active: as in `SereConfig`, with S at least 1.
        scale: [E, E] for each gate: a moved slot's weight is multiplied by scale[old, new] ("projection"); None: the
            paper's rule, weights unchanged.
    """

    similarity: Matrices
    select_top_k: int
    threshold: float = 0.0
    min_active: int | None = None
    max_active: int | None = None
    scale: Matrices | None = None

    def __call__(self, batch: RoutingBatch) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        primary = primary_experts(batch, self.select_top_k, self.min_active, self.max_active)
        matrix = self.similarity[batch.name].to(batch.scores)
        mapping = expert_maps(matrix, primary, self.threshold)
        new_ids = _look_up(mapping, batch.ids, default=batch.ids)
        if self.scale is None:
            return new_ids, batch.weights
        factor = self.scale[batch.name].to(batch.scores)[_safe(batch, batch.ids), _safe(batch, new_ids)]
        return new_ids, batch.weights * torch.where(new_ids == batch.ids, 1.0, factor)


@dataclass(frozen=True)
class Fill:
    """Every token takes its best K experts within the primary set by its own router (arXiv 2511.02237).

    Their weights are their scores, scaled to the old sum.
    """

    select_top_k: int
    min_active: int | None = None

    def __call__(self, batch: RoutingBatch) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        primary = primary_experts(batch, self.select_top_k, self.min_active)
        choice = batch.scores if batch.choice is None else batch.choice
        ids = choice.masked_fill(~primary[:, None, :], float("-inf")).topk(batch.ids.shape[-1], dim=-1).indices
        # Too few primary experts, or closed ones, are not worth anything.
        open_to = primary[:, None, :] & (choice > float("-inf"))
        values = torch.where(open_to, batch.scores, 0.0).gather(2, ids)
        same = primary.all(-1)[:, None, None]  # the identity, bit for bit
        weights = torch.where(same, batch.weights.float(), _with_sum_of(batch.weights.float(), values))
        return torch.where(same, batch.ids, ids.to(batch.ids.dtype)), weights


def expert_maps(similarity: Tensor, primary: Tensor, threshold: float) -> Tensor:
    """Where each expert's slots go in each routing batch: int64 [P, E], itself for those that stay."""
    masked = torch.where(primary[:, None, :] & ~similarity.isnan(), similarity, float("-inf"))
    best, target = masked.amax(-1), masked.argmax(-1)
    stays = primary | (best == float("-inf"))
    if threshold > 0:
        stays = stays | (best < threshold)
    return torch.where(stays, torch.arange(len(similarity), device=similarity.device), target)


def _named(batch: RoutingBatch) -> Tensor:
    """int64 [P, K, E]: 1 where a real token names an expert in a slot."""
    valid = _in_range(batch.ids, batch.num_experts) & batch.real[:, :, None]
    index = torch.where(valid, batch.ids.long(), batch.num_experts).transpose(1, 2)
    shape = (*index.shape[:2], batch.num_experts + 1)
    return torch.zeros(shape, dtype=torch.int64, device=index.device).scatter_(2, index, 1)[..., :-1]


def _in_range(ids: Tensor, num_experts: int) -> Tensor:
    return (ids >= 0) & (ids < num_experts)


def _safe(batch: RoutingBatch, ids: Tensor) -> Tensor:
    return torch.where(_in_range(ids, batch.num_experts), ids.long(), 0)


def _look_up(table: Tensor, ids: Tensor, default: Tensor | None = None) -> Tensor:
    """`table[p, ids[p]]` [P, B, K]; `default`, or False, for ids that name no expert."""
    named = _in_range(ids, table.shape[-1])
    found = table.gather(1, torch.where(named, ids.long(), 0).flatten(1)).view(ids.shape)
    return found & named if default is None else torch.where(named, found.to(default.dtype), default)


def _with_sum_of(weights: Tensor, new: Tensor) -> Tensor:
    total = new.sum(-1, keepdim=True)
    return new * torch.where(total > 0, weights.sum(-1, keepdim=True) / total, 1.0)
