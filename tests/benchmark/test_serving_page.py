"""The page and the picture of `sere serve-bench`."""

from __future__ import annotations

import html
import re

import pytest

from sere_compile.benchmark.serving_page import plot_serving, serving_html, write_page
from sere_compile.evaluation.charts import plotly_javascript

from .test_serving import made_rows, results


def shown(found):
    return html.unescape(serving_html(found).replace(plotly_javascript(), ""))


def test_one_page_shows_what_is_won_and_lost():
    pytest.importorskip("plotly")
    page = shown(results(rows=made_rows(), left_out=["S = 2: out of time"], notes=["SERE: <said>"]))
    assert "<h1>SERE in vLLM: m</h1>" in page
    assert "<td>8</td><td>S = 1, reroute</td><td>4.50 [4.00 .. 4.60]</td><td>2.00x</td>" in page
    assert "Left out: S = 2: out of time" in page
    assert 'id="times"' in page
    assert 'id="loss"' in page
    decoded = re.sub(r"\\u([0-9a-f]{4})", lambda code: chr(int(code[1], 16)), page)
    assert "perplexity: +2.00% ± 0.10%<br>top-1 same: 100.0%" in decoded
    assert """--additional-config '{"sere": {"select_top_k": 1}}'""" in page
    assert "SERE: <said>" in page
    assert "://" not in page


def test_without_losses_the_page_says_why():
    pytest.importorskip("plotly")
    page = shown(results(rows=made_rows()[:1], quality="not measured: no text"))
    assert "Quality: not measured: no text." in page
    assert 'id="loss"' not in page


def test_a_page_without_rows_is_a_page():
    pytest.importorskip("plotly")
    page = shown(results(left_out=["vLLM: ValueError: why"]))
    assert "Left out: vLLM: ValueError: why" in page
    assert 'id="times"' not in page


def test_an_earlier_page_stays_if_the_disk_is_full(tmp_path, no_room):
    pytest.importorskip("plotly")
    (tmp_path / "p.html").write_text("old")
    with pytest.raises(Exception, match="could not be written"), no_room():
        write_page(results(rows=made_rows()), tmp_path / "p.html")
    assert (tmp_path / "p.html").read_text() == "old"


@pytest.mark.parametrize("rows", [made_rows(), made_rows()[:1]], ids=["with losses", "without"])
def test_the_picture(tmp_path, rows):
    """A panel for times, one for tokens per second, and one for losses where there are any."""
    pytest.importorskip("matplotlib")
    plot_serving(results(rows=rows), tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text()
    assert drawn.count('<g id="axes_') == (3 if len(rows) > 1 else 2)
