"""Interactive charts of a report, by plotly: quality against a cost, and the similarity of every gate's experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..extras import require
from .heat_maps import GateSimilarity, short_names
from .pareto_plot import MOST_LINEAR, PALE, SLACK, pareto_front
from .sweep import SweepRow

SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")
# By name, because the library's own choice has one that sends the chart to a service.
_BUTTONS = [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]]
_TICKS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


def plotly_javascript() -> str:
    """The library that draws the charts, to be embedded.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    (offline,) = require("report", "plotly.offline", needed_for="a report needs")
    return offline.get_plotlyjs()


def chart_html(figure: Any, name: str) -> str:
    """A figure as an element of a page that holds `plotly_javascript` already; `name` is the element's id."""
    config = {"displaylogo": False, "responsive": True, "modeBarButtons": _BUTTONS}
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)


def loss_chart(
    rows: Sequence[SweepRow], cost: Callable[[SweepRow], float], axis: str, detail: Callable[[SweepRow], str]
) -> Any:
    """Growth of perplexity, with its standard error, against a cost: a panel for each decode batch.

    Args:
        rows: of a sweep.
        cost: where a row stands on the other axis.
        axis: that axis's name.
        detail: what hovering over a row shows.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    subplots, colours = require("report", "plotly.subplots", "plotly.colors", needed_for="a report needs")
    batches = sorted({row.decode_batch for row in rows})
    titles = [f"decode batch {batch}" for batch in batches]
    figure = subplots.make_subplots(1, len(batches), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03)
    rules = list(dict.fromkeys(row.rule for row in rows))
    sizes = sorted({row.select_top_k for row in rows}, key=lambda s: (not s.isdigit(), s.zfill(9)))
    colour = {rule: colours.qualitative.D3[index % 10] for index, rule in enumerate(rules)}
    symbol = {size: SYMBOLS[index % len(SYMBOLS)] for index, size in enumerate(sizes)}
    height = _height(rows)
    for column, batch in enumerate(batches, start=1):
        here = [row for row in rows if row.decode_batch == batch]
        front = pareto_front(here, SLACK)
        line = {"color": "lightgrey", "width": 1}
        ends = {"x": [cost(r) for r in front], "y": [height(100 * r.perplexity_change) for r in front]}
        figure.add_scatter(mode="lines", line=line, hoverinfo="skip", showlegend=False, row=1, col=column, **ends)
        for rule in rules:
            for beaten in (True, False):
                own = [row for row in here if row.rule == rule and (row not in front) == beaten]
                marks = {"color": colour[rule], "symbol": [symbol[row.select_top_k] for row in own], "size": 10}
                figure.add_scatter(
                    x=[cost(row) for row in own], y=[height(100 * row.perplexity_change) for row in own],
                    error_y=_error_bars(own, height), mode="markers", marker=marks, opacity=PALE if beaten else 1.0,
                    legendgroup=rule, name=rule, showlegend=False, text=[detail(row) for row in own],
                    hovertemplate="%{text}<extra></extra>", row=1, col=column,
                )  # fmt: skip
    keys: list[tuple[str, Any, str | None]] = [(rule, {"color": colour[rule]}, rule) for rule in rules]
    keys += [(f"S = {size}", {"color": "dimgrey", "symbol": symbol[size]}, None) for size in sizes]
    for name, marks, group in keys:
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marks, name=name, legendgroup=group)
    figure.update_xaxes(title_text=axis)
    figure.update_yaxes(title_text="perplexity, % above the original", col=1)
    if height is not _linear:
        ticks = [-tick for tick in _TICKS[:0:-1]] + list(_TICKS)
        figure.update_yaxes(tickvals=[height(tick) for tick in ticks], ticktext=[f"{tick:g}" for tick in ticks])
    return _sized(figure, 460)


def line_chart(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float, float, float]]]], axis: str) -> Any:
    """Values with their spread against sizes: a panel for each quantity, a colour for each line.

    Args:
        panels: by title, which is the panel's axis too, and name of a line: points (size, least, value, most).
        axis: name of the axis of sizes, which is logarithmic.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    subplots, colours = require("report", "plotly.subplots", "plotly.colors", needed_for="a report needs")
    figure = subplots.make_subplots(1, len(panels), subplot_titles=list(panels), horizontal_spacing=0.08)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    shown: set[str] = set()
    for column, lines in enumerate(panels.values(), start=1):
        for name, points in lines.items():
            sizes, least, values, most = (list(part) for part in zip(*points, strict=True))
            bars = {
                "type": "data", "symmetric": False, "thickness": 1, "width": 3,
                "array": [high - value for high, value in zip(most, values, strict=True)],
                "arrayminus": [value - low for low, value in zip(least, values, strict=True)],
            }  # fmt: skip
            figure.add_scatter(
                x=sizes, y=values, error_y=bars, mode="lines+markers", name=name, legendgroup=name,
                line={"color": colours.qualitative.D3[names.index(name) % 10]}, showlegend=name not in shown,
                row=1, col=column,
            )  # fmt: skip
            shown.add(name)
        ticks = sorted({point[0] for points in lines.values() for point in points})
        figure.update_xaxes(
            title_text=axis, type="log", tickvals=ticks, ticktext=list(map(str, ticks)), row=1, col=column
        )
        figure.update_yaxes(rangemode="tozero", row=1, col=column)
    return _sized(figure, 420)


