"""What running code on made-up numbers may raise, and how that is told."""

from __future__ import annotations

FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError)


def short(error: BaseException) -> str:
    """The class of an error, and how the first line of its message begins."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:120]}"
