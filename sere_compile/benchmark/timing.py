"""Timing: variants in turn, medians and spread; CUDA graphs on a GPU, plain calls on a CPU."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Cycles: about 0.2 ms, several times what the host needs to launch a graph.
HEAD_START = 400_000


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, and the 20th and 80th percentile of all samples."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.1f} [{self.low:.1f} .. {self.high:.1f}]"


def summarize(samples: Sequence[float]) -> Timing:
    """The median and spread of at least two samples."""
    cuts = statistics.quantiles(samples, n=10)
    return Timing(statistics.median(samples), cuts[1], cuts[7])


def call_all(function: Callable[[Any], object], inputs: Sequence[Any]) -> None:
    """Call function(x) for each x of inputs."""
    for x in inputs:
        function(x)


@dataclass(frozen=True)
class Calls:
    """What stands for a CUDA graph on a CPU: a call of the function on each input."""

    function: Callable[[Any], object]
    inputs: Sequence[Any]
    outputs: list[Any] | None = None

    def replay(self) -> None:
        """Call it; `outputs` takes the results."""
        results = [self.function(x) for x in self.inputs]
        if self.outputs is not None:
            self.outputs[:] = results


Run = Callable[[], object] | torch.cuda.CUDAGraph | Calls


def capture(
    function: Callable[[Any], object], inputs: Sequence[Any], outputs: list[Any] | None = None
) -> torch.cuda.CUDAGraph | Calls:
    """A CUDA graph of a call of the function on each input, after warm-up calls; plain calls without a GPU.

    `outputs` takes the results; each replay writes to them.
    """
    if not torch.cuda.is_available():
        function(inputs[0])  # compiles
        return Calls(function, inputs, outputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(3):
            function(inputs[index % len(inputs)])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            result = function(x)
            if outputs is not None:
                outputs.append(result)
    return graph


def time_in_turn(
    runs: Mapping[str, Run], calls: int, rounds: int, warmup: int = 3, before: Callable[[str], None] = lambda name: None
) -> dict[str, Timing]:
    """Time every run once per round, so that a drift of the clocks affects all of them alike.

    Args:
        runs: what to time. A GPU waits while the host launches a graph, so that its time is the device's alone; a
            function, such as an eager model, is timed with what the host does. A CPU times all of them by its clock.
        calls: number of calls of the measured function in one run; the times are divided by it.
        rounds: samples per run.
        warmup: rounds before these, not counted.
        before: called with the name of each run ahead of it, off the clock.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    measure = _on_gpu if torch.cuda.is_available() else _on_cpu
    for index in range(warmup + rounds):
        for name, run in runs.items():
            before(name)
            seconds = measure(run)
            if index >= warmup:
                samples[name].append(seconds * 1e6 / calls)
    return {name: summarize(times) for name, times in samples.items()}


def _on_gpu(run: Run) -> float:
    """Seconds between two events of the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if isinstance(run, torch.cuda.CUDAGraph):
        torch.cuda._sleep(HEAD_START)
        run = run.replay
    start.record()
    run()  # type: ignore[operator]
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _on_cpu(run: Run) -> float:
    """Seconds of the wall clock."""
    call = run.replay if isinstance(run, Calls) else run
    start = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - start


def machine_name() -> str:
    """The GPU, or the CPU with the number of threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads != 1)}"


def cache_bytes() -> int:
    """Size of the GPU's L2 cache, or of the CPU's last-level cache; 0 if the system does not say."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties().L2_cache_size)
    with contextlib.suppress(ValueError, OSError):
        return max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), 0)
    return 0


def copy_bandwidth(gigabytes: float | None = None) -> float:
    """Bytes per second that a copy of this size (4 GB on a GPU, 0.5 on a CPU) moves, read and written bytes counted.

    By a kernel (one that negates bits on the way): a copy in a CUDA graph may go to the copy engine, which is slower.
    """
    device, size = ("cuda", 4.0) if torch.cuda.is_available() else ("cpu", 0.5)
    source = torch.empty(int((gigabytes or size) * 1e9) // 8, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    graph = capture(lambda x: torch.bitwise_not(x, out=target), [source])
    timing = time_in_turn({"copy": graph}, 1, 10)["copy"]
    return 2 * source.nbytes / (timing.median * 1e-6)
