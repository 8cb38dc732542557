"""Made-up rows of a sweep."""

from __future__ import annotations

from sere_compile.evaluation.sweep import SweepRow


def row(batch, active, change, error=0.0, batches=8):
    return SweepRow("reroute", "", "1", "", "0", batch, 1.0, change, error, 0.0, 1.0, 9.0, active, batches)
