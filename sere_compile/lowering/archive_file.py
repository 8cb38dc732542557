"""Archives of torch as files: exported programs and AOTInductor packages."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import IO, Any

from ..whole_file import whole_file


@contextlib.contextmanager
def archive_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """An open file for an archive of torch; it takes the place of `path` when the block ends.

    Raises:
        OutputError: the file cannot be written.
    """
    with whole_file(path) as beside, _LateErrors(io.FileIO(beside, "wb")) as file:
        yield file
        if file.error is not None:
            raise file.error


class _LateErrors(io.BufferedWriter):
    """Keeps the error of a failed write for later: torch's writer of archives ends the process where one is raised."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes
