"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import threading

import pytest

from sere_compile import OutputError
from sere_compile.whole_file import check_writable, whole_file, write_whole


def contents(folder):
    """Every file of a folder by name; temporary ones would show."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_new_file_takes_the_place_of_the_old(tmp_path):
    """With its name while it is written, and what a writer puts next to it."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with whole_file(path) as beside:
        assert beside.name == "model.onnx"
        beside.write_bytes(b"new")
        beside.with_name("model.onnx.data").write_bytes(b"weights")
        assert path.read_bytes() == b"old"
    assert contents(tmp_path) == {"model.onnx": b"new", "model.onnx.data": b"weights"}


def test_nothing_changes_where_writing_fails(tmp_path):
    """Another's error passes as it is, one of the system becomes ours and names the file; the rest is cleared away."""
    path = tmp_path / "table.csv"
    path.write_bytes(b"old")
    for raised, expected in (
        (ValueError("by the writer"), pytest.raises(ValueError, match="by the writer")),
        (KeyboardInterrupt(), pytest.raises(KeyboardInterrupt)),
        (
            OSError(28, "No space left"),
            pytest.raises(OutputError, match=r"table.csv could not be written: No space"),
        ),
    ):
        with expected, whole_file(path) as beside:
            beside.write_bytes(b"half")
            raise raised
        assert contents(tmp_path) == {"table.csv": b"old"}


def test_a_full_disk_is_an_error_of_ours(tmp_path, no_room):
    path = tmp_path / "table.csv"
    path.write_bytes(b"old")
    with no_room(), pytest.raises(OutputError, match=r"table.csv could not be written: File too large"):
        write_whole(path, b"new" * 1000)
    assert contents(tmp_path) == {"table.csv": b"old"}


def test_a_link_stays_one(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder / "file")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert contents(folder) == {"file": b"new"}


def test_a_pipe_is_written_to(tmp_path):
    """`--csv >(gzip > x.gz)`, or /dev/null: there is nothing to lose, and a rename would take its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    check_writable(pipe)
    write_whole(pipe, b"new")
    reader.join(timeout=30)
    assert read == [b"new"]
    assert pipe.is_fifo()


def test_what_can_be_written_passes_and_leaves_nothing(tmp_path):
    longest = tmp_path / ("n" * 255)
    check_writable(longest)
    assert contents(tmp_path) == {}
    write_whole(longest, b"new")
    check_writable(longest)
    assert contents(tmp_path) == {"n" * 255: b"new"}


def test_what_cannot_be_written_is_told_before(tmp_path):
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path, "is a folder; give the name of a file"),
        ("", "is a folder; give the name of a file"),
        (tmp_path / "missing" / "file", f"there is no folder {tmp_path / 'missing'}"),
        (tmp_path / "file" / "file", f"there is no folder {tmp_path / 'file'}"),
        ("/proc/file", "/proc/file could not be written"),
        (tmp_path / ("n" * 256), "nnn could not be written: File name too long"),
    ):
        with pytest.raises(OutputError, match=message):
            check_writable(path)
    assert contents(tmp_path) == {"file": b""}
