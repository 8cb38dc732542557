"""Made-up rows of a sweep."""

from __future__ import annotations

import dataclasses

from sere_compile.evaluation.sweep import SweepRow


def row(batch, active, change, error=0.0, batches=8, **others):
    made = SweepRow("reroute", "", "1", "", "0", batch, 1.0, change, error, 0.0, 1.0, 9.0, active, batches)
    return dataclasses.replace(made, **others)
