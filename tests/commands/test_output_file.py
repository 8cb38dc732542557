"""Files that cannot be written are refused before the work: there is no model here, and none is missed."""

from __future__ import annotations

import sys

import pytest
from click.testing import CliRunner

from sere_compile.cli import main

TEXT = ["--data", "none.txt"]
COMMANDS = {
    "bench --json": ["bench", "--geometry", "mixtral-8x7b", "--json"],
    "bench --plot": ["bench", "--geometry", "mixtral-8x7b", "--plot"],
    "calibrate --out": ["calibrate", "--model", "none", "--out"],
    "calibrate --resume": ["calibrate", "--model", "none", *TEXT, "--out", "profile", "--resume"],
    "compare --csv": ["compare", "--model", "none", *TEXT, "--profile", "none", "--csv"],
    "export --out": ["export", "--to", "exported", "--model", "none", "--out"],
    "plot -o": ["plot", __file__, "-o"],
    "report -o": ["report", "--model", "none", *TEXT, "-o"],
    "sweep --csv": ["sweep", "--model", "none", *TEXT, "--profile", "none", "--csv"],
    "sweep --plot": ["sweep", "--model", "none", *TEXT, "--profile", "none", "--plot"],
}
PICTURES = ["bench --plot", "plot -o", "sweep --plot"]


def refused(name, path):
    """What a command says about the path."""
    done = CliRunner().invoke(main, [*COMMANDS[name], str(path)])
    assert done.exit_code == 2, done.output
    error = done.output[done.output.index("Error: ") :].strip()
    assert error.startswith("Error: Invalid value for ")
    assert f"{name.split()[1]}'" in error
    return error


@pytest.mark.parametrize("name", COMMANDS)
def test_a_path_that_takes_no_file(name, tmp_path, monkeypatch):
    """A missing folder, one in which files cannot be made, and a name too long."""
    monkeypatch.chdir(tmp_path)
    if name in PICTURES:
        pytest.importorskip("matplotlib")
    suffix = {"calibrate": ".safetensors", "report": ".html", "export": ".pt2"}.get(name.split()[0], ".png")
    assert f"there is no folder {tmp_path / 'missing'}" in refused(name, tmp_path / "missing" / f"file{suffix}")
    assert f"/proc/file{suffix} could not be written: " in refused(name, f"/proc/file{suffix}")
    assert "could not be written: File name too long" in refused(name, tmp_path / f"{'n' * 252}{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    assert "is a folder; give the name of a file" in refused(name, f"folder{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"folder{suffix}"]


def test_a_name_that_is_no_page():
    assert refused("report -o", "report.pdf").endswith("'report.pdf': a page is an .html file")


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("path", ["picture.xyz", "picture", "picture.pgf"])
def test_a_name_that_is_no_picture(name, path, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    error = refused(name, path)
    assert f"{path!r} does not end in one of " in error
    assert {".png,", ".svg,", ".pdf,"} < set(error.split())


@pytest.mark.parametrize("name", PICTURES)
def test_without_matplotlib_the_error_names_the_extra(name, tmp_path, monkeypatch):
    for module in [*sys.modules]:
        if module.partition(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'sere-compile[plot]'" in refused(name, tmp_path / "picture.png")
