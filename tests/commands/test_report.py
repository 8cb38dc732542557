"""`sere report`."""

from __future__ import annotations

import importlib

import pytest
from click.testing import CliRunner

from sere_compile.cli import main

from .checkpoint import measured, sere


@pytest.mark.slow
def test_a_page_of_a_checkpoint(checkpoint, tmp_path):
    """Every substitution at every S and batch, with the profile's name."""
    pytest.importorskip("plotly")
    out = tmp_path / "report.html"
    result = sere(checkpoint, "report", "-o", out, "--select-top-k", 1, "--batch", "2,4", "--budget", 50)
    assert result.exit_code == 0, result.output
    assert f"{out}: 6 settings of model" in result.output
    page = out.read_text(encoding="utf-8")
    assert "Re-routing in model" in page
    assert "Text: text.jsonl, 8 x 6 tokens. Similarity: profile.safetensors." in page
    assert "2 found, 2 re-routed." in page
    assert 'id="loss-speed"' in page


@pytest.mark.slow
def test_a_page_with_measured_times(checkpoint, tmp_path):
    """In the place of what bytes let expect, and with their source."""
    pytest.importorskip("plotly")
    out, bench = tmp_path / "report.html", measured(tmp_path / "bench.json", [4])
    result = sere(checkpoint, "report", "-o", out, "--select-top-k", 1, "--batch", 4, "--speed", bench)
    assert result.exit_code == 0, result.output
    page = out.read_text(encoding="utf-8")
    assert "Decode batch 4: 1 ms + 0.1 ms per active expert (measured with" in page
    assert "Not measured" not in page
    assert "ms per step, 1." in page


@pytest.mark.slow
def test_without_a_profile_experts_are_compared_without_data(checkpoint, tmp_path):
    pytest.importorskip("plotly")
    out = tmp_path / "report.html"
    arguments = ["--model", checkpoint / "model", "--data", checkpoint / "text.jsonl", "--length", 6, "--batch", 4]
    arguments += ["--sequences", 8, "--select-top-k", 1, "-o", out]
    result = CliRunner().invoke(main, ["report", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "Similarity: measured without data." in out.read_text(encoding="utf-8")


def test_a_missing_library_is_said_first(monkeypatch, tmp_path):
    """Before a model is looked for."""
    known = importlib.import_module

    def without_plotly(name, *rest):
        if name.startswith("plotly"):
            raise ImportError(name=name)
        return known(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without_plotly)
    result = CliRunner().invoke(main, ["report", "--model", "no/such", "--data", "x", "-o", str(tmp_path / "r.html")])
    assert result.exit_code == 1
    assert "a report needs plotly.offline: pip install 'sere-compile[report]'" in result.output
