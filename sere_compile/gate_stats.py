"""What was counted for one gate."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GateStats:
    """Sums over all batches since the last reset, for one gate.

    Attributes:
        calls: batches that were re-routed.
        tokens: rows of ids, without those that are known to be padding.
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
        """Distinct experts per batch before re-routing."""
        return self.active_before / self.calls if self.calls else 0.0

    @property
    def mean_active_after(self) -> float:
        """Distinct experts per batch after re-routing."""
        return self.active_after / self.calls if self.calls else 0.0
