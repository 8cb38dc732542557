"""Read what `collect_stats=True` counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import SereError
from .passes import COUNTED
from .similarity import binding


@dataclass(frozen=True)
class GateStats:
    """Sums over all batches since the last reset, for one gate.

    Attributes:
        calls: batches that were re-routed.
        tokens: rows of ids.
        slots: ids, tokens times K.
        slots_changed: ids that re-routing changed.
        active_before: distinct experts of a batch before re-routing, summed over batches.
        active_after: the same after re-routing.
    """

    calls: int
    tokens: int
    slots: int
    slots_changed: int
    active_before: int
    active_after: int

    @property
    def mean_active_before(self) -> float:
        """Distinct experts a batch before re-routing."""
        return self.active_before / self.calls if self.calls else 0.0

    @property
    def mean_active_after(self) -> float:
        """Distinct experts a batch after re-routing."""
        return self.active_after / self.calls if self.calls else 0.0


def stats(model: Any) -> dict[str, GateStats]:
    """What was counted for each gate of a model, by the name of its router weight. Waits for the device.

    `model` may be a `vllm.LLM` as well, whose gates are named as vLLM names its MoE layers.

    Raises:
        SereError: nothing was counted, because the model was not compiled with collect_stats=True or did not run.
    """
    if hasattr(model, "llm_engine"):
        from .integrations.vllm import stats as engine_stats

        return engine_stats(model)
    found: dict[str, GateStats] = {}
    for parameter in model.parameters():
        entry = binding.lookup(parameter)
        if entry is not None and entry.counts is not None:
            found[entry.name] = GateStats(**dict(zip(COUNTED, entry.counts.tolist(), strict=True)))
    if not found:
        raise SereError(
            'no routing statistics: compile the model with options={"collect_stats": True} and run it first; gates '
            "that re-route nothing (S = K, or above max_tokens) are not counted"
        )
    return found


def reset_stats(model: nn.Module) -> None:
    """Set all counters of a model to zero, in place, so that recorded CUDA graphs go on counting."""
    for parameter in model.parameters():
        entry = binding.lookup(parameter)
        if entry is not None and entry.counts is not None:
            entry.counts.zero_()
