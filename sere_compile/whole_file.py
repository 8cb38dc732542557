"""Files that are written completely or not at all: the old file stays until the new one is complete."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import OutputError


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write a file: it replaces `path` when the block ends, and `path` is unchanged if the block fails.

    It has the name of `path`, in a folder of its own beside it: writers choose a format by a name's ending, and
    further files, such as the weights of an ONNX file, move along. A pipe or device is written to directly.

    Raises:
        OutputError: the block, or the replacing, met an OSError.
    """
    with _errors_name(path):
        if _keeps_nothing(path):
            yield Path(path)
            return
        # A rename replaces a link, not what it points to; and only within one folder is it atomic for certain.
        target = Path(os.path.realpath(path))
        with _folder_beside(target) as folder:
            yield folder / target.name
            _replace(folder, target)


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file completely or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with whole_file(path) as beside:
        beside.write_bytes(data)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise what `whole_file` would raise at its end, before the work whose result is to be written.

    Raises:
        OutputError: `path` is a folder, its folder does not exist, or creating a file of that name there failed.
    """
    with _errors_name(path):
        if _keeps_nothing(path):
            return
        target = Path(os.path.realpath(path))
        if os.path.isdir(target):
            raise OutputError(f"{os.fspath(path)!r} is a folder; give the name of a file")
        if not os.path.isdir(target.parent):
            raise OutputError(f"there is no folder {target.parent}")
        with _folder_beside(target) as folder:
            (folder / target.name).touch()


@contextlib.contextmanager
def _errors_name(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError becomes an OutputError: its own text names a temporary file."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{os.fspath(path)} could not be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    """A new folder on the same disk, removed at the end with what is left in it."""
    with tempfile.TemporaryDirectory(prefix=".sere-", dir=target.parent, ignore_cleanup_errors=True) as name:
        yield Path(name)


def _keeps_nothing(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a device or a pipe, such as /dev/null."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _replace(folder: Path, target: Path) -> None:
    """Move what was written, the file itself last: it may refer to the others."""
    written = sorted(folder.iterdir(), key=lambda file: (file.name == target.name, file.name))
    for file in written:
        with open(file, "rb") as content:
            os.fsync(content.fileno())
    for file in written:
        os.replace(file, target.with_name(file.name))
