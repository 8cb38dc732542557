"""python -m tests.mutation.run --count 300 --seed 7: draws mutants, and says which of them their tests let live."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.test_mirror import ELSEWHERE, test_files

from . import server
from .draw import ROOT, Mutant, mutants
from .equivalent import is_equivalent

POPULATION = (
    "passes/**/*.py",
    "ops/*/reference.py",
    "sere_compile/compiler/**/*.py",
    "sere_compile/similarity/binding.py",
    "sere_compile/evaluation/*.py",
)
# What they draw is looked at: no test asks how large a label is.
PICTURES = ("charts", "heat_maps", "html_report", "pareto_plot", "pictures")
# For fewer mutants of a file it is cheaper to run all of its tests, until one fails, than to ask which it needs.
WORTH_MEASURING = 4

Verdicts = dict[Mutant, server.Verdict]


def population(patterns: Iterable[str] = POPULATION) -> list[str]:
    """Paths of the modules to change, below the root of the repository."""
    found = {path for pattern in patterns for path in ROOT.glob(pattern) if not path.name.startswith("__")}
    return sorted(str(path.relative_to(ROOT)) for path in found if path.stem not in PICTURES)


def own_tests(module: str) -> tuple[str, ...]:
    """The test files of a module's own name, else what tests it instead."""
    own = tuple(f"tests/{file}" for file in test_files(module) if (ROOT / "tests" / file).exists())
    words = (word.strip(",;:.") for word in ELSEWHERE.get(module, "").split())
    return own or tuple(word for word in words if word.startswith("tests/"))


def draw(modules: Iterable[str], count: int, seed: int) -> list[Mutant]:
    """So many mutants of these modules that are not known to compute the same.

    A change elsewhere draws the same ones: they are those whose hash with the seed is least.
    """
    every = (mutant for module in modules for mutant in mutants(module) if not is_equivalent(mutant))

    def place(mutant: Mutant) -> bytes:
        what = (seed, mutant.path, mutant.function, mutant.before, mutant.after, mutant.number)
        return hashlib.sha256(repr(what).encode()).digest()

    return sorted(every, key=place)[:count]


def judge(drawn: Iterable[Mutant], *, jobs: int = 1, cache: Path | None = None) -> Verdicts:
    """What the tests of each mutant's module make of it."""
    by_files: dict[tuple[str, ...], list[Mutant]] = defaultdict(list)
    for mutant in drawn:
        by_files[own_tests(mutant.path)].append(mutant)
    parts: list[list[tuple[tuple[str, ...], list[Mutant]]]] = [[] for _ in range(jobs)]
    for task in sorted(by_files.items(), key=lambda task: (len(task[1]), task[0])):
        min(parts, key=lambda part: sum(len(mutants) for _, mutants in part)).append(task)
    verdicts: Verdicts = {}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        for found in pool.map(_judge, parts, itertools.repeat(cache)):
            verdicts |= found
    return verdicts


def _judge(tasks: list[tuple[tuple[str, ...], list[Mutant]]], cache: Path | None) -> Verdicts:
    verdicts: Verdicts = {}
    files = {file for files, _ in tasks for file in files}
    with server.collected(files, population()) as tests:
        for own, drawn in tasks:
            for file in own:
                left = [mutant for mutant in drawn if mutant not in verdicts or not verdicts[mutant].killed]
                if left:
                    verdicts |= _judge_in(file, left, tests, cache)
    return verdicts


def _judge_in(file: str, drawn: list[Mutant], tests: server.Tests, cache: Path | None) -> Verdicts:
    verdicts = {}
    everything = tests.of(file)
    measured = _measured(file, everything, tests, cache, ask=len(drawn) >= WORTH_MEASURING)
    if measured and measured.failed:
        raise RuntimeError(f"{file} fails on the code as it is: {', '.join(measured.failed)}")
    for mutant in drawn:
        chosen = measured.covering(mutant) if measured else everything
        seconds = sum(measured.seconds[test] for test in chosen) if measured else 120.0
        verdict = tests.judge(mutant, chosen, seconds)
        verdicts[mutant] = verdict
        word, by = "killed" if verdict.killed else "ALIVE ", verdict.by or f"{verdict.tests} tests of {file}"
        print(f"{word} {verdict.seconds:5.1f} s  {by}\n{mutant}", flush=True)
    return verdicts


def _measured(
    file: str, everything: list[str], tests: server.Tests, cache: Path | None, *, ask: bool
) -> server.Measured | None:
    """What a file of tests does on the code as it is, from the cache if neither the file nor its modules changed.

    None if it is in no cache, and not to be asked.
    """
    if cache is None:
        return tests.measure(everything) if ask else None
    modules = [module for module in population() if file in own_tests(module)]
    digest = hashlib.sha256(b"".join((ROOT / path).read_bytes() for path in (file, *modules))).hexdigest()[:16]
    kept = cache / f"{digest}.json"
    if not kept.exists():
        if not ask:
            return None
        cache.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(vars(tests.measure(everything))), encoding="utf-8")
    return server.Measured(**json.loads(kept.read_text(encoding="utf-8")))


def table(verdicts: Verdicts) -> str:
    """Killed mutants by folder."""
    folders: dict[str, list[server.Verdict]] = defaultdict(list)
    for mutant, verdict in verdicts.items():
        for folder in (str(Path(mutant.path).parent), "all"):
            folders[folder].append(verdict)
    lines = [f"{'folder':26} drawn killed  share  seconds each"]
    for folder, found in sorted(folders.items()):
        killed = sum(verdict.killed for verdict in found)
        each = sum(verdict.seconds for verdict in found) / len(found)
        lines.append(f"{folder:26} {len(found):5} {killed:6} {killed / len(found):6.1%} {each:8.1f}")
    return "\n".join(lines)


def main() -> int:
    """Draws, judges and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=POPULATION, help="patterns of the modules to change")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--at-least", type=float, default=0.0, help="exit status 1 below this share")
    parser.add_argument("--cache", type=Path, help="a folder that keeps what the tests do on the code as it is")
    parser.add_argument("--out", type=Path, help="a file of JSON lines, one for each mutant")
    options = parser.parse_args()
    drawn = draw(population(options.only), options.count, options.seed)
    server.prepare()
    verdicts = judge(drawn, jobs=options.jobs, cache=options.cache)
    if options.out:
        lines = [json.dumps({**vars(mutant), **vars(verdict)}) for mutant, verdict in verdicts.items()]
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    alive = [str(mutant) for mutant, verdict in verdicts.items() if not verdict.killed]
    print("\n== alive", *alive, "", table(verdicts), sep="\n")
    share = 1 - len(alive) / len(verdicts)
    print(f"{share:.1%} killed, at least {options.at_least:.0%} asked for")
    return int(share < options.at_least)


if __name__ == "__main__":
    sys.exit(main())
