"""Measuring how alike the experts behind a gate are."""

from __future__ import annotations

from .metrics import (
    METRICS,
    CkaAccumulator,
    CosineAccumulator,
    FrobeniusAccumulator,
    SimilarityAccumulator,
    make_accumulator,
)

__all__ = [
    "METRICS",
    "CkaAccumulator",
    "CosineAccumulator",
    "FrobeniusAccumulator",
    "SimilarityAccumulator",
    "make_accumulator",
]
