"""Draw what `sere bench` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..evaluation.pictures import save
from ..extras import require
from .result import Results, batches


def plot(results: Results, path: str | Path) -> None:
    """One panel per kind of measurement: microseconds against batch size, one line per variant.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    agg, figures = require("plot", "matplotlib.backends.backend_agg", "matplotlib.figure", needed_for="--plot needs")
    kinds = list(dict.fromkeys(row.what for row in results.rows))
    figure = figures.Figure(figsize=(6 * len(kinds), 4.5), layout="constrained")
    agg.FigureCanvasAgg(figure)
    for number, what in enumerate(kinds):
        _panel(figure.add_subplot(1, len(kinds), number + 1), what, results)
    figure.suptitle(f"{results.subject}\n{results.machine}", fontsize=9)
    save(figure, path)


def _panel(axes: Any, what: str, results: Results) -> None:
    rows = [row for row in results.rows if row.what == what]
    for variant in dict.fromkeys(row.variant for row in rows):
        own = sorted((row for row in rows if row.variant == variant), key=lambda row: row.batch)
        medians = [row.timing.median for row in own]
        low = [row.timing.median - row.timing.low for row in own]
        high = [row.timing.high - row.timing.median for row in own]
        style = "o-" if own[0].ours else "s--"
        label = variant if all(row.agrees for row in own) else f"{variant} (output disagrees)"
        axes.errorbar([row.batch for row in own], medians, yerr=(low, high), fmt=style, label=label, capsize=2)
    axes.set(title=what, xlabel="batch (tokens)", ylabel="us", xscale="log", yscale="log")
    axes.set_xticks(batches(rows), labels=[str(batch) for batch in batches(rows)])
    axes.legend(fontsize=8)
