"""`sere compare` on a checkpoint."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from sere_compile.cli import main
from sere_compile.evaluation.sweep import read_csv

from .checkpoint import sere


def test_compare_runs_every_rule(checkpoint, tmp_path, monkeypatch):
    """Those of docs/quality.md, and one of the user's own; nothing is lost at S = K."""
    (tmp_path / "own.py").write_text(
        "from sere_compile.evaluation import TopS\ndef last_resort(profile, s): return TopS(s)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "rows.csv"
    options = ["--batch", 4, "--select-top-k", "1,4", "--fill", "1", "--csv", out, "--rule", "own:last_resort"]
    result = sere(checkpoint, "compare", *options)
    assert result.exit_code == 0, result.output
    rows = {(row.rule, row.similarity, row.select_top_k): row for row in read_csv(out)}
    assert {"naive top-S", "drop", "drop, renormalised", "opportunistic fill", "fill", "reroute", "projection"} < {
        rule for rule, _, _ in rows
    }
    assert rows["own:last_resort", "profile", "1"].kl == rows["naive top-S", "", "1"].kl > 0
    assert ("reroute", "random 2", "1") in rows
    # Of the rules that recombine, those with substitutes need the outputs' inner products.
    needs = {(row.rule.partition(", fill")[0].endswith("substitutes"), row.similarity) for row in rows.values()
             if row.rule.startswith("recombine") and "one substitute" not in row.rule}  # fmt: skip
    assert needs == {(False, ""), (True, "inner products")}
    assert all(row.kl == 0 for (_, _, select), row in rows.items() if select == "4")
    twice = sere(checkpoint, "compare", "--calibrate-on", checkpoint / "text.jsonl")
    assert twice.exit_code == 2
    assert "either --profile or --calibrate-on" in twice.output
    unknown = sere(checkpoint, "compare", "--rule", "nowhere:rule")
    assert "'nowhere:rule' is not MODULE:FUNCTION" in unknown.output


@pytest.mark.slow
def test_compare_calibrates_by_itself(checkpoint):
    """One command from a model and texts to the whole table."""
    text = checkpoint / "text.jsonl"
    options = ["--model", checkpoint / "model", "--data", text, "--calibrate-on", text, "--calibration-sequences", 2]
    options += ["--length", 6, "--sequences", 4, "--batch", 4, "--select-top-k", 1]
    result = CliRunner().invoke(main, ["compare", *map(str, options)])
    assert result.exit_code == 0, result.output
    rows = [line.split(" | ")[:2] for line in result.stdout.splitlines()[2:]]
    for similarity in ("frobenius", "cosine", "cka", "data-free", "random 0"):
        assert ["| reroute", similarity] in rows
        assert ["| projection", similarity] in rows
