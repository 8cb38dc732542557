"""How far results are from those that are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Difference:
    """Of one result.

    Attributes:
        label: "y" for what the experts make.
        error: the largest difference relative to the largest wanted value; inf where shape or type differ.
        text: for people.
    """

    label: str
    error: float
    text: str = ""

    def __str__(self) -> str:
        return self.text or f"{self.label} is off by {self.error:.2g} of its largest value"


def differences(
    got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], labels: Sequence[str] = ()
) -> list[Difference]:
    """The difference of each result; another number of results is one difference."""
    names = [*labels, *(f"result {i}" for i in range(len(labels), len(want)))]
    if len(got) != len(want):
        return [Difference("y", float("inf"), f"{len(got)} results, where {len(want)} are wanted")]
    return [_difference(*each) for each in zip(got, want, names[: len(want)], strict=True)]


def _difference(got: torch.Tensor, want: torch.Tensor, label: str) -> Difference:
    if got.shape != want.shape or got.dtype != want.dtype:
        kinds = f"{got.dtype}{list(got.shape)}, where {want.dtype}{list(want.shape)} is wanted"
        return Difference(label, float("inf"), f"{label} is {kinds}")
    if torch.equal(got, want) or not want.numel():
        return Difference(label, 0.0)
    got, want = got.double(), want.double()
    off = torch.where((got == want) | (got.isnan() & want.isnan()), 0.0, (got - want).abs())
    error = float(off.max()) / max(float(want.nan_to_num().abs().max()), 1e-6)
    return Difference(label, error if error == error else float("inf"))


def worst(found: Sequence[Difference], *, main: bool | None) -> Difference:
    """The largest difference of the main results, of the others, or (None) of all."""
    of = [d for d in found if main is None or (d.label == "y") == main]
    return max(of, key=lambda d: d.error, default=Difference("nothing", 0.0))
