"""What a run of many programs showed, as text."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .program import GATE, Program
from .verdicts import PARTLY, REROUTED, VERDICTS, Verdict


@dataclass(frozen=True)
class Judged:
    """A program and what became of it."""

    program: Program
    verdict: Verdict


def summary(results: Sequence[Judged]) -> str:
    """Counts of verdicts, and the share of gates that is re-routed by form."""
    lines = []
    for kind in dict.fromkeys(result.program.kind for result in results):
        of = [result for result in results if result.program.kind == kind]
        counts = Counter(result.verdict.word for result in of)
        lines += [f"{len(of)} {kind}s"]
        lines += [f"  {counts[word]:5d}  {word}" for word in VERDICTS if counts[word]]
        if kind == GATE:
            lines += ["", *_shares(of)]
        lines += [""]
    return "\n".join(lines)


def _shares(results: Iterable[Judged]) -> list[str]:
    """For each choice: of the programs that told something, how many were re-routed, and failed."""
    told: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for result in results:
        if result.verdict.told_nothing:
            continue
        for name, value in result.program.choices.items():
            told[name, value].append(result.verdict)
    lines = [f"  {'form':<50}  programs  re-routed  failed"]
    for (name, value), verdicts in sorted(told.items()):
        done = sum(verdict.word in (REROUTED, PARTLY) for verdict in verdicts) / len(verdicts)
        failed = sum(verdict.failed for verdict in verdicts) / len(verdicts)
        lines.append(f"  {name + ': ' + value:<50}  {len(verdicts):8d}  {done:9.0%}  {failed:6.0%}")
    return lines
