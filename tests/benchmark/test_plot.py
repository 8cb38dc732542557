"""The picture of a result."""

import pytest

from .made import results_of, results_row


def test_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from sere_compile.benchmark.plot import plot

    plot(
        results_of([results_row(batch=b, what=w) for b in (8, 32) for w in ("MoE layer", "gating")]), tmp_path / "p.png"
    )
    assert (tmp_path / "p.png").stat().st_size > 1000
