"""Settings, rows and their table, and what becomes of engines that fail; engines are made up."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from sere_compile import ConfigError
from sere_compile.benchmark import serving
from sere_compile.benchmark.serving import ALL, ALONE, Job, ServingResults, ServingRow, settings_of
from sere_compile.integrations.vllm.processes import OUT_OF_TIME, USAGE, Ended

from ..evaluation.rows import row as sweep_row

SETTINGS = settings_of([ALL, 1], ["reroute", "fill"], {"min_active": 0})


def results(**changes):
    given = {"model": "m", "machine": "a GPU", "engine": ["--dtype", "half"], "prompts": "8 tokens", "quality": "t.txt"}
    return ServingResults(**{**given, **changes})


def made_rows():
    loss = sweep_row(8, 5.0, 0.02, error=0.001)
    return [
        ServingRow(8, ALONE, None, (8.0, 9.0, 9.5), 100.0),
        ServingRow(8, "S = 1, reroute", {"select_top_k": 1}, (4.0, 4.5, 4.6), 200.0, (20.0, 8.0), loss),
        ServingRow(32, "S = 1, reroute", {"select_top_k": 1}, (4.0, 4.5, 4.6), 200.0),
    ]


def test_every_s_with_every_rule_and_k_once():
    assert [setting.name for setting in SETTINGS] == [ALONE, "S = K", "S = 1, reroute", "S = 1, fill"]
    assert SETTINGS[0].sere is None
    assert SETTINGS[3].sere == {"min_active": 0, "select_top_k": 1, "substitution": "fill"}
    assert [setting.reroutes for setting in SETTINGS] == [False, False, True, True]


def test_the_table_says_what_is_won_and_lost():
    table = results(rows=made_rows(), left_out=["S = 2: out of time"], notes=["a note"]).table()
    assert table.startswith("model: m; a GPU\nengine: --dtype half; 8 tokens\nquality: t.txt\n")
    assert (
        "| 8 | S = 1, reroute | 4.50 [4.00 .. 4.60] | 2.00x | 200 | 20.0 -> 8.0 | +2.00% ± 0.10% | 100.0% |"
    ) in table
    assert "| 32 | S = 1, reroute | 4.50 [4.00 .. 4.60] |  | 200 |  |  |  |" in table, "no vLLM alone to compare with"
    assert table.endswith("Left out: S = 2: out of time\nNote: a note")


def test_without_losses_the_table_has_no_columns_for_them():
    assert "perplexity" not in results(rows=made_rows()[:1]).table()


def test_a_speed_up_within_the_spread_is_marked():
    rows = [ServingRow(8, ALONE, None, (8.0, 9.0, 9.5), 1.0), ServingRow(8, "S = 1, fill", {}, (7.0, 8.5, 8.6), 1.0)]
    assert results(rows=rows).said_speedup(rows[1]) == "1.06x (runs overlap)"


def test_runs_that_are_far_apart_are_said_to_be():
    """The median of noise may even be negative: then there is no speed-up."""
    rows = [*made_rows()[:2], ServingRow(8, "S = 1, fill", {}, (-1.0, -0.5, 0.5), 1.0)]
    found = results(rows=rows)
    assert found.speedup(rows[2]) is None
    assert found.noisy()[0].startswith("runs of S = 1, fill at batch 8 are more than 25% of their median apart")
    assert results(rows=rows[:2]).noisy() == []


def test_the_file_has_speed_ups_and_no_nan(tmp_path):
    rows = made_rows()
    rows[1] = ServingRow(8, "S = 1, fill", {}, (4.0, 4.5, 4.6), 1.0, loss=sweep_row(8, 5.0, 0.02, error=float("nan")))
    results(rows=rows).save(tmp_path / "r.json")
    saved = json.loads((tmp_path / "r.json").read_text())
    assert [row["speedup"] for row in saved["rows"]] == [None, 2.0, None]
    assert saved["rows"][1]["loss"]["standard_error"] is None
    assert saved["rows"][1]["loss"]["perplexity_change"] == 0.02


# What engines found


class Engines:
    """In place of processes: by name, what is found or how it fails."""

    def __init__(self, **fail):
        self.fail, self.told = fail, []

    def __call__(self, module, case, seconds, log):
        self.told.append((module, case))
        done = {"8": [1.0, 2.0, 3.0], "32": [2.0, 3.0, 4.0]}
        found = {
            "time": {"ms": done, "tokens_per_s": {"8": 10.0, "32": 20.0}, "machine": "a GPU", "dtype": "bfloat16"},
            "count": {"active": {"8": [20.0, 8.0], "32": None}},
        }.get(case.get("kind", ""), {"about": "a text", "rows": self.losses(case)})
        status, part = self.fail.get(case["name"], (0, True))
        if part == "first":
            found = {**found, "ms": {"8": done["8"]}}
        reason = "" if status == 0 else f"because of {status}"
        return Ended([found if part else None], status, reason, [])

    @staticmethod
    def losses(case):
        return [
            asdict(sweep_row(batch, 5.0, batch / 100, rule=sere["substitution"]))
            for batch in (8, 32)
            for sere in case.get("settings", [])
        ]


def measured(tmp_path, monkeypatch, engines, quality=True, count=True, seconds=1000.0):
    (tmp_path / "log").write_text("\n=== x\nSERE: said this\n")
    monkeypatch.setattr(serving, "run_processes", engines)
    found = results(machine="", quality="not measured: a reason")
    job = Job({"model": "m", "batches": [8, 32]}, {"model": "m"} if quality else None, SETTINGS, count,
              time.monotonic() + seconds, Path(tmp_path / "log"))  # fmt: skip
    serving.measure(job, found, lambda line: None)
    return found


def test_every_engine_is_a_process_and_rows_hold_what_all_found(tmp_path, monkeypatch):
    engines = Engines()
    found = measured(tmp_path, monkeypatch, engines)
    assert [(module, case["name"]) for module, case in engines.told] == [
        (serving.ENGINE, ALONE), (serving.ENGINE, "S = K"), (serving.ENGINE, "S = 1, reroute"),
        (serving.ENGINE, "S = 1, fill"), (serving.ENGINE, "S = 1, reroute, active experts"),
        (serving.ENGINE, "S = 1, fill, active experts"), (serving.QUALITY, "quality"),
    ]  # fmt: skip
    assert engines.told[-1][1]["dtype"] == "bfloat16", "losses are of the type that engines compute in"
    assert [(row.batch, row.variant) for row in found.rows[:5]] == [*((8, s.name) for s in SETTINGS), (32, ALONE)]
    assert (found.machine, found.quality, found.left_out) == ("a GPU", "a text", [])
    fill = found.rows[3]
    assert (fill.ms, fill.active, fill.loss.rule) == ((1.0, 2.0, 3.0), (20.0, 8.0), "fill")
    assert found.rows[1].loss is None
    assert found.notes[1:] == ["SERE: said this"]
    assert "measure again on a quiet machine" in found.notes[0]


def test_an_engine_that_fails_is_left_out_with_its_reason(tmp_path, monkeypatch):
    """The others go on; of one that fails later, what it had found stays."""
    engines = Engines(**{"S = 1, fill": (1, False), "S = K": (OUT_OF_TIME, "first")})
    found = measured(tmp_path, monkeypatch, engines)
    assert [row.variant for row in found.rows] == [ALONE, "S = K", "S = 1, reroute", ALONE, "S = 1, reroute"]
    assert found.left_out == ["S = K at batch 32: because of out of time", "S = 1, fill: because of 1"]
    assert "S = 1, fill, active experts" not in [case["name"] for _, case in engines.told]


def test_a_loss_that_fails_leaves_the_times(tmp_path, monkeypatch):
    found = measured(tmp_path, monkeypatch, Engines(quality=(1, False)))
    assert len(found.rows) == 8
    assert not found.has_losses
    assert found.quality == "not measured: because of 1"
    assert found.left_out == ["quality: because of 1"]


def test_what_is_not_asked_for_is_not_run(tmp_path, monkeypatch):
    engines = Engines()
    found = measured(tmp_path, monkeypatch, engines, quality=False, count=False)
    assert [case["name"] for _, case in engines.told] == [setting.name for setting in SETTINGS]
    assert (found.quality, found.left_out) == ("not measured: a reason", [])


def test_without_time_nothing_is_started(tmp_path, monkeypatch):
    engines = Engines()
    found = measured(tmp_path, monkeypatch, engines, seconds=serving.LEAST_SECONDS - 1)
    assert (engines.told, found.rows) == ([], [])
    assert found.left_out == [f"{setting.name}: no time left" for setting in SETTINGS] + ["quality: no time left"]


def test_an_option_that_vllm_does_not_know_ends_all(tmp_path, monkeypatch):
    engines = Engines(**{ALONE: (USAGE, False)})
    with pytest.raises(ConfigError, match="nor vLLM's engine takes what it was given: because of 2"):
        measured(tmp_path, monkeypatch, engines)
    assert len(engines.told) == 1
