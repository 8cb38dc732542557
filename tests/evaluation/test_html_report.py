"""The page of a report: what it says, that it refers to no network, and what a browser shows."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch

from sere_compile import SimilarityProfile
from sere_compile.evaluation.charts import plotly_javascript
from sere_compile.evaluation.html_report import Contents, report_html, write_report
from sere_compile.report import GateReport, GateRow

from .rows import row

pytest.importorskip("plotly")

ROWS = (
    row(4, 5.0, 0.004, error=0.001, similarity="cka"),
    row(4, 6.0, 0.001, error=0.0002, rule="fill", select_top_k="2"),
    row(16, 8.0, 0.03, error=0.001),
)


def contents(**changes):
    gate = GateRow("layers.0.gate", 3, 2, 1, "softmax", True, "grouped by expert", "rewritten")
    refused = GateRow("vocabulary", None, None, None, "", None, "", "skipped", reason="samples <tokens>")
    matrix = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
    given = {
        "model": "a <b> model", "data": "text.txt, 8 x 6 tokens", "gates": GateReport((gate, refused)),
        "profile": SimilarityProfile({"layers.0.gate": matrix}, {"method": "cka"}), "profile_file": "p.safetensors",
        "rows": ROWS, "budget": 0.01, "speedup": lambda r: r.active_before / r.active_after, "made_by": "torch 1",
    }  # fmt: skip
    return Contents(**{**given, **changes})


@pytest.fixture(scope="module")
def page():
    return report_html(contents())


def shown(page):
    """The page without the library for charts, with what stands for < and > in it."""
    return html.unescape(page.replace(plotly_javascript(), ""))


def test_what_is_recommended(page):
    """As lines to paste, with the profile that they need."""
    lines = [html.unescape(code) for code in re.findall(r'<pre class="recommended">(.*?)</pre>', page, re.DOTALL)]
    assert lines == [
        "sere_compile.attach(model, 'p.safetensors')\n"
        "model = torch.compile(model, backend=\"sere\", options={'select_top_k': 1})"
    ]
    assert "Decode batch 4: S = 1, reroute, cka, perplexity +0.40% ± 0.10%" in page
    assert "Decode batch 16: no setting is shown to stay within 1 %." in page


def test_too_few_data_are_said():
    page = report_html(contents(rows=(row(4, 5.0, 0.004, error=0.02),)))
    assert re.search(r"too few data for S = 1, reroute \(\+0\.40% ± 2\.00%\); about \d+ sequences would decide", page)


def test_tables(page):
    """Every setting, every gate with its reason, and the similarity of each gate's experts."""
    text = shown(page)
    assert text.count("<tr>") == 1 + len(ROWS) + 1 + 2 + 1 + 1
    assert "<td>+3.00% ± 0.10%</td>" in text
    assert "<td>9.0 → 5.0</td><td>1.80x</td>" in text
    assert "1 found, 1 re-routed." in text
    assert "<td>samples <tokens></td>" in text
    assert "<td>0-1 0.900, 1-2 0.200, 0-2 0.100</td><td>2 (below 0.900)</td>" in text


def test_names_are_no_markup(page):
    assert "a <b> model" not in page.replace(plotly_javascript(), "")
    assert "a &lt;b&gt; model" in page


def test_hovering_shows_values(page):
    text = re.sub(r"\\u([0-9a-f]{4})", lambda code: chr(int(code[1], 16)), shown(page))
    assert "S = 2, fill<br>perplexity +0.10% ± 0.02%<br>KL 0.0000" in text


def test_a_speed_that_is_not_known_is_not_drawn():
    page = report_html(contents(speedup=None))
    assert "loss-speed" not in page
    assert "Not known: this model's experts are not stacked weights beside a router." in page
    assert 'id="loss-active"' in page


def test_measured_times_are_shown_with_their_source():
    timed = [replace(r, step_ms=2.0, speedup=1.25, over_stock=3.0) for r in ROWS]
    page = shown(report_html(contents(rows=timed, speedup=lambda r: r.speedup, speed_source=["measured <here>"])))
    assert "<p>Measured <here>.</p>" in page
    assert "Not measured" not in page
    assert "<td>2 ms per step, 1.25x over no re-routing, 3.00x over stock</td>" in page
    assert "expected 2 ms per step, 1.25x" in page


def test_the_rule_that_loses_least_is_named():
    rows = [row(4, 5.0, 1.0, rule="fill", losses=(1.0, 2.0)), row(4, 5.0, 2.0, rule="drop", losses=(3.0, 1.0))]
    page = shown(report_html(contents(rows=rows)))
    assert "Decode batch 4, least lost by S = 1: fill (drop: within two standard errors)." in page


def test_nothing_refers_to_the_network(page):
    """The library apart, which is forbidden to by the page's policy, there is no address, and nothing to fetch."""
    text = page.replace(plotly_javascript(), "")
    assert "://" not in text
    assert re.findall(r"\b(?:src|href|action)\s*=", text) == []
    assert re.findall(r"@import|url\(|<link|<iframe|<img", text) == []
    assert """content="default-src 'none'; script-src 'unsafe-inline';""" in text


def test_an_earlier_page_stays_if_the_disk_is_full(tmp_path, no_room):
    out = tmp_path / "r.html"
    out.write_text("old")
    with pytest.raises(Exception, match="could not be written"), no_room():
        write_report(contents(), out)
    assert out.read_text() == "old"


def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return found or pytest.skip("no Chromium is installed")


def opened(page, folder, script=""):
    """The document as a browser without a network makes it of the page, and what it complained of."""
    file = folder / "report.html"
    file.write_text(page.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'user'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000", "--enable-logging=stderr"]
    done = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(plotly_javascript(), ""), re.findall(r"CONSOLE.*", done.stderr)


def test_a_browser_shows_it(page, tmp_path):
    """Axes, names and every point are drawn; hovering shows values; nothing was fetched, and nothing refused."""
    hover = """
        addEventListener("load", async () => {
          const chart = document.getElementById("loss-active");
          const index = chart.data.findIndex(trace => trace.text && trace.text.some(t => t.startsWith("S = 2, fill")));
          Plotly.Fx.hover(chart, [{curveNumber: index, pointNumber: 0}]);
          document.body.dataset.fetched = performance.getEntriesByType("resource").length;
        });
    """
    document, complaints = opened(page, tmp_path, hover)
    assert complaints == []
    assert 'data-fetched="0"' in document
    chart = document[document.index('id="loss-active"') : document.index('id="loss-speed"')]
    texts = set(re.findall(r"<(?:text|tspan)[^>]*>([^<]+)<", chart))
    assert {"decode batch 4", "decode batch 16", "active experts per layer", "reroute", "fill", "S = 2"} <= texts
    assert "perplexity, % above the original" in texts
    assert "perplexity +0.10% ± 0.02%" in texts
    # Settings, and a key for each rule and S beside them.
    assert len(re.findall(r'<path class="point', chart)) == len(ROWS)
    assert document.count('class="main-svg"') >= 3
