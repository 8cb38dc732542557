"""Drawn programs through the product: a small sample in the lane `slow`, 2,000 in the lane `generated`.

A failure is shrunk to a minimal program and printed with the command that shows it again.
"""

import gc
import logging
import os
import warnings

import pytest
import torch

from .conftest import FRESH
from .draws import drawn, judged
from .failures import describe, sort_failures
from .program import GATE, LOOK_ALIKE
from .table import Judged, summary

# Programs of one test: enough that a chunk of gates without any that is re-routed means something.
CHUNK, CHUNKS = 50, 10
# Of the lane `slow`: half a minute. A gate costs as much as three look-alikes.
SAMPLE = {GATE: 6, LOOK_ALIKE: 12}
KINDS = (GATE, LOOK_ALIKE)


@pytest.fixture(scope="module", autouse=True)
def economical():
    """One thread, no warnings of torch, and a heap whose old part is scanned no more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    gc.collect()
    gc.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    gc.unfreeze()
    logger.setLevel(level)
    torch.set_num_threads(threads)


def check(kind, first, count):
    """Judge programs in a row; the minimal form of the first failure is the message."""
    results = []
    for seed in range(first, first + count):
        program = drawn(kind, seed)
        results.append(Judged(program, judged(program)))
    failed = [result for result in results if result.verdict.failed]
    if failed:
        forms, _ = sort_failures(failed[:1], judged, most=1, tell=lambda text: None)
        seeds = ", ".join(f"{result.program.seed}: {result.verdict.word}" for result in failed)
        pytest.fail(f"{len(failed)} of {count} {kind}s ({seeds})\n\n{describe(forms[0])}", pytrace=False)
    assert sum(result.verdict.told_nothing for result in results) <= count / 4, summary(results)
    if kind == GATE:
        assert any(sum(result.verdict.rerouted) and result.verdict.rerouted[0] for result in results), summary(results)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sample(kind):
    """The same programs each time."""
    check(kind, 0, SAMPLE[kind])


@pytest.mark.generated
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_fixed(kind, chunk):
    """The same programs each time, many."""
    check(kind, 1000 + chunk * CHUNK, CHUNK)


@pytest.mark.generated
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_fresh(kind, chunk):
    """Programs that no run has seen before."""
    check(kind, int(os.environ[FRESH]) + chunk * CHUNK, CHUNK)
