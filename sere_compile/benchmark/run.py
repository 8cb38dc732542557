"""Run the benchmarks of one subject."""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
import triton

from ..errors import SereError
from .decode_step import bench_decode_step
from .gating import bench_gating
from .moe_layer import bench_moe_layer
from .result import Results, Row
from .subject import Subject
from .timing import copy_bandwidth

KINDS: dict[str, Callable[..., list[Row]]] = {
    "gating": bench_gating,
    "layer": bench_moe_layer,
    "decode": bench_decode_step,
}


def require_device() -> None:
    """Raise SereError where there is no CUDA device."""
    if not torch.cuda.is_available():
        raise SereError("sere bench times kernels: it needs a CUDA device")


def run_bench(
    subject: Subject,
    kinds: Sequence[str],
    batches: Sequence[int],
    selects: Sequence[int],
    stock: Sequence[str],
    tell: Callable[[str], None] = print,
) -> Results:
    """Measure everything asked for.

    Args:
        subject: on a CUDA device.
        kinds: some of `KINDS`.
        batches: numbers of tokens.
        selects: S; K or more is the model as it is.
        stock: experts implementations of transformers to compare with.
        tell: told what is being measured.

    Raises:
        SereError: no CUDA device.
    """
    require_device()
    device = torch.cuda.get_device_name()
    machine = f"{device}, torch {torch.__version__}, triton {triton.__version__}"
    results = Results(subject.name, machine, copy_bandwidth(), subject.routing)
    with torch.no_grad(), _refusals_to(results.notes):
        for kind in kinds:
            for batch in batches:
                tell(f"{kind}, batch {batch}")
                results.rows += KINDS[kind](subject, batch, selects, stock, results.copy_bandwidth)
    torch._dynamo.reset()
    return results


@contextlib.contextmanager
def _refusals_to(notes: list[str]) -> Iterator[None]:
    """Add what the speed passes left as it was, and why: a figure without them is not what it seems."""
    refused: collections.Counter[str] = collections.Counter()

    class Refusals(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if " keeps its " in str(record.msg):
                refused["gates keep their " + record.getMessage().partition(" keeps its ")[2]] += 1

    log, handler = logging.getLogger("sere_compile.gate_plan"), Refusals(logging.INFO)
    level = log.level
    log.addHandler(handler)
    log.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        notes += [f"{count} compiled {reason}" for reason, count in refused.items()]
