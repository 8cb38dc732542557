"""The command, as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest

from .draws import drawn
from .program import GATE
from .verdicts import FAILURES, VERDICTS

ROOT = Path(__file__).parents[2]


def command(*arguments):
    call = [sys.executable, "-m", "tests.generated.run", *arguments]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_many(tmp_path):
    """A table, a log with a line for each program, and an exit status that says whether one failed."""
    log, failures = tmp_path / "log", tmp_path / "failures.md"
    sizes = ["--gates", "2", "--look-alikes", "2", "--seed", "3", "--jobs", "2", "--shrink", "0"]
    done = command(*sizes, "--log", str(log), "--failures", str(failures))
    words = [line.split("\t")[1] for line in log.read_text().splitlines()]
    assert len(words) == 4, done.stderr
    assert set(words) <= set(VERDICTS)
    assert "2 gates" in done.stdout
    assert "2 look-alikes" in done.stdout
    failed = sum(word in FAILURES for word in words)
    assert done.returncode == bool(failed)
    assert f"{failed} failures are not shrunk" in failures.read_text()


@pytest.mark.slow
def test_one():
    """The source, what was drawn, and the verdict."""
    done = command("--kind", GATE, "--seed", "3")
    assert drawn(GATE, 3).text in done.stdout
    assert done.stdout.splitlines()[-1].split(": ")[0] in VERDICTS
