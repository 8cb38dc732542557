"""Which similarity matrix belongs to which router weight.

Matrices belong to weights, not to graphs: Dynamo reuses one compiled graph for every layer with
the same code. The registry is keyed by the identity of the weight and does not keep it alive.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..passes import COUNTED
from .fit import required_projection
from .threshold import matrix_in_graph


@dataclass
class GateEntry:
    """What is known of one router weight.

    Attributes:
        name: fully qualified name of the weight in its model.
        matrix: [E, E] float32 on the weight's device when it was bound, or None before.
        source: where the matrix comes from, in words.
        from_profile: whether the user attached it.
        projection: [E, E] float32 with ones on the diagonal, or None where nothing is known of it.
        counts: int64 buffer of `passes.COUNTED`, or None where nothing is counted.
    """

    name: str
    matrix: torch.Tensor | None = None
    source: str = ""
    from_profile: bool = False
    counts: torch.Tensor | None = field(default=None, repr=False)
    projection: torch.Tensor | None = field(default=None, repr=False)
    # Matrices of ranks by the threshold that they were counted from.
    ranks: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    # Thresholds of which is known whether they can act on this matrix.
    judged: set[float | str] = field(default_factory=set, repr=False)

    def matrix_on(self, device: torch.device, threshold: float | str = 0.0) -> torch.Tensor:
        """What a graph reads with this threshold, on a device; made once, then kept there, at one address."""
        assert self.matrix is not None, f"no matrix bound for {self.name}"
        with torch.inference_mode(False):
            if self.matrix.device != device:
                self.matrix = self.matrix.to(device)
            if not isinstance(threshold, str):
                return self.matrix
            if threshold not in self.ranks or self.ranks[threshold].device != device:
                self.ranks[threshold] = matrix_in_graph(self.matrix, threshold)
        return self.ranks[threshold]

    def projection_on(self, device: torch.device) -> torch.Tensor:
        """The projection coefficients on a device; moved once."""
        projection = required_projection(self.projection, self.name)
        if projection.device != device:
            with torch.inference_mode(False):
                projection = self.projection = projection.to(device)
        return projection

    def counts_on(self, device: torch.device) -> torch.Tensor:
        """The counters on a device, made at first use."""
        if self.counts is None:
            with torch.inference_mode(False):
                self.counts = torch.zeros(len(COUNTED), dtype=torch.int64, device=device)
        elif self.counts.device != device:
            with torch.inference_mode(False):
                self.counts = self.counts.to(device)
        return self.counts


_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# Why gates that were to be counted are not.
_uncounted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# Compiled graphs remember what they bound last; a change of the registry makes them ask again.
_version = 0


def version() -> int:
    """Changes whenever a matrix is assigned or forgotten."""
    return _version


def assign(
    weight: torch.Tensor,
    name: str,
    matrix: torch.Tensor,
    source: str,
    *,
    from_profile: bool = True,
    projection: torch.Tensor | None = None,
) -> None:
    """Bind a matrix [E, E], and projection coefficients [E, E], to a router weight, in place of earlier ones."""
    global _version
    _version += 1
    previous = _entries.get(weight)
    counts = previous.counts if previous is not None else None
    device = torch.device("cpu") if weight.is_meta else weight.device
    # A clone: the user's tensor may change later, a compiled graph's input must not. Outside
    # inference mode, because a matrix bound there must also serve calls that record gradients.
    with torch.inference_mode(False), torch.no_grad():
        matrix = matrix.to(device=device, dtype=torch.float32, copy=True).contiguous()
        if projection is not None:
            # An expert that stays keeps its weight, also one whose output was always zero.
            projection = projection.to(device=device, dtype=torch.float32, copy=True).contiguous().fill_diagonal_(1.0)
    _entries[weight] = GateEntry(name, matrix, source, from_profile, counts, projection)


def name(weight: torch.Tensor, full_name: str) -> GateEntry:
    """The entry of a weight, made without a matrix where there is none."""
    entry = _entries.get(weight)
    if entry is None:
        entry = _entries[weight] = GateEntry(full_name)
    return entry


def note_uncounted(weight: torch.Tensor, why: str) -> None:
    """Remember why nothing is counted for a router weight, though it was asked for."""
    _uncounted[weight] = why


def uncounted(weight: torch.Tensor) -> str:
    """What was noted of a weight; empty where nothing was."""
    return _uncounted.get(weight, "")


def lookup(weight: torch.Tensor) -> GateEntry | None:
    """The entry of a weight, or None."""
    return _entries.get(weight)


def forget(weight: torch.Tensor) -> bool:
    """Drop what is known of a weight; whether there was anything."""
    global _version
    _version += 1
    return _entries.pop(weight, None) is not None
