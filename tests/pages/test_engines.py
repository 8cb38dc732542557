"""Engines in processes of their own; real ones run in the lane `engine` of .ci/gpu."""

import sys
import textwrap

import pytest

from benchmarks import engines
from sere_compile.integrations.vllm import processes


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Write what stands for an engine's program; the module's name to run it by."""

    def write(text):
        (tmp_path / "made_up_engine.py").write_text(textwrap.dedent(text))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "made_up_engine"

    return write


def test_an_engine_that_fails_or_takes_too_long_says_so(tmp_path, capsys, monkeypatch):
    """With what it printed last; the others go on."""
    log = tmp_path / "log"
    monkeypatch.setattr(processes.sys, "executable", "/bin/false")
    run = engines.run({"name": "broken"}, 5, log)
    assert run.ranks is None
    assert run.result is None
    run.say("broken")
    assert capsys.readouterr().out.startswith("broken: FAILED\n    status 1: ")
    assert "=== broken" in log.read_text()
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 5\n")
    slow.chmod(0o755)
    monkeypatch.setattr(processes.sys, "executable", str(slow))
    assert engines.run({"name": "slow"}, 0.2, log).told == ["status out of time: out of time"]


ENGINE = """
    import json, os, pathlib, sys
    from sere_compile.benchmark.turns import Turns
    case = json.loads(pathlib.Path(sys.argv[2]).read_text())
    turn = Turns(case["turns"])
    print("INFO SERE: I am", case["name"], flush=True)
    if case["name"] == "bad, one":
        sys.exit("ValueError: bad")
    turn.ready()
    for _ in range(3):
        with turn():
            with open(case["model"], "a") as file:
                file.write(case["name"] + "\\n")
    pathlib.Path(sys.argv[3]).write_text(json.dumps({**case["engine"], "cache": os.environ["VLLM_CACHE_ROOT"]}))
"""


def test_engines_side_by_side_take_turns_and_one_that_fails_holds_nobody_up(tmp_path, monkeypatch, program):
    name, order, log = program(ENGINE.replace("\\\\n", "\\n")), tmp_path / "order", tmp_path / "log"
    monkeypatch.setattr(engines.run, "__defaults__", (*engines.run.__defaults__[:-1], name))
    cases = [{"name": n, "model": str(order), "engine": {"seed": 0}} for n in ("stock", "bad, one", "s1")]
    runs = engines.run_together(cases, 60, log)
    assert order.read_text().split() == ["stock", "s1"] * 3
    assert [run.ranks is None for run in runs] == [False, True, False]
    assert runs[1].told == ["status 1: ValueError: bad", "SERE: I am bad, one"]
    assert runs[2].told == ["SERE: I am s1"]
    results = [runs[0].result, runs[2].result]
    assert all(result.items() >= {"seed": 0, **engines.SIDE_BY_SIDE}.items() for result in results)
    assert len({result["cache"] for result in results}) == 2
    assert all(f"=== {case['name']}" in log.read_text() for case in cases)
    assert sys.modules.get(name) is None, "it ran in processes of its own"
