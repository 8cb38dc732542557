"""The picture of a sweep or a comparison, as matplotlib is told to draw it, and where what it draws comes to stand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from sere_compile.evaluation import pareto_plot
from sere_compile.evaluation.pareto_plot import PALE, SLACK, pareto_front, plot_sweep

from .rows import row

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws rows, and gives the figure that is saved."""

    def draw(rows):
        figures, save = [], pareto_plot.save

        def kept(figure, path):
            figures.append(figure)
            save(figure, path)

        with monkeypatch.context() as patched:
            patched.setattr(pareto_plot, "save", kept)
            plot_sweep(iter(rows), tmp_path / "s.png")
        assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
        [figure] = figures
        return figure

    return draw


def points(axis):
    """(x, y, marker, colour, alpha) of every setting of a panel."""
    found = [(bar[0].get_xdata()[0], bar[0].get_ydata()[0], bar[0]) for bar in axis.containers]
    return [(x, y, line.get_marker(), line.get_color(), line.get_alpha()) for x, y, line in found]


def test_the_front_has_no_beaten_row():
    rows = [row(4, 5.0, 0.02), row(4, 6.0, 0.03), row(4, 7.0, 0.001), row(4, 7.0, 0.002)]
    assert pareto_front(rows) == [rows[0], rows[2]]
    assert pareto_front(reversed(rows)) == [rows[0], rows[2]]
    assert pareto_front([row(4, 5.0, 0.02), row(4, 6.0, 0.02)]) == [row(4, 5.0, 0.02)]


def test_nearly_equal_active_experts_count_as_equal():
    """A hundredth of an expert does not save a setting that loses far more."""
    rows = [row(4, 5.0, 0.9), row(4, 5.01, 0.1), row(4, 5.02, 0.2), row(4, 6.0, 0.01)]
    assert pareto_front(rows, SLACK) == [rows[1], rows[3]]
    assert pareto_front(rows) == [rows[0], rows[1], rows[3]]


def test_a_panel_for_each_decode_batch(drawn):
    """Colour says the rule, marker S; settings that are beaten are pale; a line joins the others."""
    rows = [
        row(4, 5.0, 0.02),
        row(4, 6.0, 0.03, rule="fill"),
        row(4, 7.0, 0.001, rule="fill", select_top_k="2"),
        row(8, 9.0, 0.5),
    ]
    figure = drawn(rows)
    first, second = figure.axes
    assert first.get_title() == "decode batch 4 (9.0 active without)"
    assert second.get_title() == "decode batch 8 (9.0 active without)"
    reroute, fill = (points(first)[index][3] for index in (1, 0))
    assert reroute != fill
    assert points(first) == [
        (6.0, pytest.approx(3.0), "o", fill, PALE),
        (5.0, pytest.approx(2.0), "o", reroute, 1.0),
        (7.0, pytest.approx(0.1), "s", fill, 1.0),
    ]
    assert points(second) == [(9.0, 50.0, "o", reroute, 1.0)]
    assert list(first.lines[0].get_xdata()) == [5.0, 7.0]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["reroute", "fill", "S = 1", "S = 2", "pale: beaten in both"]
    assert first.get_ylabel() == "perplexity, % above the original"
    assert first.get_xlabel() == "active experts per layer"


def test_error_bars(drawn):
    """One standard error each way, in percent; none where it is not known."""
    [axis] = drawn([row(4, 5.0, 0.02, error=0.005), row(4, 6.0, 0.01, error=math.nan)]).axes
    bars = [bar.lines[2] for bar in axis.containers if bar.has_yerr]
    assert len(bars) == 1
    low, high = bars[0][0].get_segments()[0][:, 1]
    assert (low, high) == (pytest.approx(1.5), pytest.approx(2.5))


def test_numbers_are_listed(drawn):
    """With setting, growth and error."""
    rows = [
        row(4, 5.0, 0.02, error=0.001, similarity="cka", threshold="q0.2"),
        row(4, 7.0, 0.01, error=math.nan, select_top_k="auto", max_active="6", similarity="cosine"),
    ]
    [axis] = drawn(rows).axes
    *numbers, listed = [text.get_text() for text in axis.texts]
    assert numbers == ["1", "2"]
    assert listed.splitlines() == [
        "1  S = 1, reroute, cka, rho q0.2: +2.00% ± 0.10%",
        "2  auto, at most 6, reroute, cosine: +1.00%",
    ]


