"""What the backend does with its options, as a rule for the evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..config import SereConfig
from ..errors import EvaluationError
from ..idle import never_reached, tell_once, too_many_primary
from ..similarity.profile import SimilarityProfile
from ..similarity.threshold import matrix_in_graph, threshold_in_graph
from .filling import FillKept
from .rules import Reroute, RoutingBatch


@dataclass(frozen=True)
class ConfiguredRule:
    """What the backend does with these options, as a rule; `projections` for `substitution="projection"`."""

    config: SereConfig
    similarity: Mapping[str, torch.Tensor]
    projections: Mapping[str, torch.Tensor] | None = None

    def __call__(self, batch: RoutingBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Rule`."""
        config, top_k = self.config.for_gate(batch.name), batch.ids.shape[-1]
        if config.max_tokens is not None and batch.ids.shape[1] > config.max_tokens:
            return batch.ids, batch.weights
        tell_once(batch.name, too_many_primary(config, top_k))
        select, least = config.resolved_top_k(top_k), config.resolved_min_active(top_k)
        if config.substitution == "fill":
            assert isinstance(config.threshold, float | int)  # `SereConfig` takes no other one with it
            return FillKept(select, config.threshold, least, config.max_active)(batch)
        if batch.name not in self.similarity:
            raise EvaluationError(f"the profile has no matrix for the gate {batch.name}")
        tell_once(batch.name, never_reached(config.threshold, self.similarity[batch.name]))
        matrix = matrix_in_graph(self.similarity[batch.name], config.threshold)
        threshold = threshold_in_graph(config.threshold)
        scale = self.projections if config.substitution == "projection" else None
        if config.substitution == "projection" and batch.name not in (scale or {}):
            raise EvaluationError(
                f'substitution="projection": the profile has no projection coefficients for {batch.name}; profiles of '
                "sere_compile.calibrate have them"
            )
        return Reroute({batch.name: matrix}, select, threshold, least, config.max_active, scale)(batch)

    @classmethod
    def of(cls, config: SereConfig, similarity: Mapping[str, torch.Tensor]) -> ConfiguredRule:
        """With the projections of a profile, where it is one."""
        projections = similarity.projections if isinstance(similarity, SimilarityProfile) else None
        return cls(config, dict(similarity), projections)
