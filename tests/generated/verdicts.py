"""The words for what became of a program."""

from __future__ import annotations

from dataclasses import dataclass

REROUTED = "ok, re-routed"
PARTLY = "ok, some layers re-routed"
REFUSED = "ok, refused with a reason"
RAISED = "ok, refused by an error of the library"
UNTOUCHED = "ok, untouched"
OUTPUT = "WRONG output"
SIDE = "WRONG side value"
IDENTITY = "WRONG at S = K"
TOUCHED = "LOOK-ALIKE TOUCHED"
STOPPED = "LOOK-ALIKE STOPPED"
SILENT = "SILENT"
CRASH = "CRASH"
VACUOUS = "vacuous"
TORCH = "torch itself fails"

FAILURES = (OUTPUT, SIDE, IDENTITY, TOUCHED, STOPPED, SILENT, CRASH)
VERDICTS = (REROUTED, PARTLY, REFUSED, RAISED, UNTOUCHED, *FAILURES, VACUOUS, TORCH)


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
        word: one of `VERDICTS`.
        detail: what was off and by how much, or the product's reason.
        error: relative, of the worst result.
        rerouted: how many layers of the program were re-routed, of how many.
    """

    word: str
    detail: str = ""
    error: float = 0.0
    rerouted: tuple[int, int] = (0, 0)

    @property
    def failed(self) -> bool:
        """Whether the product is at fault."""
        return self.word in FAILURES

    @property
    def told_nothing(self) -> bool:
        """Whether the program put the product to no test."""
        return self.word in (VACUOUS, TORCH)
