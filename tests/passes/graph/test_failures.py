"""Errors of a program that is run on made-up values, in a few words."""

import pytest

from sere_compile.passes.graph.failures import FAILURES, ProgramError, program_errors, short


def test_an_error_in_a_few_words():
    assert short(ValueError("first\nsecond")) == "ValueError: first"
    assert short(KeyError()) == "KeyError: "
    assert len(short(RuntimeError("x" * 500))) == len("RuntimeError: ") + 120


class TooStrange(Exception):
    pass


@pytest.mark.parametrize("error", [AssertionError("a mask"), TooStrange("a mask"), ZeroDivisionError("a mask")])
def test_a_program_raises_what_it_likes(error):
    with pytest.raises(FAILURES) as raised, program_errors():
        raise error
    assert raised.value.__cause__ is error
    assert short(raised.value) == f"{type(error).__name__}: a mask"


@pytest.mark.parametrize("error", [ValueError("a"), NotImplementedError("a"), KeyboardInterrupt()])
def test_others_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, program_errors():
        raise error
    assert raised.value is error
    assert not isinstance(error, ProgramError)
