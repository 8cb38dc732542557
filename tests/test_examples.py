"""The examples run as a user runs them; each checks itself against an eager oracle and says so."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from sere_compile.integrations.transformers import SHIPPED

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral.py", pytest.param("qwen_moe.py", marks=pytest.mark.slow)])
def test_example(name):
    """Exit status 0, the report, continuations, active experts, rewritten code, and the oracle's word."""
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 MoE gates found, 4 rewritten" in done.stdout
    # Real text: what a trained model says after these words, not noise.
    before = re.findall(r"without SERE  (.*)", done.stdout)
    assert len(before) == 8
    known = re.compile(r"\b(self|import|the|of|to|her|was|a|str|args)\b")
    assert sum(bool(known.search(text)) for text in before) >= 6
    assert done.stdout.count("with SERE     ") == 8
    assert "torch.ops.sere.reroute.default(" in done.stdout
    assert done.stdout.rstrip().endswith("equal")


@pytest.mark.slow
def test_export_onnx(tmp_path):
    """The main path of the ONNX lowering, on a trained model: run for other sizes than traced, equal, the file kept."""
    command = [sys.executable, EXAMPLES / "export_onnx.py", "--as-function", "--out", tmp_path / "model.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 gates re-routed, opset 18" in done.stdout
    assert done.stdout.rstrip().endswith("equal")
    assert (tmp_path / "model.onnx").exists()


@pytest.mark.slow
def test_example_fails_when_the_oracle_differs(tmp_path):
    """A broken re-routing makes the example exit with 1: its check is not for show."""
    sabotage = tmp_path / "broken.py"
    sabotage.write_text(
        "import sys, runpy\n"
        f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import sere_compile.testing as testing\n"
        "testing.reroute_oracle = lambda ids, *rest: ids.flip(-1)\n"
        f"runpy.run_path({str(EXAMPLES / 'mixtral.py')!r}, run_name='__main__')\n"
    )
    arguments = [sys.executable, sabotage, "--new-tokens", "2"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "the compiled model differs from the oracle" in done.stderr


@pytest.mark.slow
def test_continuous_batching():
    """Real text for every prompt, and re-routing changes some of it."""
    command = [sys.executable, EXAMPLES / "continuous_batching.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (re.findall(rf"{name}  (.*)", done.stdout) for name in ("unchanged", "re-routed"))
    assert len(before) == len(after) == 6
    assert before != after


@pytest.mark.slow
def test_transformers_serve():
    """The server answers with real text, and our experts ran: they say that nothing was attached."""
    for needed in ("fastapi", "uvicorn"):
        pytest.importorskip(needed, reason="needs transformers[serving]")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, EXAMPLES / "transformers_serve.py", "serve", SHIPPED / "qwen3", "--continuous-batching"]
    command += ["--port", str(port), "--cb-num-blocks", "64", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            answers = [_completion(port, prompt) for prompt in ("She had been", "import os\nimport")]
        finally:
            server.terminate()
        said = server.communicate(timeout=60)[0]
    assert all(re.search(r"\b(her|and|the|os|to|of)\b", answer) for answer in answers), said
    assert "no similarity profile is attached: experts are probed" in said


def _completion(port, prompt):
    """What the server makes of a prompt, as soon as it is there."""
    body = {"model": str(SHIPPED / "qwen3"), "prompt": prompt, "max_tokens": 12, "temperature": 0}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    end = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)["choices"][0]["text"]
        except urllib.error.URLError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


@pytest.mark.slow
def test_notebook():
    """Every cell runs, top to bottom, in a fresh kernel; gates are found and fewer experts are active."""
    client, notebooks = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = notebooks.read(EXAMPLES / "quick_start.ipynb", as_version=4)
    client.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "4 MoE gates found, 4 rewritten" in printed
    active = re.findall(r"([\d.]+) -> ([\d.]+) active experts per step", printed)
    assert len(active) == 4
    assert all(float(after) < float(before) for before, after in active)
    assert printed.count("perplexity") == 3
