"""Engines of vLLM in processes of their own, one after the other or side by side on one device."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from sere_compile.benchmark.turns import Place, ended
from sere_compile.integrations.vllm.processes import run_processes, said

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
}
GIB = 1 << 30
# For engines side by side: each takes what it needs, where one alone takes nine tenths of the memory.
SIDE_BY_SIDE = {"gpu_memory_utilization": 0.02, "kv_cache_memory_bytes": 2 * GIB, "max_num_batched_tokens": 8192}
_appending = threading.Lock()


@dataclass(frozen=True)
class Run:
    """What became of an engine.

    Attributes:
        ranks: what each of its processes found; None where one failed, or time was over.
        told: for the reader: why it failed, or what SERE wrote into its log.
        backend: vLLM's name of the expert kernels that it chose; empty where its log has none.
    """

    ranks: list[dict[str, Any]] | None
    told: list[str] = field(default_factory=list)
    backend: str = ""

    @property
    def result(self) -> dict[str, Any] | None:
        """Of its first process."""
        return self.ranks[0] if self.ranks else None

    def say(self, name: str) -> None:
        """Print what is told."""
        if self.ranks is None:
            click.echo(f"{name}: FAILED")
        for line in self.told:
            click.echo(f"    {line}")


def run(
    case: dict[str, Any],
    seconds: float,
    log: Path,
    ranks: Sequence[dict[str, str]] = ({},),
    module: str = "benchmarks.vllm_gpu",
) -> Run:
    """An engine, each of whose ranks is a process with variables of its own; what they print is added to `log`."""
    common = {key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()}
    ptxas = Path("/usr/local/cuda/bin/ptxas")
    if ptxas.exists() and "TRITON_PTXAS_PATH" not in os.environ:
        common["TRITON_PTXAS_PATH"] = str(ptxas)
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "log"
        done = run_processes(module, case, seconds, own, [{**common, **variables} for variables in ranks], ["one"])
        told = [line[:200] for line in said(own)]
        backend = re.search(r"Using '?(\S+?)'? \S+ MoE backend", own.read_text(encoding="utf-8", errors="replace"))
        with _appending, log.open("a", encoding="utf-8") as file:
            file.write(own.read_text(encoding="utf-8", errors="replace"))
    if done.status == 0:
        return Run([result or {} for result in done.results], told, backend[1] if backend else "")
    return Run(None, [f"status {done.status}: {done.reason}", *told])


def run_together(cases: Sequence[dict[str, Any]], seconds: float, log: Path) -> list[Run]:
    """Engines side by side on one device; those that are timed take turns."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(cases)) as pool:
        places = [Place(folder=folder, index=index, of=len(cases)) for index in range(len(cases))]

        def one(case: dict[str, Any], place: Place) -> Run:
            # Engines that start at once would compile into the same files.
            cache = {"VLLM_CACHE_ROOT": f"{folder}/{re.sub('[^A-Za-z0-9]+', '-', case['name'])}"}
            engine = {**case["engine"], **SIDE_BY_SIDE}
            try:
                return run({**case, "engine": engine, "turns": place}, seconds, log, [cache])
            finally:
                ended(place)

        return list(pool.map(one, cases, places))
