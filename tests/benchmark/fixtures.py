"""A tiny model, and a machine without a GPU: real variants and comparison of outputs, no clock and no CUDA graph."""

import types

import pytest
import torch

from sere_compile.benchmark import decode_step, gating, moe_layer, run, variant
from sere_compile.benchmark.timing import Timing

from .made import TINY, UNSORTED, results_of, tiny


@pytest.fixture(scope="module")
def subject():
    return tiny(TINY)


@pytest.fixture(scope="module")
def unsorted():
    return tiny(UNSORTED)


@pytest.fixture
def without_gpu(monkeypatch):
    """Graphs are plain calls; every variant takes 10 us, ours 5."""

    def capture(function, inputs, outputs=None):
        def replay():
            results = [function(x) for x in inputs]
            if outputs is not None:
                outputs[:] = results

        return types.SimpleNamespace(replay=replay)

    def time_in_turn(runs, calls, rounds, warmup=3, before=lambda name: None):
        for name, call in runs.items():
            before(name)
            getattr(call, "replay", call)()
        return {name: Timing(5.0 if "sere" in name else 10.0, 1.0, 20.0) for name in runs}

    monkeypatch.setattr(variant, "INNER", "eager")
    for module in (variant, decode_step):
        monkeypatch.setattr(module, "capture", capture)
    for module in (gating, moe_layer, decode_step):
        monkeypatch.setattr(module, "time_in_turn", time_in_turn)
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def bench(subject, without_gpu):
    """Run some kinds with batch 5 and S = 1."""

    def run_kinds(kinds, stock):
        results = results_of([])
        run.run_bench(results, subject, kinds, [5], [1], stock, lambda _: None)
        return results

    return run_kinds
