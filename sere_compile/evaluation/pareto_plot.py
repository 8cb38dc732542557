"""What settings cost against the experts that they leave active: the rows of a sweep or a comparison as a picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..extras import require
from .pictures import new_figure, save
from .sweep import SLACK, SweepRow

COLUMNS = 3
LIST_WIDTH = 76
MARKERS = "os^DvPX*<>"
PALE = 0.3
# Growth of perplexity in percent: above it the axis is logarithmic beyond 1 %, so that small losses can be told apart.
MOST_LINEAR = 20.0


@dataclass(frozen=True)
class Look:
    """What stands for what, in every panel: a colour for each rule, a marker for each S."""

    colours: Mapping[str, Any]
    markers: Mapping[str, str]


def plot_sweep(rows: Iterable[SweepRow], path: str | Path) -> None:
    """Growth of perplexity with its standard error against active experts: a panel for each decode batch.

    Settings that another one beats in both are pale; a line joins the others, which have numbers and are listed. Where
    expected times are known, a second axis has them above the experts that they grow with.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    rows = list(rows)
    batches = sorted({row.decode_batch for row in rows})
    columns = min(COLUMNS, len(batches))
    lines = -(-len(batches) // columns)
    look = _look(rows)
    width = 4.6 * columns + 1.2
    across = max(1, int(width / (0.6 + 0.055 * max(map(len, look.colours)))))  # inches of a key at 7 points
    keys = -(-(len(look.colours) + len(look.markers) + 1) // across)
    fronts = [pareto_front([row for row in rows if row.decode_batch == batch], SLACK) for batch in batches]
    listed = max(_listed(front).count("\n") + 1 for front in fronts)
    figure = new_figure(width, (3.9 + 0.15 * listed) * lines + 1.0 + 0.2 * keys)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(batches) :]:
        axis.set_axis_off()
    for axis, batch in zip(axes.flat, batches, strict=False):
        _panel(axis, [row for row in rows if row.decode_batch == batch], look)
    if max(100 * row.perplexity_change for row in rows) > MOST_LINEAR:
        axes.flat[0].set_yscale("symlog", linthresh=1, linscale=0.3)
        axes.flat[0].yaxis.set_major_formatter("{x:g}")
    for axis in axes[:, 0]:
        axis.set_ylabel("perplexity, % above the original", fontsize=8)
    figure.suptitle(title_of(rows), fontsize=10)
    _legend(figure, look, across)
    _spread_numbers(figure, axes.flat[: len(batches)])
    save(figure, path)


def pareto_front(rows: Iterable[SweepRow], slack: float = 0.0) -> list[SweepRow]:
    """The rows that no other row beats in both active experts and perplexity, fewest experts first.

    Args:
        rows: of one decode batch.
        slack: a row with up to this share more active experts beats another one, too, by its perplexity.
    """
    front: list[SweepRow] = []
    for row in sorted(rows, key=lambda row: (row.active_after, row.perplexity_change)):
        if front and row.perplexity_change >= front[-1].perplexity_change:
            continue
        while front and row.active_after < front[-1].active_after * (1 + slack):
            front.pop()
        front.append(row)
    return front


def title_of(rows: Sequence[SweepRow]) -> str:
    """Model and text, where the table names them."""
    return "  |  ".join(filter(None, ["quality against active experts", rows[0].model, rows[0].data]))


def _look(rows: Sequence[SweepRow]) -> Look:
    (matplotlib,) = require("plot", "matplotlib", needed_for="plots need")
    rules = list(dict.fromkeys(row.rule for row in rows))
    both = matplotlib.colormaps["tab20"].colors  # dark and light in turn; dark ones first
    palette = [*both[::2], *both[1::2]]
    sizes = sorted({row.select_top_k for row in rows}, key=lambda s: (not s.isdigit(), s.zfill(9)))
    return Look(
        {rule: palette[index % len(palette)] for index, rule in enumerate(rules)},
        {size: MARKERS[index % len(MARKERS)] for index, size in enumerate(sizes)},
    )


def _panel(axis: Any, rows: Sequence[SweepRow], look: Look) -> None:
    front = pareto_front(rows, SLACK)
    axis.plot(
        [row.active_after for row in front], [100 * row.perplexity_change for row in front],
        color="0.6", linewidth=0.8, zorder=1,
    )  # fmt: skip
    for row in sorted(rows, key=front.__contains__):
        error = None if math.isnan(row.standard_error) else 100 * row.standard_error
        axis.errorbar(
            row.active_after, 100 * row.perplexity_change, yerr=error,
            fmt=look.markers[row.select_top_k], color=look.colours[row.rule], alpha=1.0 if row in front else PALE,
            markersize=5, elinewidth=0.8, capsize=2, zorder=3 if row in front else 2,
        )  # fmt: skip
    for number, row in enumerate(front, start=1):
        # Below on the left there is no point, or this one would be beaten.
        axis.annotate(
            str(number), (row.active_after, 100 * row.perplexity_change), (-5, -5), textcoords="offset points",
            ha="right", va="top", fontsize=8, fontweight="bold",
        )  # fmt: skip
    axis.margins(0.15)
    axis.set_title(f"decode batch {rows[0].decode_batch} ({rows[0].active_before:.1f} active without)", fontsize=9)
    axis.set_xlabel("active experts per layer", fontsize=8)
    _time_axis(axis, rows)
    axis.annotate(_listed(front), (0, 0), (0, -34), "axes fraction", "offset points", fontsize=7, va="top")
    axis.tick_params(labelsize=7, labelleft=True)


def _time_axis(axis: Any, rows: Sequence[SweepRow]) -> None:
    """Above active experts, what a step is expected to take and gains: a line that every row of a batch lies on."""
    row = max(rows, key=lambda row: row.active_before - row.active_after)
    if row.step_ms is None or row.speedup is None or row.speedup <= 1:
        return  # times are not known, or equal
    before = row.step_ms * row.speedup
    per_expert = (before - row.step_ms) / (row.active_before - row.active_after)

    def time(active: Any) -> Any:
        return before + per_expert * (active - row.active_before)

    def active(milliseconds: Any) -> Any:
        return row.active_before + (milliseconds - before) / per_expert

    above = axis.secondary_xaxis("top", functions=(time, active))
    above.xaxis.set_major_formatter(lambda ms, _: f"{ms:g}\n{before / ms:.2f}x" if ms > 0 else "")
    above.set_xlabel("expected ms per step; times as fast as without re-routing", fontsize=8)
    above.tick_params(labelsize=7)


def _listed(front: Sequence[SweepRow]) -> str:
    """The numbered settings, in lines that are no wider than a panel."""
    lines = (
        f"{number}  {row.label}: {row.change}" + ("" if row.speedup is None else f", expected {row.speedup:.2f}x")
        for number, row in enumerate(front, start=1)
    )
    return "\n".join(textwrap.fill(line, LIST_WIDTH, subsequent_indent="     ") for line in lines)


def _legend(figure: Any, look: Look, across: int) -> None:
    (lines,) = require("plot", "matplotlib.lines", needed_for="plots need")
    keys = [lines.Line2D([], [], marker="o", linestyle="", color=c, label=rule) for rule, c in look.colours.items()]
    keys += [
        lines.Line2D([], [], marker=marker, linestyle="", color="0.3", label=f"S = {size}")
        for size, marker in look.markers.items()
    ]
    keys.append(lines.Line2D([], [], marker="o", linestyle="", color="0.3", alpha=PALE, label="pale: beaten in both"))
    figure.legend(handles=keys, loc="outside lower center", ncols=min(across, len(keys)), fontsize=7)


def _spread_numbers(figure: Any, axes: Iterable[Any]) -> None:
    """Where numbers would overlap, the later one moves away from its point, along the empty side of the front."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is measured now stays
    for axis in axes:
        placed: list[Any] = []
        for number in axis.texts[:-1]:  # the last one is the list
            while any(box.overlaps(number.get_window_extent()) for box in placed):
                left, down = number.get_position()
                number.set_position((left - 2, down - 4))
            placed.append(number.get_window_extent())
