"""`substitution="fill"` as a rule for the evaluator: the operator's reference, over many routing batches at once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ops.fill.reference import Keeping, fill_batches
from .rules import RoutingBatch


@dataclass(frozen=True)
class FillKept:
    """First choices and then the heaviest experts stay; lost slots are filled by the token's own scores.

    See `sere_compile.ops.fill`, whose reference this is.

    Attributes:
        select_top_k: S.
        threshold: a share of the batch's sum of squared weights; experts above it stay.
        min_active: as in `SereConfig`; None and what is less than K are K.
        max_active: a budget, as in `SereConfig`.
    """

    select_top_k: int
    threshold: float = 0.0
    min_active: int | None = None
    max_active: int | None = None

    def __call__(self, batch: RoutingBatch) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        keeping = Keeping(self.select_top_k, self.threshold, self.min_active or 0, self.max_active or 0)
        if not keeping.acts_on(batch.ids.shape[-1]):
            return batch.ids, batch.weights
        choice = batch.scores if batch.choice is None else batch.choice
        return fill_batches(batch.ids, batch.weights, batch.scores, choice, batch.real, keeping)
