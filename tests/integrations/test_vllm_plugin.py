"""What the plug-in writes into the engine's log, without an engine."""

from types import SimpleNamespace

from sere_compile.gate_stats import GateStats
from sere_compile.integrations.vllm.plugin import summary


def test_a_line_of_statistics_is_of_batches_that_were_re_routed():
    """Until there is one, it gives no number of experts."""
    gates = {"a": GateStats(2, 8, 16, 5, 12, 4), "b": GateStats(2, 8, 16, 5, 14, 6)}
    assert summary(gates, SimpleNamespace(forwards=3, active_forwards=2)) == (
        "SERE: active experts 6.5 -> 2.5 per layer and re-routed batch, 2 of 3 batches re-routed"
    )
    none = {"a": GateStats(0, 0, 0, 0, 0, 0)}
    assert summary(none, SimpleNamespace(forwards=3, active_forwards=0)) == (
        "SERE: none of 3 batches was re-routed so far"
    )
