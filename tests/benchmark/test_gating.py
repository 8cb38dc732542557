"""Gating alone, over the router."""

from sere_compile.benchmark import gating

from .made import results_of


def test_gating_is_compared_over_the_router_alone(subject, without_gpu):
    """Experts of 8 x 8 are enough for the pass to see a gate; strict=True would raise."""
    rows = gating.bench_gating(subject, 5, [4, 1], ["grouped_mm", "batched_mm"], 1e12)
    names = ["eager", "inductor", "sere S=K", "sere S=1", "inductor, all but the gating"]
    assert [row.variant for row in rows] == names
    assert max(row.error for row in rows[:-1]) < 1e-5
    assert rows[-1].error is None
    assert [results_of(rows).speedup(row) for row in rows] == [None, None, 2.0, 2.0, None]
