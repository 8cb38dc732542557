"""A sweep: its settings and rows, the recommendation, a budget spent gate by gate, the file."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sere_compile import Evaluation, EvaluationError, OutputError, SereConfig, SimilarityProfile
from sere_compile.evaluation import sweep as sweeping
from sere_compile.evaluation.configured import ConfiguredRule
from sere_compile.evaluation.pareto_plot import plot_sweep
from sere_compile.evaluation.result import student
from sere_compile.evaluation.sweep import (
    GateSettings,
    PerGate,
    SweepRow,
    format_table,
    read_csv,
    settings,
    spend_budget,
    sweep,
    whole_batches,
    write_csv,
)

from .decisions import decisions, matrices
from .rows import row


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({}, {"select_top_k": 1}),
        ({"threshold": "0.5"}, {"select_top_k": 1, "threshold": 0.5}),
        ({"threshold": "q0.2", "rule": "projection"},
         {"select_top_k": 1, "threshold": "q0.2", "substitution": "projection"}),
        ({"select_top_k": "auto", "max_active": "7"}, {"select_top_k": "auto", "max_active": 7}),
    ],
)  # fmt: skip
def test_a_row_says_what_to_give_the_backend(columns, options):
    found = replace(row(4, 5.0, 0.02), **columns).options
    assert found == options
    SereConfig(**found)


def test_rules_per_gate_say_how_many_experts_a_token_has():
    rule, batch = PerGate({}), decisions()
    assert rule(batch)[0] is batch.ids
    assert rule.top_k == {"gate": batch.ids.shape[-1]}


def test_what_a_step_gains():
    """Experts saved per growth of perplexity; what costs nothing is ahead, by what it saves."""

    def gain(active, perplexity):
        return sweeping._gain(result(10.0, 8.0), result(perplexity, active))

    dear, cheap, free, more_free = gain(6.0, 12.0), gain(6.0, 11.0), gain(7.0, 10.0), gain(5.0, 9.0)
    assert dear < cheap < free < more_free
    assert cheap == (False, 2.0)
    assert gain(8.0, 9.0)[0] is False, "what saves nothing is no free step"
    assert gain(5.0, 10.0) > gain(7.0, 9.0), "no cost at all is free, too: then what is saved decides"


@pytest.mark.parametrize("write", [write_csv, plot_sweep])
def test_a_full_disk_leaves_the_earlier_file(tmp_path, no_room, write):
    if write is plot_sweep:
        pytest.importorskip("matplotlib")
    out = tmp_path / "sweep.png"
    out.write_bytes(b"old")
    with no_room(), pytest.raises(OutputError, match=r"sweep.png could not be written: File too large"):
        write([row(4, 5.0, 0.02)], out)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"sweep.png": b"old"}


def result(perplexity, active, losses=()):
    return Evaluation(perplexity, 10.0, 0.25, 0.5, {"a": 8.0}, {"a": active}, 5, 4, losses, (1.0,) * len(losses))


def test_a_row_is_a_setting_and_its_result():
    config = SereConfig(select_top_k="auto", max_active=6, threshold=0.25, substitution="projection")
    found = SweepRow.of(config, result(11.0, 4.0, (1.0, 2.0)), similarity="cka")
    assert found == SweepRow(
        "projection",
        "cka",
        "auto",
        "6",
        "0.25",
        4,
        11.0,
        pytest.approx(0.1),
        pytest.approx(0.55),
        0.25,
        0.5,
        8.0,
        4.0,
        2,
    )
    plain = SweepRow.of(SereConfig(threshold="q0.2"), result(11.0, 4.0), rule="mine")
    assert (plain.rule, plain.similarity, plain.select_top_k) == ("mine", "", "default")
    assert (plain.max_active, plain.threshold) == ("", "q0.2")
    assert SweepRow.of(SereConfig(select_top_k=2), result(11.0, 4.0)).select_top_k == "2"


@pytest.mark.parametrize(
    ("columns", "label"),
    [
        ({}, "S = 1, reroute"),
        ({"select_top_k": "auto", "max_active": "7", "threshold": "q0.2"}, "auto, at most 7, reroute, rho q0.2"),
        ({"rule": "fill", "threshold": "0.5", "similarity": "cka"}, "S = 1, fill, cka, rho 0.5"),
    ],
)
def test_a_row_has_a_short_name(columns, label):
    assert replace(row(4, 5.0, 0.02), **columns).label == label


def test_settings_are_all_combinations():
    found = settings(
        [1, 2],
        [6],
        [0.0, "q0.2"],
        ["reroute", "projection"],
        SereConfig(select_top_k="auto", max_active=3, max_tokens=9),
    )
    assert len(found) == len(set(found)) == 3 * 2 * 2
    assert {(c.select_top_k, c.max_active) for c in found} == {(1, None), (2, None), ("auto", 6)}
    assert {c.max_tokens for c in found} == {9}
    assert {(c.threshold, c.substitution) for c in found} == {
        (rho, how) for rho in (0.0, "q0.2") for how in ("reroute", "projection")
    }
    assert settings([1]) == [SereConfig(select_top_k=1)]


def test_whole_batches():
    tokens = torch.arange(7)[:, None]
    assert whole_batches(tokens, 3).flatten().tolist() == list(range(6))
    assert len(whole_batches(tokens, 7)) == 7
    with pytest.raises(EvaluationError, match="7 sequences do not make one decoding batch of 8"):
        whole_batches(tokens, 8)


def test_every_setting_at_every_decode_batch(monkeypatch):
    """With as many sequences as make whole decoding batches."""
    asked = []

    def evaluated(model, tokens, rules, *, decode_batch, progress):
        asked.append((len(tokens), decode_batch, list(rules.values())))
        return {name: replace(result(11.0, 4.0), decode_batch=decode_batch) for name in rules}

    monkeypatch.setattr(sweeping, "evaluate_rules", evaluated)
    configs = settings([1, 2])
    profile = SimilarityProfile(matrices(), {"method": "cka"})
    rows = sweep(None, torch.zeros(9, 2), profile, configs, (4, 2))
    assert [(n, batch) for n, batch, _ in asked] == [(8, 4), (8, 2)]
    assert [rule.config for rule in asked[0][2]] == configs
    assert [(r.decode_batch, r.select_top_k, r.similarity) for r in rows] == [
        (4, "1", "cka"), (4, "2", "cka"), (2, "1", "cka"), (2, "2", "cka"),
    ]  # fmt: skip
    assert {r.similarity for r in sweep(None, torch.zeros(9, 2), matrices(), configs, (4,))} == {""}
    filled = settings([1], substitutions=["fill"])
    assert {r.similarity for r in sweep(None, torch.zeros(9, 2), profile, filled, (4,))} == {""}  # it uses none


def test_a_rule_for_each_gate():
    batch = decisions()
    one = ConfiguredRule(SereConfig(select_top_k=1), matrices())
    for got, wanted in zip(PerGate({"gate": one})(batch), one(batch), strict=True):
        assert torch.equal(got, wanted)
    ids, weights = PerGate({"other": one})(batch)
    assert ids is batch.ids
    assert weights is batch.weights


class Costs:
    """Stands for a model: every step down of a gate saves experts and costs perplexity, as a table says."""

    def __init__(self):
        self.saved = {"a": {2: 1.0, 1: 2.0}, "b": {2: 3.0, 1: 4.0}}
        self.lost = {"a": {2: 0.1, 1: 0.2}, "b": {2: 0.2, 1: 1.5}}
        self.asked = []

    def __call__(self, model, tokens, rules, *, decode_batch, progress):
        assert (len(tokens), decode_batch) == (4, 4)
        found = {}
        for name, per_gate in rules.items():
            chosen = {gate: rule.config.select_top_k for gate, rule in per_gate.rules.items()}
            self.asked.append(chosen)
            active = 8.0 - sum(self.saved[gate][s] for gate, s in chosen.items())
            found[name] = result(10.0 + sum(self.lost[gate][s] for gate, s in chosen.items()), active, (1.0, 1.0))
        return found


def spent(monkeypatch, budget, costs=None, select_top_k=(1, 2, 2)):
    costs, steps = costs or Costs(), []
    monkeypatch.setattr(sweeping, "evaluate_rules", costs)
    similarity = {"a": torch.eye(8), "b": torch.eye(8)}
    state = spend_budget(
        None, torch.zeros(5, 2), similarity, budget=budget, select_top_k=select_top_k, decode_batch=4,
        on_step=steps.append,
    )  # fmt: skip
    return state, steps, costs.asked


def test_a_budget_goes_where_it_saves_most(monkeypatch):
    """15 experts per unit of perplexity first, then 10, while it lasts."""
    state, steps, asked = spent(monkeypatch, 0.0401)
    assert [dict(step.select_top_k) for step in steps] == [{"b": 2}, {"b": 2, "a": 2}, {"b": 2, "a": 1}]
    assert asked[0] == {}
    assert asked[1:3] == [{"a": 2}, {"b": 2}]
    assert state is steps[-1]
    assert state.result.perplexity == pytest.approx(10.4)
    assert replace(state, top_k={"a": 4, "b": 4}).options() == {
        "select_top_k": 4,
        "per_gate": {"b": {"select_top_k": 2}, "a": {"select_top_k": 1}},
    }


def test_a_budget_that_is_just_enough_and_one_that_is_not(monkeypatch):
    assert dict(spent(monkeypatch, 0.0201)[0].select_top_k) == {"b": 2}
    state, steps, _ = spent(monkeypatch, 0.001)
    assert (dict(state.select_top_k), steps) == ({}, [])
    assert dict(spent(monkeypatch, 9.0)[0].select_top_k) == {"a": 1, "b": 1}


def test_steps_that_cost_nothing_come_first(monkeypatch):
    costs = Costs()
    costs.lost = {"a": {2: -0.1, 1: 0.2}, "b": {2: 0.001, 1: 1.5}}
    assert dict(spent(monkeypatch, 0.0005, costs)[1][0].select_top_k) == {"a": 2}


def test_a_budget_needs_values_of_s(monkeypatch):
    with pytest.raises(EvaluationError, match="select_top_k has no values to go through"):
        spent(monkeypatch, 0.1, select_top_k=())
    assert GateSettings({}, result(10.0, 8.0), {"a": 8}).options() == {"select_top_k": 8, "per_gate": {}}


def test_a_file_gives_the_rows_back(tmp_path):
    timed = {"step_ms": 1 / 3, "speedup": 1.5}
    rows = [row(4, 5.0, 0.02), replace(row(8, 6.5, -0.01), rule="fill", threshold="q0.2", max_active="7", **timed)]
    write_csv(rows, tmp_path / "sweep.csv")
    assert read_csv(tmp_path / "sweep.csv") == rows
    write_csv([], tmp_path / "none.csv")
    with pytest.raises(EvaluationError, match=r"none\.csv has no rows"):
        read_csv(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"other\.csv is not a table that `sere sweep` wrote"):
        read_csv(tmp_path / "other.csv")


def test_a_table():
    """A budget is named as one; where there is no standard error there is none."""
    rows = [
        replace(row(4, 5.0, 0.02), standard_error=0.001, similarity="cka"),
        replace(row(4, 5.0, 0.02), standard_error=math.nan, select_top_k="auto", max_active="7"),
    ]
    head, rule, first, second = format_table(rows).splitlines()
    assert head.startswith("| rule | similarity | S | threshold | decode batch |")
    assert rule == "| --- " * 10 + "|"
    assert first == "| reroute | cka | 1 | 0 | 4 | 1.000 | +2.00% ± 0.10% | 0.0000 | 100.0% | 9.0 -> 5.0 |"
    assert second == "| reroute |  | auto, 7 active | 0 | 4 | 1.000 | +2.00% | 0.0000 | 100.0% | 9.0 -> 5.0 |"


@pytest.mark.parametrize(("degrees", "expected"), [(1, 6.314), (5, 2.015), (11, 1.796), (30, 1.697), (10**6, 1.6449)])
def test_quantiles_of_student(degrees, expected):
    assert student(degrees) == pytest.approx(expected, abs=0.01)


def test_tables_of_earlier_versions_are_read(tmp_path):
    """They say neither how many batches were measured, nor of which model and text, nor what to expect of time."""
    path = tmp_path / "sweep.csv"
    write_csv([row(4, 5.0, 0.02)], path)
    lines = [line.rsplit(",", 6)[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines))
    assert read_csv(path) == [row(4, 5.0, 0.02, batches=0)]


def test_gates_that_are_left_alone_keep_their_k():
    """The options say so with K, not with a number that no K reaches."""
    done = GateSettings({"a": 1}, None, {"a": 4, "b": 4, "c": 2})
    assert done.options() == {"select_top_k": 4, "per_gate": {"c": {"select_top_k": 2}, "a": {"select_top_k": 1}}}
    assert GateSettings({"a": 1}, None, {"a": 4}).options()["select_top_k"] == 4


def test_a_table_has_expected_times_where_some_are_known():
    timed = row(4, 5.0, 0.02, step_ms=12.345, speedup=1.5, over_stock=2.0)
    head, _, first, second = format_table([timed, replace(timed, over_stock=None)]).splitlines()
    assert head.endswith("| active experts | expected ms per step | over no re-routing | over stock |")
    assert first.endswith("| 9.0 -> 5.0 | 12.3 | 1.50x | 2.00x |")
    assert second.endswith("| 9.0 -> 5.0 | 12.3 | 1.50x |  |")
    assert timed.speed == "12.3 ms per step, 1.50x over no re-routing, 2.00x over stock"
    assert row(4, 5.0, 0.02).speed == ""


def test_rows_keep_the_losses_of_their_batches():
    """Which differences between rules are measured by; equal settings stay equal rows."""
    found = SweepRow.of(SereConfig(select_top_k=2), result(11.0, 4.0, (1.0, 2.0)))
    assert found.losses == (1.0, 2.0)
    assert found == replace(found, losses=())
