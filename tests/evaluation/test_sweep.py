"""Rows of a sweep: options, recommendation, file."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, nan

import pytest

from sere_compile import OutputError, SereConfig
from sere_compile.evaluation.plots import plot_sweep
from sere_compile.evaluation.result import student
from sere_compile.evaluation.sweep import GateSettings, read_csv, recommend, undecided, write_csv

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


@pytest.mark.parametrize("write", [write_csv, plot_sweep])
def test_a_full_disk_leaves_the_earlier_file(tmp_path, no_room, write):
    if write is plot_sweep:
        pytest.importorskip("matplotlib")
    out = tmp_path / "sweep.png"
    out.write_bytes(b"old")
    with no_room(), pytest.raises(OutputError, match=r"sweep.png could not be written: File too large"):
        write([row(4, 5.0, 0.02)], out)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"sweep.png": b"old"}


def test_the_recommendation_is_the_fewest_experts_within_the_budget():
    rows = [row(4, 5.0, 0.02), row(4, 6.0, 0.008), row(4, 7.0, 0.001), row(8, 5.0, 0.5)]
    assert recommend(rows, 0.01) == {4: rows[1], 8: None}


def test_the_recommendation_counts_its_error():
    """A mean within the budget is no evidence, if its error is larger than what is left of the budget."""
    lucky, safe = row(16, 3.0, 0.0074, error=0.0217, batches=4), row(16, 5.0, -0.0103, error=0.004, batches=4)
    assert recommend([lucky, safe], 0.01) == {16: safe}
    assert safe.upper_bound == pytest.approx(-0.0103 + 2.353 * 0.004)
    # 1.645 times the spread over the root of the number of batches is to be what the budget leaves.
    assert undecided([lucky, safe], 0.01) == {16: (lucky, 16 * ceil((1.6449 * 0.0434 / 0.0026) ** 2))}


def test_one_batch_has_no_error_and_recommends_nothing():
    alone = row(64, 3.0, 0.001, error=nan, batches=1)
    assert recommend([alone], 0.01) == {64: None}
    assert undecided([alone], 0.01) == {64: (alone, 8 * 64)}


@pytest.mark.parametrize(("degrees", "expected"), [(1, 6.314), (5, 2.015), (11, 1.796), (30, 1.697), (10**6, 1.6449)])
def test_quantiles_of_student(degrees, expected):
    assert student(degrees) == pytest.approx(expected, abs=0.01)


def test_tables_of_earlier_versions_are_read(tmp_path):
    """They do not say how many batches were measured."""
    path = tmp_path / "sweep.csv"
    write_csv([row(4, 5.0, 0.02)], path)
    lines = [line.rpartition(",")[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines))
    assert read_csv(path) == [row(4, 5.0, 0.02, batches=0)]


def test_gates_that_are_left_alone_keep_their_k():
    """The options say so with K, not with a number that no K reaches."""
    done = GateSettings({"a": 1}, None, {"a": 4, "b": 4, "c": 2})
    assert done.options() == {"select_top_k": 4, "per_gate": {"c": {"select_top_k": 2}, "a": {"select_top_k": 1}}}
    assert GateSettings({"a": 1}, None, {"a": 4}).options()["select_top_k"] == 4
