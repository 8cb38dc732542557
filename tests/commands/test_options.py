"""Options that several sub-commands share."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from sere_compile.cli import main

from .checkpoint import sere


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("sweep", ["--batch", "0"], "'0' is not a list of positive whole numbers such as 4,16"),
        ("sweep", ["--batch", "4,-4"], "'4,-4' is not a list of positive whole numbers"),
        ("sweep", ["--batch", ""], "'' is not a list of positive whole numbers"),
        ("sweep", ["--batch", "", "--per-layer"], "'' is not a list of positive whole numbers"),
        ("sweep", ["--threshold", "", "--per-layer"], "'' is not a list of numbers"),
        ("sweep", ["--select-top-k", ""], "--select-top-k is empty, and so is --max-active"),
        ("sweep", ["--select-top-k", "", "--per-layer"], "--select-top-k is empty"),
        ("sweep", ["--budget", "nan"], "--budget is nan"),
        ("eval", ["--select-top-k", "two"], "'two' is neither a whole number nor auto"),
        ("eval", ["--threshold", "high"], "'high' is neither a number nor a share of experts such as q0.2"),
        ("eval", ["--per-gate", "S=2"], "'S=2' is not JSON such as"),
        ("compare", ["--batch", "0"], "'0' is not a list of positive whole numbers"),
        ("compare", ["--select-top-k", "0"], "'0' is not a list of positive whole numbers"),
        ("compare", ["--threshold", ""], "'' is not a list of numbers"),
        ("compare", ["--fill", "nan"], "'nan' is not a list of numbers"),
        ("compare", ["--calibration-sequences", "0"], "0 is not in the range x>=1"),
        ("compare", ["--calibration-sequences", "-4"], "-4 is not in the range x>=1"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, command, options, message):
    """Before a model is loaded: there is none."""
    (tmp_path / "model").mkdir()
    result = sere(tmp_path, command, *options)
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_a_threshold_that_is_no_number_is_refused_before_anything_is_loaded(checkpoint, tmp_path):
    """By `plot`, too, whose picture would show nothing of it."""
    out = tmp_path / "heat.png"
    plotted = CliRunner().invoke(
        main, ["plot", str(checkpoint / "profile.safetensors"), "-o", str(out), "--threshold", "nan"]
    )
    (tmp_path / "model").mkdir()
    for result in (plotted, sere(tmp_path, "compare", "--threshold", "nan")):
        assert result.exit_code == 1
        assert "threshold must be a finite number" in result.output
    assert not out.exists()