def test_expected_times_stand_above_the_experts(drawn):
    """A second axis: 1 ms and 0.5 ms per expert, 9 experts without re-routing."""
    times = {"step_ms": 3.5, "speedup": 5.5 / 3.5}, {"step_ms": 4.5, "speedup": 5.5 / 4.5}
    figure = drawn([row(4, 5.0, 0.02, **times[0]), row(4, 7.0, 0.01, **times[1])])
    [axis] = figure.axes
    [above] = axis.child_axes
    low, high = axis.get_xlim()
    assert above.get_xlim() == (pytest.approx(1 + low / 2), pytest.approx(1 + high / 2))
    assert above.xaxis.get_major_formatter()(2.75, 0) == "2.75\n2.00x"
    assert above.get_xlabel() == "expected ms per step; times as fast as without re-routing"
    assert axis.texts[-1].get_text().splitlines()[0] == "1  S = 1, reroute: +2.00% ± 0.00%, expected 1.57x"


def test_without_a_gain_of_time_there_is_no_second_axis(drawn):
    [axis] = drawn([row(4, 5.0, 0.02, step_ms=3.0, speedup=1.0), row(4, 7.0, 0.01, step_ms=3.0, speedup=1.0)]).axes
    assert axis.child_axes == []
    assert drawn([row(4, 5.0, 0.02)]).axes[0].child_axes == []


def test_title(drawn):
    """Model and text, where the table names them."""
    named = {"model": "some model", "data": "books.txt, 4 x 8 tokens"}
    rows = [row(4, 5.0, 0.02, similarity="cka", **named), row(4, 7.0, 0.01, rule="fill", **named)]
    title = "quality against active experts  |  some model  |  books.txt, 4 x 8 tokens"
    assert drawn(rows).get_suptitle() == title
    assert drawn([row(4, 5.0, 0.02)]).get_suptitle() == "quality against active experts"


def test_large_losses_leave_room_for_small_ones(drawn):
    """A logarithmic axis from 1 % on; changes below zero stay on it."""
    rows = [row(4, 5.0, 1.2), row(4, 7.0, -0.001)]
    assert drawn(rows).axes[0].get_yscale() == "symlog"
    assert drawn([row(4, 5.0, 0.1), *rows[1:]]).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("timed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_nothing_collides(drawn, timed):
    """Words overlap neither each other nor leave the picture: 3 panels, 12 rules, long names, a second axis."""
    rules = [
        f"recombine, primary, all substitutes, fill 0.75, restore 0.{number}" for number in range(6 if timed else 12)
    ]
    rows = [
        row(batch, 2.0 * s + 0.3 * n, (13 - n) * 0.1 / s, 0.01, rule=rule, select_top_k=str(s), similarity="inner")
        for batch in (4, 16, 64)
        for s in (1, 2)
        for n, rule in enumerate(rules)
    ]
    if timed:
        rows = [replace(r, step_ms=1 + r.active_after, speedup=10 / (1 + r.active_after)) for r in rows]
    figure = drawn(rows)
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    words = [text for axis in figure.axes for text in [*axis.texts, axis.title, axis.xaxis.label]]
    words += [figure._suptitle, *figure.legends]
    for above in (above for axis in figure.axes for above in axis.child_axes):
        low, high = above.get_xlim()
        ticks = zip(above.get_xticks(), above.get_xticklabels(), strict=True)
        words += [above.xaxis.label, *(label for place, label in ticks if low <= place <= high)]
    assert all(len(axis.child_axes) == timed for axis in figure.axes)
    boxes = [(word, word.get_window_extent(renderer)) for word in words]
    for index, (word, box) in enumerate(boxes):
        assert figure.bbox.contains(box.x0, box.y0), word
        assert figure.bbox.contains(box.x1, box.y1), word
        assert [other for other, place in boxes[:index] if place.overlaps(box)] == []
