"""Rows of a sweep: options, recommendation, file."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sere_compile import OutputError, SereConfig
from sere_compile.evaluation.plots import plot_sweep
from sere_compile.evaluation.sweep import recommend, write_csv

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
