"""How far two values are apart, and what rounding may explain."""

from __future__ import annotations

from typing import Any

import torch

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2


def tolerance(dtype: torch.dtype) -> float:
    """How far results that are equal but for rounding may be apart, relative to their largest."""
    return _TOLERANCE.get(dtype, _HALF_TOLERANCE)


def distance(expected: Any, got: Any, exact: bool) -> str | None:
    """How far two values are apart, in words, or None where they are the same."""
    if not isinstance(expected, torch.Tensor) or not isinstance(got, torch.Tensor):
        return None if type(expected) is type(got) and expected == got else f"{got} instead of {expected}"
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return f"{list(got.shape)} {got.dtype} instead of {list(expected.shape)} {expected.dtype}"
    if torch.equal(expected, got) or not expected.numel():
        return None
    left, right = expected.double(), got.double()
    if not torch.equal(left.isfinite(), right.isfinite()):
        return "infinities or NaNs"
    error = float((left - right)[left.isfinite()].abs().max())
    scale = float(left[left.isfinite()].abs().max())
    close = not exact and expected.dtype.is_floating_point and error <= tolerance(expected.dtype) * scale
    same = error == 0 and torch.equal(left.nan_to_num(), right.nan_to_num())
    return None if close or same else f"{error:.2g} of {scale:.2g}"


def changed_rows(before: torch.Tensor, after: torch.Tensor, rows: int) -> torch.Tensor | None:
    """The rows in which two tensors differ by more than rounding, bool [rows]; None where their shapes do."""
    if before.shape != after.shape:
        return None
    difference = (before.double() - after.double()).abs().nan_to_num(nan=1.0)
    limit = 1e-6 * float(before.double().abs().nan_to_num().max().clamp(min=1e-9))
    return (difference.reshape(rows, -1) > limit).any(-1).cpu()
