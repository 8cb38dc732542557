"""Heat maps of similarity profiles, and quality against active experts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..extras import require
from ..similarity.profile import SimilarityProfile
from ..similarity.threshold import resolve_threshold
from ..whole_file import whole_file
from .sweep import SweepRow


def plot_profile(profile: SimilarityProfile, path: str | Path, threshold: float | str = 0.0) -> None:
    """One heat map per gate; experts less similar than `threshold` to all others (always critical) have a red mark.

    A threshold such as "q0.2" is a different number for each gate, see `sere_compile.similarity.threshold`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure_of = _figures()
    columns = min(4, len(profile))
    rows = -(-len(profile) // columns)
    figure = figure_of(figsize=(3.6 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(profile) :]:
        axis.set_axis_off()
    for axis, (name, matrix) in zip(axes.flat, profile.items(), strict=False):
        shown = matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool), float("nan"))
        image = axis.imshow(shown.numpy(), cmap="viridis")
        figure.colorbar(image, ax=axis, shrink=0.8)
        nearest = matrix.fill_diagonal_(-torch.inf).amax(1)
        rho = resolve_threshold(threshold, matrix)
        on = isinstance(threshold, str) or threshold > 0
        critical = (nearest < rho).nonzero().flatten().tolist() if on else []
        axis.scatter(critical, critical, marker="s", color="red", s=14)
        axis.set_title(
            f"{name}\nnearest: median {nearest.median():.2f}, {len(critical)} critical at {rho:.2f}", fontsize=7
        )
        axis.tick_params(labelsize=6)
    _save(figure, path)


def plot_sweep(rows: Iterable[SweepRow], path: str | Path) -> None:
    """Growth of perplexity against active experts, one colour per decode batch; lines join the Pareto front.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure = _figures()(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    rows = list(rows)
    for batch in sorted({row.decode_batch for row in rows}):
        here = [row for row in rows if row.decode_batch == batch]
        points = axis.scatter([r.active_after for r in here], [100 * r.perplexity_change for r in here], s=18)
        front = pareto_front(here)
        axis.plot(
            [r.active_after for r in front],
            [100 * r.perplexity_change for r in front],
            color=points.get_facecolor()[0],
            label=f"decode batch {batch} ({here[0].active_before:.1f} active without)",
        )
        for row in front:
            axis.annotate(row.label, (row.active_after, 100 * row.perplexity_change), fontsize=6)
    axis.set_xlabel("active experts per layer")
    axis.set_ylabel("perplexity, % above the original")
    axis.legend(fontsize=8)
    _save(figure, path)


def pareto_front(rows: Iterable[SweepRow]) -> list[SweepRow]:
    """The rows that no other row beats in both active experts and perplexity, fewest experts first."""
    front: list[SweepRow] = []
    for row in sorted(rows, key=lambda row: (row.active_after, row.perplexity_change)):
        if not front or row.perplexity_change < front[-1].perplexity_change:
            front.append(row)
    return front


def picture_formats() -> list[str]:
    """What a picture's name may end in: what the installed matplotlib writes without LaTeX, which may be missing.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    return sorted({*_figures()().canvas.get_supported_filetypes()} - {"pgf"})


def _save(figure: Any, path: str | Path) -> None:
    with whole_file(path) as beside:
        figure.savefig(beside, dpi=150)


def _figures() -> Any:
    (figure,) = require("plot", "matplotlib.figure", needed_for="plots need")
    return figure.Figure
