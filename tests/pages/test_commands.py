"""Every module of benchmarks/ that is run as a command says what it takes, on a machine without a GPU too."""

import importlib
import sys
from pathlib import Path

import pytest

import benchmarks

FOLDER = Path(benchmarks.__file__).parent
MODULES = sorted(
    "benchmarks." + ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", MODULES)
def test_help(module, monkeypatch, capsys):
    command = importlib.import_module(module)
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"python -m {module}" in text, "the docstring says how it is run"


def test_the_page_of_benchmarks_lists_them():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [module for module in MODULES if f"`python -m {module}" not in page] == []
    assert len(MODULES) >= 9
