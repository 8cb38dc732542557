"""A kind that fails costs nothing else."""

import pytest
from torch._dynamo.exc import BackendCompilerFailed

from sere_compile import SereError
from sere_compile.benchmark import run

from .made import results_of


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_cannot_be_measured_costs_nothing_else(subject, without_gpu, bench, monkeypatch, wrapped):
    """A kind that the model does not allow is told, also where a compiler wrapped our refusal; the others are there."""

    def refuses(*_):
        error = SereError("no cache of ours")
        raise BackendCompilerFailed(lambda: None, error, None) if wrapped else error

    monkeypatch.setitem(run.KINDS, "decode", refuses)
    results = bench(["decode", "gating"], ["grouped_mm"])
    assert {row.what for row in results.rows} == {"gating", "without gating"}
    [failure] = results.failures
    assert failure.startswith("decode, batch 5: ")
    assert "no cache of ours" in failure
    assert f"\nNot measured: {failure}\n" in results.table()


def test_other_errors_leave_what_was_measured(subject, without_gpu, monkeypatch):
    """An error that is none of ours is not hidden, and the rows before it stand in the results."""
    results = results_of([])
    monkeypatch.setitem(run.KINDS, "decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.run_bench(results, subject, ["gating", "decode"], [5], [1], ["grouped_mm"], lambda _: None)
    assert results.rows[0].what == "gating"
