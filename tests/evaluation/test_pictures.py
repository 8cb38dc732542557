"""Formats and sizes of pictures."""

from __future__ import annotations

import pytest

from sere_compile.errors import OutputError
from sere_compile.evaluation.pictures import DPI, new_figure, picture_formats, save

pytest.importorskip("matplotlib")


def test_formats():
    assert {"png", "svg", "pdf"} <= set(picture_formats())
    assert "pgf" not in picture_formats()


def test_size_and_folder(tmp_path):
    """The size in inches times the resolution; a folder that is missing is named."""
    figure = new_figure(2.0, 1.0)
    save(figure, tmp_path / "p.png")
    header = (tmp_path / "p.png").read_bytes()[16:24]
    assert (int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")) == (2 * DPI, DPI)
    with pytest.raises(OutputError, match="could not be written"):
        save(figure, tmp_path / "missing" / "p.png")
