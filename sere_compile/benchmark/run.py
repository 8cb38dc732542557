"""Run the benchmarks of one subject."""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
import triton
from torch._dynamo.exc import BackendCompilerFailed

from ..compiler import rewrite_gate
from ..errors import SereError
from . import variant
from .decode_step import bench_decode_step
from .gating import bench_gating
from .moe_layer import bench_moe_layer
from .result import Results, Row
from .subject import Subject
from .timing import cache_bytes, copy_bandwidth, machine_name

KINDS: dict[str, Callable[..., list[Row]]] = {
    "gating": bench_gating,
    "layer": bench_moe_layer,
    "decode": bench_decode_step,
}
# What the figures of a kind include.
_ABOUT = {
    "gating": "times and speed-ups of gating include the router's projection and what reads the ids, both timed apart"
}


def begin(subject: Subject) -> Results:
    """Results without rows: the machine and its copy bandwidth."""
    on_gpu = torch.cuda.is_available()
    machine = f"{machine_name()}, torch {torch.__version__}" + (f", triton {triton.__version__}" if on_gpu else "")
    results = Results(subject.name, machine, copy_bandwidth(), subject.routing)
    results.gates = [[block.experts, block.top_k] for block in subject.blocks]
    experts, cache = max(block.experts * block.expert_bytes for block in subject.blocks), cache_bytes()
    if experts < cache:
        level = "L2" if on_gpu else "last-level"
        results.notes.append(
            f"a layer's experts, {experts / 1e6:.0f} MB, fit the {level} cache of {cache / 1e6:.0f} MB: a layer timed "
            "alone reads them from there, and its share of the copy bandwidth means nothing"
        )
    return results


def run_bench(
    results: Results,
    subject: Subject,
    kinds: Sequence[str],
    batches: Sequence[int],
    selects: Sequence[int],
    stock: Sequence[str],
    tell: Callable[[str], None] = print,
) -> None:
    """Measure everything asked for, one kind and batch after the other, and add each measurement to `results` at once.

    What a model does not allow, or the device has no memory for, becomes a failure in the results.

    Args:
        results: from `begin`.
        subject: on the machine's GPU, or on its CPU.
        kinds: some of `KINDS`.
        batches: numbers of tokens.
        selects: S; K or more leaves the model unchanged.
        stock: experts implementations of transformers to compare with.
        tell: called with what is being measured.
    """
    with torch.no_grad(), _logged_to(results):
        results.notes += [note for kind, note in _ABOUT.items() if kind in kinds]
        for kind, batch in itertools.product(kinds, batches):
            tell(f"{kind}, batch {batch}")
            try:
                results.rows += KINDS[kind](subject, batch, selects, stock, results.copy_bandwidth)
            except (SereError, torch.OutOfMemoryError, BackendCompilerFailed) as error:
                if isinstance(error, BackendCompilerFailed) and not isinstance(error.inner_exception, SereError):
                    raise
                results.failures.append(f"{kind}, batch {batch}: {error}")
                tell(results.failures[-1])
    torch._dynamo.reset()


@contextlib.contextmanager
def _logged_to(results: Results) -> Iterator[None]:
    """Note what the speed passes left unchanged, and why, and what the comparison of outputs could not show.

    Variants that ran out of memory are failures: figures without them would mislead.
    """
    refused: collections.Counter[str] = collections.Counter()

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if " keeps its " in str(record.msg):
                refused["gates keep their " + message.partition(" keeps its ")[2]] += 1
            elif " is not measured: " in str(record.msg):
                results.failures.append(message)
            elif record.name == variant.__name__:
                results.notes.append(message)

    handler = Notes(logging.INFO)
    logs = [logging.getLogger(name) for name in (rewrite_gate.__name__, variant.__name__)]
    levels = [log.level for log in logs]
    for log in logs:
        log.addHandler(handler)
        log.setLevel(min(log.level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
            log.removeHandler(handler)
        results.notes += [f"{count} compiled {reason}" for reason, count in refused.items()]
