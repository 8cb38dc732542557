"""Drawn programs through the product: a small sample in the lane `slow`, 2,000 in the lane `generated`.

A failure is shrunk to a minimal program and printed with the command that shows it again.
"""

import gc
import logging
import os
import warnings

import pytest
import torch

from .. import heap
from .conftest import FRESH
from .draws import drawn, judged, plain
from .failures import describe, sort_failures
from .program import GATE, LOOK_ALIKE
from .table import Judged, summary

# Programs of one test: enough that a chunk of gates without any that is re-routed means something.
CHUNK, CHUNKS = 50, 10
# Of the lane `slow`: half a minute. A gate costs as much as three look-alikes.
SAMPLE = {GATE: 6, LOOK_ALIKE: 12}
KINDS = (GATE, LOOK_ALIKE)
PARTS = 4  # of each choice alone
MASKED_LATER = {"first call": "masks nothing", "padding": "ids or zeros"}
OUTSIDE = {
    "dispatch": "mask loop",
    "structure": "methods",
    "break": "print after the selection",
    "masked where": "in the experts' code",
}


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
    logger.setLevel(level)
    torch.set_num_threads(threads)


def judged_right(programs):
    """The verdicts on programs of which none fails."""
    results = []
    for program in programs:
        results.append(Judged(program, judged(program)))
        heap.set_aside()
    failed = [result for result in results if result.verdict.failed]
    if failed:
        forms, _ = sort_failures(failed[:1], judged, most=1, tell=lambda text: None)
        seeds = ", ".join(f"{result.program.seed}: {result.verdict.word}" for result in failed)
        kind = failed[0].program.kind
        pytest.fail(f"{len(failed)} of {len(results)} {kind}s ({seeds})\n\n{describe(forms[0])}", pytrace=False)
    return results


def check(kind, first, count):
    """Judge programs in a row; the minimal form of the first failure is the message."""
    results = judged_right(drawn(kind, seed) for seed in range(first, first + count))
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
@pytest.mark.parametrize("part", range(PARTS))
def test_each_choice(kind, part):
    """Alone: what is wrong by itself need not be drawn with company that is re-routed."""
    judged_right(list(plain(kind, 0, {}))[part::PARTS])


@pytest.mark.generated
def test_each_mask():
    """What a mask changes, and what it comes as, where the first call masks nothing."""
    results = judged_right(plain(GATE, 0, MASKED_LATER, ("padding", "mask")))
    assert len(results) > 25, summary(results)


@pytest.mark.generated
def test_masks_outside():
    """The same in code behind the end of the graph: each takes seconds."""
    results = judged_right(plain(GATE, 0, MASKED_LATER | OUTSIDE, ("padding", "mask")))
    assert len(results) > 20, summary(results)


@pytest.mark.generated
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", range(PARTS))
def test_fresh_choice(kind, part):
    """Each choice alone, with parameters and inputs that no run has seen before."""
    judged_right(list(plain(kind, int(os.environ[FRESH]), {}))[part::PARTS])


@pytest.mark.generated
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_fresh(kind, chunk):
    """Programs that no run has seen before."""
    check(kind, int(os.environ[FRESH]) + chunk * CHUNK, CHUNK)
