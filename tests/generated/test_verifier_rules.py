"""Each rule of the proofs is needed: broken, a drawn program comes out wrong, or a test of its module fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sere_compile.compiler.outside import prove_outside

from .draws import drawn, judged
from .test_generated import economical  # noqa: F401  (a fixture)
from .verifier_rules import BROKEN, RULES, VERIFY, edited

ROOT = Path(__file__).parents[2]
MOST = 200  # programs of a kind


@pytest.fixture
def forget():
    """A function that forgets all proofs: those of before, and those of a broken rule."""

    def clear():
        for remembered in (VERIFY._verdicts, prove_outside._verdicts):
            remembered.clear()
        torch._dynamo.reset()

    clear()
    yield clear
    clear()


def first_failure(kinds):
    """(program, verdict) of the first drawn program that fails, or None."""
    for seed in range(MOST):
        for kind in kinds:
            program = drawn(kind, seed)
            verdict = judged(program)
            if verdict.failed:
                return program, verdict
    return None


@pytest.mark.generated
@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.programs])
def test_a_program_fails_without_it(name, monkeypatch, forget):
    with monkeypatch.context() as patch:
        patch.setattr(*RULES[name].patch)
        found = first_failure(RULES[name].programs)
    assert found is not None, f"{MOST} programs of each kind pass without the rule"
    program, verdict = found
    print(f"{name}: {program.kind} {program.seed}, {verdict.word}")
    forget()
    assert not judged(program).failed, f"{program.kind} {program.seed} fails with the rule as well"


@pytest.mark.generated
@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.tests])
def test_a_test_fails_without_it(name):
    command = [sys.executable, "-m", "pytest", "-p", "tests.generated.verifier_rules", "-n", "0", "-q", "-x", "-m", ""]
    done = subprocess.run(
        [*command, *RULES[name].tests], cwd=ROOT, env={**os.environ, BROKEN: name}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]


def test_what_breaks_the_rules_fits_the_code():
    """Each names code that is there, and tests that there are; a lane of its own runs them."""
    for name, rule in RULES.items():
        place, attribute, broken = rule.patch
        assert getattr(place, attribute) is not broken, name
        assert bool(rule.programs) != bool(rule.tests), name
        assert all((ROOT / test.partition("::")[0]).exists() for test in rule.tests), name


def doubled(value):
    """Stands for a function of the verifier."""
    return value + value


def test_an_edit_changes_one_place_of_a_function():
    """Code in which that place is gone, or is no longer alone, is told."""
    assert edited(doubled, "value + value", "3 * value")(2) == 6
    for text in ("value * value", "value"):
        with pytest.raises(ValueError, match=r"doubled has '.*' [03] times, not once"):
            edited(doubled, text, "0")
