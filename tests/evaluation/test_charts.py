"""Charts of a report, as plotly is told to draw them."""

from __future__ import annotations

import math

import pytest
import torch

from sere_compile.evaluation.charts import chart_html, line_chart, loss_chart, plotly_javascript, similarity_chart
from sere_compile.evaluation.heat_maps import GateSimilarity
from sere_compile.evaluation.pareto_plot import PALE

from .rows import row

pytest.importorskip("plotly")


def chart(rows):
    return loss_chart(rows, lambda r: r.active_after, "active experts", lambda r: r.label)


def points(figure):
    """(x, text, colour, symbol, opacity) of every setting."""
    marks = [trace for trace in figure.data if trace.mode == "markers" and trace.text]
    return sorted(
        (x, text, trace.marker.color, symbol, trace.opacity)
        for trace in marks
        for x, text, symbol in zip(trace.x, trace.text, trace.marker.symbol, strict=True)
    )


def test_colour_says_the_rule_and_symbol_s():
    rows = [row(4, 5.0, 0.02), row(4, 6.0, 0.03, rule="fill"), row(4, 7.0, 0.001, rule="fill", select_top_k="2")]
    figure = chart(rows)
    (_, _, reroute, *_), (_, _, fill, *_), _ = points(figure)
    assert reroute != fill
    assert points(figure) == [
        (5.0, "S = 1, reroute", reroute, "circle", 1.0),
        (6.0, "S = 1, fill", fill, "circle", PALE),
        (7.0, "S = 2, fill", fill, "square", 1.0),
    ]
    assert [t.name for t in figure.data if t.name] == ["reroute", "reroute", "fill", "fill"] + [
        *("reroute", "fill", "S = 1", "S = 2")
    ]
    assert [t.x for t in figure.data if t.mode == "lines"] == [(5.0, 7.0)]


def test_a_panel_for_each_decode_batch():
    figure = chart([row(4, 5.0, 0.02), row(16, 9.0, 0.05)])
    assert [title.text for title in figure.layout.annotations] == ["decode batch 4", "decode batch 16"]
    assert figure.layout.xaxis2.title.text == "active experts"
    assert [t.xaxis for t in figure.data if t.text] == ["x", "x2"]


def test_error_bars_and_a_logarithmic_axis():
    """Linear while all losses are small; beyond, heights are asinh of the percentage, and so are the bars' ends."""
    small = chart([row(4, 5.0, 0.02, error=0.005), row(4, 7.0, 0.01, error=math.nan)])
    [trace] = [t for t in small.data if t.text]
    assert (trace.y, trace.error_y.array) == (pytest.approx((2.0, 1.0)), pytest.approx((0.5, 0.0)))
    assert small.layout.yaxis.ticktext is None
    [trace] = [t for t in chart([row(4, 5.0, 0.5, error=0.1)]).data if t.text]
    assert trace.y[0] == pytest.approx(math.asinh(50))
    assert trace.y[0] + trace.error_y.array[0] == pytest.approx(math.asinh(60))
    assert trace.y[0] - trace.error_y.arrayminus[0] == pytest.approx(math.asinh(40))


def test_a_row_of_similarities_for_each_gate():
    matrix = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
    gates = [GateSimilarity.of(f"layers.{number}.gate", matrix, 0.0) for number in range(2)]
    figure = similarity_chart(gates, "cka")
    [heat] = figure.data
    assert heat.z[0] == pytest.approx((0.2, 0.9, 0.9))
    assert heat.text[1][0] == "layers.1.gate<br>expert 2: 0.200"
    assert figure.layout.yaxis.ticktext == ("0", "1")
    assert figure.layout.yaxis.title.text == "gate, layers.*.gate"


def test_an_element_holds_no_library():
    """Once in a page is enough; nothing sends the chart anywhere."""
    text = chart_html(chart([row(4, 5.0, 0.02)]), "here")
    assert 'id="here"' in text
    assert len(text) < len(plotly_javascript()) / 100
    assert "toImage" in text
    assert "://" not in text


def test_lines_have_one_colour_in_every_panel_and_stand_once_in_the_legend():
    """With what was least and most as bars."""
    points = [(4, 1.0, 2.0, 5.0), (16, 3.0, 3.5, 4.0)]
    figure = line_chart({"ms": {"a": points, "b": points}, "tokens": {"a": points}}, "batch")
    assert [(trace.name, trace.showlegend) for trace in figure.data] == [("a", True), ("b", True), ("a", False)]
    first, second, again = figure.data
    assert first.line.color == again.line.color != second.line.color
    assert (list(first.x), list(first.y)) == ([4, 16], [2.0, 3.5])
    assert (list(first.error_y.array), list(first.error_y.arrayminus)) == ([3.0, 0.5], [1.0, 0.5])
    assert figure.layout.xaxis.ticktext == ("4", "16")
