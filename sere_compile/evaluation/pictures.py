"""Pictures by matplotlib: what they may be called, and how they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..extras import require
from ..whole_file import whole_file

# Of every picture; pages are sized so that none is wider or higher than 2,400 pixels.
DPI = 150


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches, whose parts make room for each other.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    agg, figure = require("plot", "matplotlib.backends.backend_agg", "matplotlib.figure", needed_for="plots need")
    made = figure.Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    agg.FigureCanvasAgg(made)
    return made


def save(figure: Any, path: str | Path) -> None:
    """Write a figure in the format that the name ends in.

    Raises:
        OutputError: the file cannot be written.
    """
    with whole_file(path) as beside:
        figure.savefig(beside)


def picture_formats() -> list[str]:
    """What a picture's name may end in: what the installed matplotlib writes without LaTeX, which may be missing.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    return sorted({*new_figure(1, 1).canvas.get_supported_filetypes()} - {"pgf"})
