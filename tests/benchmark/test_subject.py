"""Models that cannot be measured are refused by name."""

import pytest

from sere_compile import SereError
from sere_compile.benchmark import gating, moe_layer


@pytest.mark.parametrize("bench", [gating.bench_gating, moe_layer.bench_moe_layer])
def test_a_router_without_ids(subject, without_gpu, bench, monkeypatch):
    """Its experts choose by themselves: nothing to compare with, and the user is told so."""
    router = subject.blocks[-1].module.get_submodule("gate")
    monkeypatch.setattr(router, "forward", lambda hidden: (hidden,))
    with pytest.raises(SereError, match="Qwen3MoeTopKRouter, returns no expert ids"):
        bench(subject, 5, [1], ["grouped_mm"], 1e12)
