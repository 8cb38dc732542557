"""`sere serve-bench` without vLLM: what its options become; engines are made up."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner

from sere_compile.benchmark import serving
from sere_compile.cli import main
from sere_compile.commands import serve_bench

from ..benchmark.test_serving import Engines


@pytest.fixture
def engines(monkeypatch, tmp_path):
    made = Engines()
    monkeypatch.setattr(serving, "run_processes", made)
    monkeypatch.setattr(serve_bench, "_require_vllm", lambda: None)
    monkeypatch.chdir(tmp_path)
    return made


def invoke(*arguments):
    return CliRunner().invoke(main, ["serve-bench", *map(str, arguments)])


def test_times_losses_and_every_file(engines, checkpoint, tmp_path):
    """With prompts and losses of a text, and options of vLLM that go to every engine as they are."""
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    files = [tmp_path / name for name in ("r.json", "r.png", "r.html")]
    done = invoke(
        "--model", checkpoint / "model", "--batch", "8,32", "--select-top-k", "K,1", "--substitution", "reroute,fill",
        "--text", checkpoint / "text.jsonl", "--input-len", 4, "--output-len", 20, "--min-active", 0,
        "--quantization", "fp8", "--max-model-len=64", "-tp", "2", "--profile", checkpoint / "profile.safetensors",
        "--sere", '{"phase": "all"}', "--json", files[0], "--plot", files[1], "--html", files[2],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    told = [case for _, case in engines.told]
    assert [case["name"] for case in told][:4] == ["vLLM", "S = K", "S = 1, reroute", "S = 1, fill"]
    assert told[0]["options"] == ["--quantization", "fp8", "--max-model-len=64", "-tp", "2"]
    assert told[0]["sere"] is None
    assert told[3]["sere"] == {
        "phase": "all", "min_active": 0, "profile": str(checkpoint / "profile.safetensors"), "select_top_k": 1,
        "substitution": "fill",
    }  # fmt: skip
    assert [len(prompt) for prompt in told[0]["prompts"]] == [4] * 32
    assert (told[-1]["sequences"], told[-1]["text"]) == (128, [str(checkpoint / "text.jsonl")])
    assert "| 8 | S = 1, fill | 2.00 [1.00 .. 3.00] | 1.00x (runs overlap) |" in done.stdout
    assert "engines quantise them: fp8" in done.stdout
    assert json.loads(files[0].read_text())["rows"][3]["active"] == [20.0, 8.0]
    assert all(file.stat().st_size > 1000 for file in files)


@pytest.mark.parametrize(("arguments", "reason"), [
    ([], "without --text there is nothing to measure it on"),
    (["--text", "t.jsonl", "--load-format", "dummy"], "--load-format dummy makes up the weights"),
    (["--text", "t.jsonl", "--load_format=dummy"], "--load-format dummy makes up the weights"),
    (["--text", "t.jsonl", "--no-loss"], "--no-loss"),
])  # fmt: skip
def test_a_loss_that_is_not_measured_is_said_to_be(engines, checkpoint, arguments, reason):
    given = [checkpoint / "text.jsonl" if word == "t.jsonl" else word for word in arguments]
    done = invoke("--model", checkpoint / "model", "--batch", "8,32", "--input-len", 4, "--no-active", *given)
    assert done.exit_code == 0, done.output
    assert f"quality: not measured: {reason}" in done.stdout
    assert [case["name"] for _, case in engines.told] == ["vLLM", "S = 2, reroute", "S = 1, reroute"]


def test_the_packages_model_is_its_folder(engines):
    assert invoke("--model", "qwen3", "--select-top-k", 1, "--no-active", "--batch", "8,32").exit_code == 0
    assert engines.told[0][1]["model"].endswith("models/qwen3")
    assert engines.told[0][1]["prompts"] is None


def test_an_engine_that_fails_shows_in_the_exit_status(engines):
    engines.fail = {"S = 1, reroute": (1, False)}
    done = invoke("--model", "m", "--select-top-k", 1, "--batch", "8,32")
    assert done.exit_code == 1
    assert "Left out: S = 1, reroute: because of 1" in done.stdout
    assert "| 8 | vLLM |" in done.stdout
    assert "what engines printed: serve-bench.log" in done.stderr


def test_an_option_that_nobody_knows_is_an_error(engines):
    engines.fail = {"vLLM": (serving.USAGE, False)}
    done = invoke("--model", "m", "--sustitution", "fill", "--batch", "8,32")
    assert done.exit_code == 1
    assert "neither sere serve-bench nor vLLM's engine takes what it was given" in done.output


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["--select-top-k", "0"], 2, "is not a list of positive whole numbers, or K"),
    (["--substitution", "refill"], 2, "is not a list of rules, of reroute, projection, fill"),
    (["--sere", "{"], 2, "is not JSON"),
    (["--sere", "[1]"], 2, "is not a dict of options"),
    (["--sere", '{"select_top_k": 1}'], 2, "--sere: select_top_k is what this command sets"),
    (["--sere", '{"phases": "all"}'], 1, "unknown option 'phases' of sere; did you mean 'phase'"),
    (["--threshold", "q2"], 1, "threshold"),
    (["--output-len", "9"], 2, "9 is not in the range x>=10"),
    (["--text", "missing.txt"], 1, "missing.txt"),
])  # fmt: skip
def test_wrong_options(engines, arguments, code, message):
    done = invoke("--model", "qwen3", *arguments)
    assert done.exit_code == code
    assert message in done.output
    assert not engines.told


def test_without_vllm_the_command_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    done = invoke("--model", "qwen3")
    assert done.exit_code == 1
    assert "sere serve-bench needs vllm: pip install 'sere-compile[vllm]'" in done.output
