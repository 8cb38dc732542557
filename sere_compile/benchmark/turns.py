"""Processes that are timed in turn, although each has to live as long as its engine does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

PAUSE_S = 0.005


class Place(TypedDict):
    """Where a process stands among those that take turns: `index` of `of`, who meet in `folder`, an empty one."""

    folder: str
    index: int
    of: int


class Turns:
    """One process works at a time, each after the one before it, round after round. A drift of the machine cancels.

    Every process has to take as many turns, or to be said to have ended (`ended`), for the others wait for it.
    """

    def __init__(self, place: Place | None) -> None:
        """`None`: a process alone, which never waits."""
        self._place, self._taken = place, 0

    def ready(self) -> None:
        """Before the first turn, for which all wait until everybody is ready."""
        self._mark()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A turn."""
        self._wait()
        try:
            yield
        finally:
            self._taken += 1
            self._mark()

    def _wait(self) -> None:
        if self._place is None:
            return
        folder, mine = Path(self._place["folder"]), self._place["index"]
        for other in range(self._place["of"]):
            if other != mine:
                marked = folder / f"{other}.{self._taken + (other < mine)}"
                while not marked.exists() and not _end_of(folder, other).exists():
                    time.sleep(PAUSE_S)

    def _mark(self) -> None:
        if self._place is not None:
            (Path(self._place["folder"]) / f"{self._place['index']}.{self._taken}").touch()


def ended(place: Place) -> None:
    """Said by whoever sees that a process has ended, well or badly: nobody waits for it any more."""
    _end_of(Path(place["folder"]), place["index"]).touch()


def _end_of(folder: Path, index: int) -> Path:
    return folder / f"{index}.ended"
