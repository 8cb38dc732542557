"""Failures sorted by the minimal program that fails as they do."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .draws import DIMENSIONS
from .program import GATE, Program
from .rules import Choices
from .shrink import peculiar, shrink
from .table import Judged
from .verdicts import Verdict


@dataclass
class Form:
    """A minimal program, and how many drawn ones contain it.

    Attributes:
        program: no choice of it can be made simpler.
        verdict: its own.
        choices: what is peculiar to it.
        seen: how many programs failed in this way.
    """

    program: Program
    verdict: Verdict
    choices: Choices
    seen: int = 1

    def covers(self, other: Judged) -> bool:
        """Whether another failure has all that is peculiar to this one."""
        same = other.verdict.word == self.verdict.word and other.program.kind == self.program.kind
        return same and self.choices.items() <= other.program.choices.items()


def sort_failures(
    results: Sequence[Judged], judge: Callable[[Program], Verdict], *, most: int, tell: Callable[[str], None]
) -> tuple[list[Form], int]:
    """Shrink failures until forms cover all, or there are `most`; and how many are left over."""
    forms: list[Form] = []
    left = 0
    for result in results:
        if not result.verdict.failed:
            continue
        known = next((form for form in forms if form.covers(result)), None)
        if known is not None:
            known.seen += 1
        elif len(forms) >= most:
            left += 1
        else:
            dimensions = DIMENSIONS[result.program.kind]
            program, verdict = shrink(result.program, result.verdict, dimensions, judge)
            choices = peculiar(program.choices, dimensions)
            same = next((form for form in forms if (form.verdict.word, form.choices) == (verdict.word, choices)), None)
            if same is not None:
                same.seen += 1
                continue
            forms.append(Form(program, verdict, choices))
            tell(describe(forms[-1]))
    return sorted(forms, key=lambda form: -form.seen), left


def describe(form: Form) -> str:
    """A form as Markdown: what it is, how far off it is, how to see it again, and its source."""
    what = ", ".join(f"{name}: {value}" for name, value in form.choices.items()) or "the simplest program"
    chosen = " ".join(f"--choose {shlex.quote(f'{name}={value}')}" for name, value in form.choices.items())
    kind = "gate" if form.program.kind == GATE else "look-alike"
    return "\n".join(
        [
            f"## {form.verdict.word}: {what}",
            "",
            f"Seen {form.seen} times. {form.verdict.detail}",
            "",
            f"    python -m tests.generated.run --kind {kind} --seed {form.program.seed} {chosen}",
            "",
            "```python",
            form.program.text.rstrip(),
            "```",
            "",
        ]
    )
