"""Draw programs, judge them, and say what fails; see README.md."""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import heap
from .draws import chosen, drawn, judged, plain
from .failures import describe, sort_failures
from .program import GATE, LOOK_ALIKE
from .table import Judged, summary
from .verdicts import Verdict


def quiet() -> None:
    """One thread, no warnings of torch, and a heap whose old part no collection looks at again."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    gc.collect()
    gc.freeze()


def _verdict(named: tuple[str, int]) -> tuple[str, int, Verdict]:
    kind, seed = named
    verdict = judged(drawn(kind, seed))
    heap.set_aside()
    return kind, seed, verdict


def judge_many(named: list[tuple[str, int]], jobs: int) -> Iterator[Judged]:
    """The verdicts of many programs, in the order in which they come."""
    if jobs == 1:
        yield from (Judged(drawn(kind, seed), verdict) for kind, seed, verdict in map(_verdict, named))
        return
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=quiet) as pool:
        for kind, seed, verdict in pool.imap_unordered(_verdict, named, chunksize=8):
            yield Judged(drawn(kind, seed), verdict)


def _noted(results: Iterator[Judged], log: Path | None) -> Iterator[Judged]:
    """The results, each written to the log as it comes."""
    with open(log or os.devnull, "w", buffering=1) as lines:
        for result in results:
            program, verdict = result.program, result.verdict
            lines.write(f"{program.kind} {program.seed}\t{verdict.word}\t{' '.join(verdict.detail.split())}\n")
            yield result


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status is 1 where a program failed."""
    options = _parser().parse_args(arguments)
    quiet()
    if options.kind and not options.each:
        return _one(options)
    started = time.time()
    results = sorted(_noted(_judged(options), options.log), key=lambda r: (r.program.kind, r.program.seed))
    print(summary(results))
    print(f"seed {options.seed}: {time.time() - started:.0f} s")
    forms, left = sort_failures(results, judged, most=options.shrink, tell=lambda text: print(text, flush=True))
    if options.failures:
        text = [summary(results), *(describe(form) for form in forms), f"{left} failures are not shrunk.\n"]
        options.failures.write_text("\n".join(text))
    return int(any(result.verdict.failed for result in results))


def _judged(options: argparse.Namespace) -> Iterator[Judged]:
    """The programs that the options ask for."""
    if options.each:
        base = _choices(options)
        return (Judged(program, judged(program)) for program in plain(options.kind, options.seed, base))
    named = [(GATE, options.seed + i) for i in range(options.gates)]
    named += [(LOOK_ALIKE, options.seed + i) for i in range(options.look_alikes)]
    return judge_many(named, options.jobs)


def _choices(options: argparse.Namespace) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in options.choose)


def _one(options: argparse.Namespace) -> int:
    """One program: drawn, or the simplest with the given choices."""
    choices = _choices(options)
    program = chosen(options.kind, options.seed, choices) if choices else drawn(options.kind, options.seed)
    verdict = judged(program)
    print(program.text)
    print(program.choices)
    print(f"{verdict.word}: {verdict.detail}")
    return int(verdict.failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.generated.run", description=__doc__)
    parser.add_argument("--gates", type=int, default=0, help="how many programs with a gate")
    parser.add_argument("--look-alikes", type=int, default=0, help="how many without")
    parser.add_argument("--seed", type=int, default=0, help="of the first program; the others follow")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--shrink", type=int, default=20, help="how many forms of failure are shrunk at most")
    parser.add_argument("--failures", type=Path, help="a Markdown file for the minimal programs")
    parser.add_argument("--log", type=Path, help="a file for the verdict on every program")
    parser.add_argument("--kind", choices=(GATE, LOOK_ALIKE), help="judge one program instead, and print it")
    parser.add_argument("--choose", action="append", default=[], metavar="DIMENSION=CHOICE", help="with --kind")
    parser.add_argument("--each", action="store_true", help="with --kind: each choice of the grammar on its own")
    return parser


if __name__ == "__main__":
    sys.exit(main())
