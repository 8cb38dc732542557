"""Heat maps of profiles, as matplotlib is told to draw them."""

from __future__ import annotations

import pytest
import torch

from sere_compile import SimilarityProfile
from sere_compile.evaluation import heat_maps
from sere_compile.evaluation.heat_maps import GateSimilarity, plot_profile, short_names

from ..thinned import thinned

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, by file name."""
    figures, save = {}, heat_maps.save

    def kept(figure, path):
        figures[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(heat_maps, "save", kept)
    return figures


def profile(gates, metadata=None):
    """Gate i has the similarities 0.9, 0.2, 0.1, less i hundredths."""
    matrix = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
    names = [f"model.layers.{number}.gate.weight" for number in range(gates)]
    return SimilarityProfile(
        {name: (matrix - 0.01 * i).fill_diagonal_(1.0) for i, name in enumerate(names)}, metadata or {}
    )


def maps(figure):
    return [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]


@pytest.mark.parametrize(("gates", "places"), thinned([(1, 1), (3, 3), (4, 4), (5, 8), (12, 12)], (0, 1, 3)))
def test_a_map_for_each_gate(gates, places, drawn, tmp_path):
    """At most four in a row; places that are left over are empty."""
    assert plot_profile(profile(gates), tmp_path / "p.png") == [tmp_path / "p.png"]
    figure = drawn["p.png"]
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert [axis.axison for axis in maps(figure)] == [True] * gates + [False] * (places - gates)
    shown = maps(figure)[0].images[0].get_array()
    assert shown.mask.tolist() == torch.eye(3, dtype=torch.bool).tolist()
    assert float(shown[0, 1]) == pytest.approx(0.9)


def test_axes_bar_and_title_say_what_they_are(drawn, tmp_path):
    metadata = {"method": "cosine", "model": "some model", "data": "books.txt, 4 x 8 tokens", "tokens": "32"}
    plot_profile(profile(2, metadata), tmp_path / "p.png")
    figure = drawn["p.png"]
    assert figure.get_suptitle() == "similarity of experts  |  some model  |  books.txt, 4 x 8 tokens"
    first = maps(figure)[0]
    assert first.get_title() == "model.layers.0.gate.weight"
    assert (first.get_xlabel().splitlines()[0], first.get_ylabel()) == ("expert v", "expert u")
    [bar] = [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]
    assert bar.get_ylabel() == "similarity of u and v (cosine)"


@pytest.mark.slow
def test_every_map_has_the_same_scale(drawn, tmp_path):
    """From the least to the largest similarity of two experts anywhere, on every page."""
    plot_profile(profile(13), tmp_path / "p.png")
    pages = [drawn["p-1.png"], drawn["p-2.png"]]
    scales = {tuple(round(x, 3) for x in a.images[0].get_clim()) for page in pages for a in maps(page) if a.images}
    assert scales == {(-0.02, 0.9)}


@pytest.mark.parametrize(("threshold", "critical"), [(0.0, []), (0.5, [2]), (0.2, []), ("q0.3", [2]), (1.5, [0, 1, 2])])
def test_experts_that_are_always_critical_are_marked(threshold, critical, drawn, tmp_path):
    """Those less similar than the threshold to all others: marked, listed, and explained by a legend."""
    plot_profile(profile(1), tmp_path / "p.png", threshold)
    figure = drawn["p.png"]
    [axis] = maps(figure)
    assert [int(x) for x, _ in axis.collections[0].get_offsets()] == critical
    *_, pairs, last = axis.get_xlabel().splitlines()
    assert pairs == "most similar: 0-1 0.90, 1-2 0.20, 0-2 0.10"
    assert last.endswith(": " + ", ".join(map(str, critical)) if critical else "critical: none")
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert texts == (["critical: less similar than rho to every other expert, always stays"] if critical else [])


def test_many_critical_experts_are_counted():
    gate = GateSimilarity.of("g", torch.eye(20), 0.5)
    assert heat_maps._listed(gate).endswith("20 critical at rho 0.50: 0, 1, 2, 3, 4, 5, 6, 7, 12 more")


def test_one_expert_has_no_pairs(drawn, tmp_path):
    plot_profile(SimilarityProfile({"gate": torch.ones(1, 1)}), tmp_path / "p.png")
    assert "most similar: none" in maps(drawn["p.png"])[0].get_xlabel()


@pytest.mark.slow
def test_many_gates_are_an_overview_and_pages(drawn, tmp_path):
    """48 of them; no picture is larger than 2,400 pixels either way."""
    written = plot_profile(profile(48), tmp_path / "p.png", 0.505)
    assert [path.name for path in written] == ["p.png", "p-1.png", "p-2.png", "p-3.png", "p-4.png"]
    for path in written:
        header = path.read_bytes()[16:24]
        assert max(int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")) <= 2400
    titles = [axis.get_title() for name in list(drawn)[1:] for axis in maps(drawn[name]) if axis.axison]
    assert titles == [f"model.layers.{number}.gate.weight" for number in range(48)]

    nearest, critical = drawn["p.png"].axes[:2]
    assert nearest.get_ylabel() == "gate, model.layers.*.gate.weight"
    assert [label.get_text() for label in nearest.get_yticklabels()] == [str(number) for number in range(48)]
    assert nearest.images[0].get_array()[0].tolist() == pytest.approx([0.2, 0.9, 0.9])
    # Expert 2 of every gate; from gate 40 on, no expert has one of at least 0.505 beside it.
    assert [bar.get_width() for bar in critical.patches] == [1] * 40 + [3] * 8


def test_an_overview_has_a_largest_size():
    """And names some of its gates where there is no room for all."""
    many = profile(70)
    overview = heat_maps._overview([GateSimilarity.of(name, many[name], 0.0) for name in many], "", many)
    assert overview.get_figheight() <= 16
    assert [label.get_text() for label in overview.axes[0].get_yticklabels()][:3] == ["0", "2", "4"]


def test_short_names():
    assert short_names(["a.0.w", "a.1.w", "a.12.w"]) == ("a.*.w", ["0", "1", "12"])
    assert short_names(["a.0.w", "a.0.x.w"]) == ("", ["a.0.w", "a.0.x.w"])
    assert short_names(["a.w"]) == ("", ["a.w"])
    assert short_names(["a.w", "b.v"]) == ("*", ["a.w", "b.v"])
