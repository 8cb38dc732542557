"""Programs in place of engines: what they wrote, how they ended, and which of their lines is the reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sere_compile.integrations.vllm.processes import OUT_OF_TIME, reason_of, run_processes, said

PROGRAM = """
import json, os, sys, time
case = json.loads(open(sys.argv[-2]).read())
open(sys.argv[-1], "w").write(json.dumps({"rank": os.environ["RANK_"], "seen": case["seen"], "given": sys.argv[1:-2]}))
print("SERE: from here")
if case["end"] == "slow":
    time.sleep(20)
if case["end"] == "fails":
    raise ValueError("this is why")
"""


def run(folder, end, seconds=20.0, ranks=1):
    (folder / "program.py").write_text(PROGRAM)
    variables = [{"PYTHONPATH": str(folder), "RANK_": str(rank)} for rank in range(ranks)]
    case = {"name": "an engine", "end": end, "seen": [1] * 200_000}
    return run_processes("program", case, seconds, folder / "log", variables, ["one"])


def test_each_process_says_what_it_found(tmp_path):
    """A case is longer than an argument of a command line may be."""
    ended = run(tmp_path, "well", ranks=2)
    assert (ended.status, ended.reason) == (0, "")
    assert [result["rank"] for result in ended.results] == ["0", "1"]
    assert all(result["given"] == ["one"] and len(result["seen"]) == 200_000 for result in ended.results)
    assert said(tmp_path / "log") == ["SERE: from here"]


def test_a_process_that_fails_keeps_what_it_had_written(tmp_path):
    ended = run(tmp_path, "fails")
    assert ended.status == 1
    assert ended.reason == "ValueError: this is why"
    assert ended.results[0]["rank"] == "0"


def test_a_process_that_takes_too_long_is_ended(tmp_path):
    ended = run(tmp_path, "slow", seconds=1.0)
    assert ended.status == ended.reason == OUT_OF_TIME
    assert run(tmp_path, "well").lines[-1] == "SERE: from here", "each has a part of the log of its own"


@pytest.mark.parametrize(("lines", "reason"), [
    (["(Worker pid=3) ERROR 11:12 [x.py:1] ValueError: too few", "RuntimeError: Engine core initialization failed."],
     "ValueError: too few"),
    (["torch.OutOfMemoryError: CUDA out of memory."], "torch.OutOfMemoryError: CUDA out of memory."),
    (["RuntimeError: Engine core initialization failed."], "RuntimeError: Engine core initialization failed."),
    (["usage: vllm ...", "vllm: error: unrecognized arguments: --quantisation"],
     "error: unrecognized arguments: --quantisation"),
    (["an engine", "Segmentation fault"], "its process ended with status -11: Segmentation fault"),
    ([], "its process ended with status -11"),
])  # fmt: skip
def test_the_reason_is_the_last_error_that_is_no_consequence(lines, reason):
    assert reason_of(-11, lines) == reason


def test_the_interpreter_is_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert run_processes("program", {"name": "broken"}, 5, Path(tmp_path / "log")).status == 1
