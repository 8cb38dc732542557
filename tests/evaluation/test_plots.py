"""The front of a sweep."""

from __future__ import annotations

from sere_compile.evaluation.plots import pareto_front

from .rows import row


def test_the_front_has_no_beaten_row():
    rows = [row(4, 5.0, 0.02), row(4, 6.0, 0.03), row(4, 7.0, 0.001), row(4, 7.0, 0.002)]
    assert pareto_front(rows) == [rows[0], rows[2]]
