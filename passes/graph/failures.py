"""What running code on made-up values may raise, and how that is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError)


class ProgramError(RuntimeError):
    """What a program raised, in few words; its cause is that error."""


@contextmanager
def program_errors() -> Iterator[None]:
    """Any error of the program that runs here is one of `FAILURES`; those of ours elsewhere are not hidden so.

    It may fail an `assert` or raise an exception of its own on what is made up, and runs without us.
    """
    try:
        yield
    except FAILURES:
        raise
    except Exception as error:  # what a program raises has no common class
        raise ProgramError(short(error)) from error


def short(error: BaseException) -> str:
    """The class of an error, and how the first line of its message begins."""
    line = next(iter(str(error).strip().splitlines()), "")[:120]
    return line if isinstance(error, ProgramError) else f"{type(error).__name__}: {line}"