def similarity_chart(gates: Sequence[GateSimilarity], method: str) -> Any:
    """A row for each gate: how similar each expert is to the one nearest to it, sorted.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    (objects,) = require("report", "plotly.graph_objects", needed_for="a report needs")
    pattern, names = short_names([gate.name for gate in gates])
    orders = [gate.nearest.sort() for gate in gates]
    hover = [
        [f"{gate.name}<br>expert {expert}: {value:.3f}" for expert, value in zip(*_lists(order), strict=True)]
        for gate, order in zip(gates, orders, strict=True)
    ]
    figure = objects.Figure(
        objects.Heatmap(
            z=[order.values.tolist() for order in orders], text=hover, hovertemplate="%{text}<extra></extra>",
            colorscale="Viridis", colorbar={"title": f"similarity to the<br>nearest expert<br>({method})"},
        )
    )  # fmt: skip
    figure.update_xaxes(title_text="experts, least similar first")
    figure.update_yaxes(
        title_text=f"gate, {pattern}" if pattern else "gate", autorange="reversed",
        tickvals=list(range(len(names))), ticktext=names,
    )  # fmt: skip
    return _sized(figure, min(280 + 18 * len(gates), 900))


def _lists(order: Any) -> tuple[list[int], list[float]]:
    return order.indices.tolist(), order.values.tolist()


def _linear(percent: float) -> float:
    return percent


def _height(rows: Sequence[SweepRow]) -> Callable[[float], float]:
    """Where a percentage stands: as it is, or logarithmic beyond 1 % on both sides, if some are large."""
    large = max(100 * row.perplexity_change for row in rows) > MOST_LINEAR
    return math.asinh if large else _linear


def _error_bars(rows: Sequence[SweepRow], height: Callable[[float], float]) -> dict[str, Any]:
    """One standard error each way; none where it is not known."""
    up, down = [], []
    for row in rows:
        error = 0.0 if math.isnan(row.standard_error) else row.standard_error
        here = height(100 * row.perplexity_change)
        up.append(height(100 * (row.perplexity_change + error)) - here)
        down.append(here - height(100 * (row.perplexity_change - error)))
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1, "width": 3}


def _sized(figure: Any, height: int) -> Any:
    figure.update_layout(
        template="plotly_white", height=height, margin={"l": 70, "r": 20, "t": 50, "b": 60}, hovermode="closest"
    )
    return figure
