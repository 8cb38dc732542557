"""Heat maps of profiles, and the plot of a sweep, as matplotlib is told to draw them."""

from __future__ import annotations

import pytest
import torch

from sere_compile import SimilarityProfile
from sere_compile.evaluation import plots
from sere_compile.evaluation.plots import pareto_front, picture_formats, plot_profile, plot_sweep

from .rows import row

pytest.importorskip("matplotlib")


def test_the_front_has_no_beaten_row():
    rows = [row(4, 5.0, 0.02), row(4, 6.0, 0.03), row(4, 7.0, 0.001), row(4, 7.0, 0.002)]
    assert pareto_front(rows) == [rows[0], rows[2]]
    assert pareto_front(reversed(rows)) == [rows[0], rows[2]]
    assert pareto_front([row(4, 5.0, 0.02), row(4, 6.0, 0.02)]) == [row(4, 5.0, 0.02)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures, save = [], plots._save

    def kept(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", kept)
    return figures


def profile(gates):
    matrix = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
    return SimilarityProfile({f"gate{number}": matrix for number in range(gates)})


def titles(figure):
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


@pytest.mark.parametrize(("gates", "places"), [(1, 1), (3, 3), (4, 4), (5, 8), (8, 8)])
def test_a_map_for_each_gate(gates, places, drawn, tmp_path):
    """At most four in a row; places that are left over are empty."""
    plot_profile(profile(gates), tmp_path / "p.png")
    [figure] = drawn
    assert (tmp_path / "p.png").stat().st_size > 1000
    maps = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    assert len(maps) == places
    assert [axis.axison for axis in maps] == [True] * gates + [False] * (places - gates)
    assert len(titles(figure)) == gates
    shown = maps[0].images[0].get_array()
    assert shown.mask.tolist() == torch.eye(3, dtype=torch.bool).tolist()
    assert float(shown[0, 1]) == pytest.approx(0.9)


@pytest.mark.parametrize(("threshold", "critical"), [(0.0, 0), (0.5, 1), (0.2, 0), ("q0.3", 1), (1.5, 3)])
def test_experts_that_are_always_critical_are_marked(threshold, critical, drawn, tmp_path):
    """Those less similar than the threshold to all others."""
    plot_profile(profile(1), tmp_path / "p.png", threshold)
    [figure] = drawn
    [title] = titles(figure)
    assert title.startswith("gate0\nnearest: median 0.90, ")
    assert f"{critical} critical" in title
    assert len(figure.axes[0].collections[0].get_offsets()) == critical


def test_lines_join_the_front_of_each_decode_batch(drawn, tmp_path):
    rows = [row(4, 5.0, 0.02), row(4, 6.0, 0.03), row(4, 7.0, 0.001), row(8, 9.0, 0.5)]
    plot_sweep(iter(rows), tmp_path / "s.png")
    [figure] = drawn
    [axis] = figure.axes
    assert [line.get_label() for line in axis.lines] == [
        "decode batch 4 (9.0 active without)",
        "decode batch 8 (9.0 active without)",
    ]
    assert list(axis.lines[0].get_xdata()) == [5.0, 7.0]
    assert list(axis.lines[0].get_ydata()) == pytest.approx([2.0, 0.1])
    assert [len(points.get_offsets()) for points in axis.collections] == [3, 1]
    assert axis.collections[0].get_offsets()[1].tolist() == pytest.approx([6.0, 3.0])
    for line, points in zip(axis.lines, axis.collections, strict=True):
        assert tuple(line.get_color()) == tuple(points.get_facecolor()[0])
    assert [(text.get_text(), text.xy) for text in axis.texts] == [
        ("S=1", (5.0, 2.0)),
        ("S=1", (7.0, pytest.approx(0.1))),
        ("S=1", (9.0, 50.0)),
    ]
    assert axis.get_legend() is not None
    assert axis.get_ylabel() == "perplexity, % above the original"


def test_formats():
    assert {"png", "svg", "pdf"} <= set(picture_formats())
    assert "pgf" not in picture_formats()
