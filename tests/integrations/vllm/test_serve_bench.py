"""`sere serve-bench` with real engines: each in a process of its own, and the loss in another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from . import models

pytestmark = pytest.mark.vllm


def run(folder, *arguments):
    command = [sys.executable, "-m", "sere_compile", "serve-bench", *map(str, arguments), "--log", folder / "log"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400, check=False)


def test_times_active_experts_and_losses_of_a_trained_model(tmp_path):
    """From prompts of a text, with options of vLLM and of the plug-in."""
    text = tmp_path / "text.txt"
    text.write_text(models.TEXT * 20)
    done = run(
        tmp_path, "--model", "qwen3", "--batch", 8, "--select-top-k", 1, "--substitution", "fill", "--text", text,
        "--input-len", 12, "--output-len", 41, "--length", 16, "--sequences", 16, "--min-active", 0,
        "--dtype", "float32", "--max-model-len", 64, "--json", "r.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr + Path(tmp_path / "log").read_text()[-3000:]
    found = json.loads((tmp_path / "r.json").read_text())
    alone, fill = found["rows"]
    assert (alone["variant"], alone["speedup"], alone["active"], alone["loss"]) == ("vLLM", None, None, None)
    assert fill["variant"] == "S = 1, fill"
    # Other processes of the machine may make single runs of so small a model anything.
    assert all(row["ms"] == sorted(row["ms"]) and row["tokens_per_s"] > 0 for row in (alone, fill))
    assert fill["speedup"] is None or fill["speedup"] == pytest.approx(alone["ms"][1] / fill["ms"][1])
    before, after = fill["active"]
    assert 1 < after < before <= 32
    # Of the same rule at the same batch: experts that the text activates in transformers, not far from the engine's.
    assert fill["loss"]["rule"] == "fill"
    assert fill["loss"]["perplexity_change"] > 0
    assert abs(fill["loss"]["active_after"] - after) < 4
    assert (found["dtype"], found["left_out"]) == ("float32", [])
    assert "vLLM 0." in found["machine"]
    assert "transformers' model in float32" in found["quality"]
    assert any("SERE re-routes 4 of 4 MoE layers" in note for note in found["notes"])


def test_what_vllm_does_not_know_is_one_error(tmp_path):
    """As a misspelt option of ours; and what switches SERE on belongs to --sere."""
    done = run(tmp_path, "--model", "qwen3", "--sustitution", "fill", "--no-active")
    assert done.returncode == 1
    assert "takes what it was given: error: unrecognized arguments: --sustitution fill" in done.stderr
    switched = ["--additional-config", '{"sere": {"select_top_k": 1}}', "--enforce-eager"]
    done = run(tmp_path, "--model", "qwen3", "--batch", 2, "--select-top-k", "K", "--no-active", *switched)
    assert "Left out: vLLM: sere_compile.errors.ConfigError: the engine without SERE was given options" in done.stdout
