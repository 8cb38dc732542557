"""Python warnings of one thread, held back while it makes a call that may be made again, or that is a trial.

`warnings.catch_warnings` does that for all threads: where two overlap, the one that leaves last puts back what the
first had put in place, and every later warning of the process is lost.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

_held: ContextVar[list[warnings.WarningMessage] | None] = ContextVar("sere held warnings", default=None)


class _Hook:
    """What `warnings` shows warnings with while any thread holds its own back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holding = 0  # threads
        self._show: Callable[..., Any] = warnings.showwarning  # what is in place without the hook

    def __call__(
        self, message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None
    ) -> None:
        held = _held.get()
        if held is None:
            self._show(message, category, filename, lineno, file, line)
        else:
            held.append(warnings.WarningMessage(message, category, filename, lineno, file, line))

    def enter(self) -> None:
        with self._lock:
            self._holding += 1
            if warnings.showwarning is not self:
                self._show, warnings.showwarning = warnings.showwarning, self

    def leave(self) -> None:
        with self._lock:
            self._holding -= 1
            # Else others have put theirs in place meanwhile, which ends at this one: it goes on showing warnings.
            if not self._holding and warnings.showwarning is self:
                warnings.showwarning = self._show


_hook = _Hook()


@contextlib.contextmanager
def held_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Warnings of this thread go to the list that this gives, and are not shown."""
    held: list[warnings.WarningMessage] = []
    _hook.enter()
    token = _held.set(held)
    try:
        yield held
    finally:
        _held.reset(token)
        _hook.leave()


_in_trial: ContextVar[bool] = ContextVar("sere in a trial", default=False)


def _is_no_trials(record: logging.LogRecord) -> bool:
    return not _in_trial.get()


# torch logs shapes that do not fit as errors, with a stack, before it raises them.
logging.getLogger("torch._subclasses.fake_tensor").addFilter(_is_no_trials)


@contextlib.contextmanager
def in_trial() -> Iterator[None]:
    """Warnings of this thread are dropped, and what torch logs of made-up inputs that do not fit.

    Warnings are given where the same code runs again: Python gives many only once.
    """
    token = _in_trial.set(True)
    try:
        with held_warnings():
            yield
    finally:
        _in_trial.reset(token)
        with warnings.catch_warnings():  # makes it forget which were given
            pass
