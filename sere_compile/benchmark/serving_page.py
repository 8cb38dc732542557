"""What `sere serve-bench` found as pictures: a file by matplotlib, and one page that opens without a network."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from ..evaluation.charts import chart_html, line_chart, loss_chart
from ..evaluation.html_report import page_html, paragraph, table_html
from ..evaluation.pictures import new_figure, save
from ..evaluation.sweep import SweepRow
from ..whole_file import write_whole
from .serving import ALONE, HEADINGS, ServingResults, ServingRow

Points = list[tuple[int, float, float, float]]
TIMES, SPEEDS = "milliseconds per output token", "output tokens per second, prompts included"
_LEGEND = (
    "Milliseconds per output token are the median of three runs after one to warm up, with the least and the most: the "
    "time of a long continuation less that of a short one, so that prompts do not count. Every variant is an engine of "
    "its own, one after the other. Active experts are means over layers and re-routed steps."
)
_BARS = "Bars are one standard error. Pale: another setting has fewer active experts and loses less."


def series(results: ServingResults) -> dict[str, dict[str, Points]]:
    """By panel and variant: (batch, least, median, most)."""
    times: dict[str, Points] = {}
    speeds: dict[str, Points] = {}
    for row in results.rows:
        low, median, high = row.ms
        times.setdefault(row.variant, []).append((row.batch, low, median, high))
        speeds.setdefault(row.variant, []).append((row.batch, *(row.tokens_per_s,) * 3))
    return {TIMES: times, SPEEDS: speeds}


def with_losses(results: ServingResults) -> list[tuple[ServingRow, SweepRow, float]]:
    """Rows whose loss and whose speed-up are known."""
    found = [(row, row.loss, results.speedup(row)) for row in results.rows]
    return [(row, loss, speedup) for row, loss, speedup in found if loss is not None and speedup is not None]


# The picture


def plot_serving(results: ServingResults, path: str | Path) -> None:
    """Milliseconds and tokens per second against batch size, and loss against speed-up where losses are known.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    panels, pairs = series(results), with_losses(results)
    number = len(panels) + bool(pairs)
    figure = new_figure(5.2 * number, 4.6)
    axes = figure.subplots(1, number, squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        _lines(axis, title, lines)
    if pairs:
        _losses(axes[-1], pairs)
    figure.suptitle(f"{results.model}\n{results.machine}", fontsize=9)
    save(figure, path)


def _lines(axis: Any, title: str, lines: dict[str, Points]) -> None:
    for name, points in lines.items():
        spread = ([middle - low for _, low, middle, _ in points], [high - middle for _, _, middle, high in points])
        axis.errorbar(
            [size for size, *_ in points], [middle for _, _, middle, _ in points], yerr=spread,
            fmt="s--" if name == ALONE else "o-", label=name, capsize=2,
        )  # fmt: skip
    sizes = sorted({point[0] for points in lines.values() for point in points})
    axis.set(title=title, xlabel="batch (requests)", xscale="log", ylim=(0, None))
    axis.set_xticks(sizes, labels=[str(size) for size in sizes], minor=False)
    axis.minorticks_off()
    axis.legend(fontsize=8)


def _losses(axis: Any, pairs: list[tuple[ServingRow, SweepRow, float]]) -> None:
    for name in dict.fromkeys(row.variant for row, _, _ in pairs):
        own = [(row, loss, speedup) for row, loss, speedup in pairs if row.variant == name]
        axis.errorbar(
            [speedup for _, _, speedup in own], [100 * loss.perplexity_change for _, loss, _ in own],
            yerr=[100 * loss.standard_error for _, loss, _ in own], fmt="o", label=name, capsize=2,
        )  # fmt: skip
        for row, loss, speedup in own:
            axis.annotate(f" {row.batch}", (speedup, 100 * loss.perplexity_change), fontsize=7)
    axis.set(title="loss against speed-up, by batch", xlabel="times as fast as vLLM alone")
    axis.set_ylabel("perplexity, % above the original")
    axis.legend(fontsize=8)


# The page


def write_page(results: ServingResults, path: str | Path) -> None:
    """Write the page.

    Raises:
        MissingExtraError: plotly is not installed.
        OutputError: the file cannot be written.
    """
    write_whole(path, serving_html(results).encode())


def serving_html(results: ServingResults) -> str:
    """The page as text.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    parts = [paragraph(f"{line[:1].upper()}{line[1:]}.") for line in results.lines()]
    parts += ["<h2>Won and lost</h2>", table_html("won", HEADINGS, map(results.cells, results.rows))]
    parts.append(paragraph(_LEGEND))
    parts += [paragraph(f"Left out: {text}") for text in results.left_out]
    if results.rows:
        parts += ["<h2>Time against batch</h2>", chart_html(line_chart(series(results), "batch"), "times")]
    if pairs := with_losses(results):
        speedups = {id(loss): speedup for _, loss, speedup in pairs}
        rows = {id(loss): row for row, loss, _ in pairs}

        def hover(loss: SweepRow) -> str:
            cells = zip(HEADINGS, results.cells(rows[id(loss)]), strict=True)
            return "<br>".join(html.escape(f"{head}: {cell}") for head, cell in cells)

        chart = loss_chart([loss for _, loss, _ in pairs], lambda loss: speedups[id(loss)], "speed-up over vLLM", hover)
        parts += [
            "<h2>Loss against speed-up</h2>",
            paragraph(_BARS),
            chart_html(chart, "loss"),
        ]
    options = [
        [row.variant, f"--additional-config '{json.dumps({'sere': row.sere})}'"]
        for row in {row.variant: row for row in results.rows if row.sere is not None}.values()
    ]
    parts += ["<h2>Variants</h2>", table_html("variants", ["variant", "engine argument"], options)]
    if results.notes:
        parts += ["<h2>Notes</h2>", *(paragraph(text) for text in results.notes)]
    return page_html(f"SERE in vLLM: {results.model}", parts)
