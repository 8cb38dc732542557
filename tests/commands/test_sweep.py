"""`sere sweep` on a checkpoint: table, recommendation, budget per layer."""

from __future__ import annotations

import json
import re

import pytest

from sere_compile import SereConfig
from sere_compile.evaluation.sweep import read_csv

from ..tiny_models import gate_names
from .checkpoint import measured, sere


def test_sweep_writes_a_table_and_recommends(checkpoint, tmp_path):
    """With expected times beside losses, where they come from, and the rules that lose least."""
    out, bench = tmp_path / "sweep.csv", measured(tmp_path / "bench.json", [2, 4])
    arguments = ["--select-top-k", "1,4", "--max-active", 6, "--threshold", "0,q0.4", "--substitution", "both"]
    result = sere(checkpoint, "sweep", "--batch", "2,4", "--budget", 1e9, "--csv", out, "--speed", bench, *arguments)
    assert result.exit_code == 0, result.output
    rows = read_csv(out)
    assert len(rows) == 2 * 2 * 3 * 2
    assert {(row.select_top_k, row.max_active) for row in rows} == {("1", ""), ("4", ""), ("auto", "6")}
    assert {(row.rule, row.similarity) for row in rows} == {("reroute", "chance"), ("projection", "chance")}
    assert {row.threshold for row in rows} == {"0", "q0.4"}
    assert all((row.perplexity_change, row.kl) == (0, 0) for row in rows if row.select_top_k == "4")
    assert "decode batch 2: options={'select_top_k': 1" in result.output
    assert "decode batch 4: options={'select_top_k': 1" in result.output
    for row in rows:
        assert row.step_ms == pytest.approx(1 + 0.1 * row.active_after)
        assert row.speedup == pytest.approx((1 + 0.1 * row.active_before) / row.step_ms)
        assert row.over_stock == pytest.approx(3 / row.step_ms)
    assert "| expected ms per step | over no re-routing | over stock |" in result.stdout
    assert "that is tiny, not " in result.stdout
    assert "decode batch 4: 1 ms + 0.1 ms per active expert (measured with 4.0, 8.0;" in result.stdout
    assert {row.speed for row in rows} & set(re.findall(r", expected (.*)\)", result.stdout))
    least = result.stdout.splitlines()[-1]
    assert least.startswith("decode batch 4, least lost by ")
    assert "S = 4 and S = 4, rho q0.4" in least
    assert "reroute (projection: within two standard errors)" in least


@pytest.mark.parametrize("command", ["sweep", "compare"])
def test_a_table_is_printed_though_its_file_fails(checkpoint, tmp_path, no_room, command):
    """A disk that is full when the work is done; what it gave stands on the screen, the recommendation, too."""
    out = tmp_path / "rows.csv"
    with no_room():
        result = sere(checkpoint, command, "--batch", 4, "--select-top-k", 1, "--csv", out)
    assert result.exit_code == 1
    assert "| reroute |" in result.output
    assert ("decode batch 4: " in result.stdout) == (command == "sweep")
    assert f"Error: {out} could not be written: File too large" in result.output


@pytest.mark.slow
def test_per_layer_spends_no_more_than_the_budget(checkpoint):
    """With no budget but for what costs nothing, and with all the budget there is."""
    everything = sere(checkpoint, "sweep", "--per-layer", "--batch", 4, "--select-top-k", "1,2", "--budget", 1e9)
    assert everything.exit_code == 0, everything.output
    settings = json.loads(everything.stdout)  # nothing else stands there
    assert settings["select_top_k"] == 4
    assert settings["per_gate"] == {gate: {"select_top_k": 1} for gate in gate_names()}
    assert SereConfig(**settings).for_gate("another").resolved_top_k(4) == 4
    nothing = sere(checkpoint, "sweep", "--per-layer", "--batch", 4, "--select-top-k", "1", "--budget", -99)
    assert f"left as they are: {', '.join(gate_names())}" in nothing.output


def test_too_few_data_are_said_to_be(checkpoint):
    """One decoding batch has no error, so that nothing is recommended; the command says how many would do."""
    result = sere(checkpoint, "sweep", "--batch", "8", "--select-top-k", "1", "--budget", 1e9)
    assert "decode batch 8: no setting is shown to stay within 1e+09 % perplexity" in result.output
    assert "too few data for options={'select_top_k': 1}" in result.output
    assert "about --sequences 64 would decide" in result.output


@pytest.mark.slow
def test_each_value_is_taken_once(checkpoint):
    result = sere(checkpoint, "sweep", "--batch", "4,4", "--select-top-k", "1,1", "--threshold", "0,0.0")
    assert result.output.count("| reroute |") == 1
    budgets = sere(checkpoint, "sweep", "--batch", 4, "--select-top-k", "", "--max-active", 6)
    assert budgets.exit_code == 0, budgets.output
    assert "| auto, 6 active |" in budgets.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch", 4], "has decode steps at batch 2, but not at 4"),
        (["--batch", 2], "is of another model, tiny, with 3 layers"),
        (["--per-layer", "--batch", 2], "--per-layer takes one --threshold and one --substitution, and neither"),
    ],
)
def test_times_that_do_not_fit_are_refused_before_any_work(checkpoint, tmp_path, more, message):
    bench = measured(tmp_path / "bench.json", [2], layers=3)
    result = sere(checkpoint, "sweep", "--select-top-k", 1, "--speed", bench, *more)
    assert result.exit_code != 0
    assert message in result.output
    assert "evaluating" not in result.output
