"""Which program a seed stands for."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping

from .choices import GATES, LOOK_ALIKES, Dimensions, draw
from .judge import judge
from .program import GATE, LOOK_ALIKE, Program, make_program
from .rules import Choices, fits
from .verdicts import Verdict

DIMENSIONS: dict[str, Dimensions] = {GATE: GATES, LOOK_ALIKE: LOOK_ALIKES}
# One program in so many is asked for S = K as well.
_IDENTITY_EVERY = 5


def drawn(kind: str, seed: int) -> Program:
    """The program of a seed, the same for ever."""
    return make_program(kind, draw(random.Random(f"{kind} {seed}"), DIMENSIONS[kind]), seed)


def chosen(kind: str, seed: int, choices: Mapping[str, str]) -> Program:
    """The simplest program with these choices.

    Raises:
        ValueError: an unknown dimension or choice, or choices that do not go together.
    """
    dimensions = DIMENSIONS[kind]
    for name, value in choices.items():
        if value not in dimensions.get(name, ()):
            raise ValueError(f"{name}={value}: the grammar of {kind}s has {dimensions.get(name, tuple(dimensions))}")
    together = {name: choices.get(name, values[0]) for name, values in dimensions.items()}
    if not fits(together):
        raise ValueError(f"these choices do not go together: {dict(choices)}")
    return make_program(kind, together, seed)


def plain(kind: str, seed: int, base: Mapping[str, str], names: Collection[str] = ()) -> Iterator[Program]:
    """Each choice of the grammar alone, or of the named dimensions, in the simplest program with those of `base`."""
    for name, values in DIMENSIONS[kind].items():
        if names and name not in names:
            continue
        for value in values:
            together = {**{other: first[0] for other, first in DIMENSIONS[kind].items()}, **base, name: value}
            # What a choice cannot do without.
            needed: tuple[Choices, ...] = (
                {},
                {"look-up": "gather"},
                {"structure": "methods"},
                {"dispatch": "mask loop"},
                {"padding": "ids of 0"},
                {"padding": "weights times mask"},
                {"padding": "ids of 0", "structure": "methods"},
            )
            for more in needed:
                if name not in more and together.keys() >= more.keys() and fits({**together, **more}):
                    yield make_program(kind, {**together, **more}, seed)
                    break


def judged(program: Program) -> Verdict:
    """The verdict on a program, S = K included for one gate in five."""
    verdict = judge(program)
    if program.kind == GATE and not verdict.failed and program.seed % _IDENTITY_EVERY == 0:
        same = judge(program, identity=True)
        return same if same.failed else verdict
    return verdict
