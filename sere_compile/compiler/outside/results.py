"""What runs of a block give, compared."""

from __future__ import annotations

import math

import torch

TOLERANCE = 1e-4  # relative to the largest number of a tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number of a tensor is infinite or NaN; whole numbers are not."""
    return not floats(tensor) or bool(tensor.isfinite().all())


def floats(tensor: torch.Tensor) -> bool:
    """Whether its numbers are floating-point ones."""
    return tensor.is_floating_point()


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of a shape differ by little, relative to the largest finite number of both."""
    return bool((_apart(left, right) <= TOLERANCE * max(_largest(left), _largest(right)) + 1e-7).all())


def _apart(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """By how much numbers differ; infinitely where one of two is infinite or NaN, as masked scores are."""
    same = (left == right) | (left.isnan() & right.isnan())  # the difference of equal infinities is NaN
    return (left - right).abs().nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(same, 0)


def _largest(tensor: torch.Tensor) -> float:
    """The largest finite number, whatever its sign."""
    return float(tensor.abs().nan_to_num(nan=0, posinf=0).max()) if tensor.numel() else 0.0


def changed_rows(before: list[torch.Tensor], after: list[torch.Tensor], rows: int) -> torch.Tensor | None:
    """Which tokens' outputs differ, bool [rows]; None where no output has a row per token."""
    changed = None
    for a, b in zip(before, after, strict=True):
        if a.is_floating_point() and a.shape == b.shape and _counts_rows(a.shape, rows):
            differs = (a != b).reshape(rows, -1).any(-1)
            changed = differs if changed is None else changed | differs
    return changed


def _counts_rows(shape: torch.Size, rows: int) -> bool:
    """Whether the leading sizes of a tensor count so many rows: [T, H], [B, S, H], or [B, S, H] of B sequences."""
    return any(shape[:end].numel() == rows for end in range(1, len(shape)))


def distance(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float | None:
    """The largest difference relative to the largest finite number of its tensor; None where they are other things."""
    worst = 0.0
    if len(got) != len(wanted):
        return None
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return None
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return None
            continue
        if a.numel():
            worst = max(worst, float(_apart(a, b).max()) / max(_largest(b), 1e-6))
    return worst
