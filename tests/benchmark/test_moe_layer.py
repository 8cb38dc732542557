"""One MoE layer, compared before it is timed."""

import pytest

from sere_compile.benchmark import gating, moe_layer


@pytest.mark.parametrize(
    "bench", [gating.bench_gating, pytest.param(moe_layer.bench_moe_layer, marks=pytest.mark.slow)]
)
def test_an_unsorted_router(unsorted, without_gpu, bench):
    """The reference ranks by score where the router does not; shared experts are read in every call."""
    rows = bench(unsorted, 5, [4, 2, 1], ["grouped_mm"], 1e12)
    assert all(row.error is None or row.error < 1e-4 for row in rows)
    if rows[0].what == "MoE layer":
        active = [row.active for row in rows if row.ours][2]
        # Of 3 projections of 96 x 16: experts, two shared ones, and a router of 16 x 96.
        assert rows[4].bytes_read == pytest.approx((3 * (active + 2) + 1) * 96 * 16 * 4)


def test_a_comparison_that_cannot_tell_is_noted(subject, without_gpu, bench, monkeypatch):
    """Where the outputs of S = 1 and S = K are nearer than the tolerance, re-routing nothing would pass."""
    monkeypatch.setattr(moe_layer, "TOLERANCE", 10.0)
    results = bench(["layer"], ["grouped_mm"])
    assert [note for note in results.notes if "MoE layer, batch 5: the reference of S=1 is" in note]
