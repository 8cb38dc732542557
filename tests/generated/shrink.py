"""From a program that fails to a simpler one that fails in the same way."""

from __future__ import annotations

from collections.abc import Callable

from .choices import Dimensions
from .program import Program, make_program
from .rules import Choices, fits
from .verdicts import Verdict


def shrink(
    program: Program, verdict: Verdict, dimensions: Dimensions, judge: Callable[[Program], Verdict]
) -> tuple[Program, Verdict]:
    """Try the simpler choices of each dimension for as long as the verdict's word stays.

    Args:
        program: fails.
        verdict: its own.
        dimensions: of its grammar, the simplest choice of each first.
        judge: gives the verdict on a program.

    Returns:
        A program of which no single choice can be made simpler, and its verdict.
    """
    while True:
        smaller = _one_step(program, verdict, dimensions, judge)
        if smaller is None:
            return program, verdict
        program, verdict = smaller


def _one_step(
    program: Program, verdict: Verdict, dimensions: Dimensions, judge: Callable[[Program], Verdict]
) -> tuple[Program, Verdict] | None:
    """All dimensions once; None where none of them gives way."""
    changed = False
    for name, values in dimensions.items():
        for simpler in values[: values.index(program.choices[name])]:
            choices = {**program.choices, name: simpler}
            if not fits(choices):
                continue
            candidate = make_program(program.kind, choices, program.seed)
            found = judge(candidate)
            if found.word == verdict.word:
                program, verdict, changed = candidate, found, True
                break
    return (program, verdict) if changed else None


def peculiar(choices: Choices, dimensions: Dimensions) -> Choices:
    """The choices that are not the simplest of their dimension: what a minimal program is about."""
    return {name: value for name, value in choices.items() if value != dimensions[name][0]}
