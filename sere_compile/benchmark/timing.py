"""Timing on a CUDA device: variants in turn, CUDA graphs, medians and spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


def capture(
    function: Callable[[Any], object], inputs: Sequence[Any], outputs: list[Any] | None = None
) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a call of the function on each input, after three warm-up calls on a side stream.

    `outputs` takes the results; each replay writes to them.
    """
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
    runs: Mapping[str, Callable[[], object] | torch.cuda.CUDAGraph], calls: int, rounds: int, warmup: int = 3
) -> dict[str, Timing]:
    """Time every run once per round, with CUDA events, so that a drift of the clocks affects all of them alike.

    Args:
        runs: what to time. The device waits while the host launches a graph, so that its time is the device's alone;
            a function, such as an eager model, is timed with what the host does.
        calls: number of calls of the measured function in one run; the times are divided by it.
        rounds: samples per run.
        warmup: rounds before these, not counted.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for index in range(warmup + rounds):
        for name, run in runs.items():
            if isinstance(run, torch.cuda.CUDAGraph):
                torch.cuda._sleep(HEAD_START)
                run = run.replay
            start.record()
            run()
            end.record()
            end.synchronize()
            if index >= warmup:
                samples[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: summarize(times) for name, times in samples.items()}


def cache_bytes() -> int:
    """Size of the device's L2 cache."""
    return int(torch.cuda.get_device_properties().L2_cache_size)


def copy_bandwidth(gigabytes: float = 4.0) -> float:
    """Bytes per second that a device-to-device copy of this size moves, read and written bytes counted.

    By a kernel (one that negates bits on the way): a copy in a CUDA graph may go to the copy engine, which is slower.
    """
    source = torch.empty(int(gigabytes * 1e9) // 8, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    graph = capture(lambda x: torch.bitwise_not(x, out=target), [source])
    timing = time_in_turn({"copy": graph}, 1, 10)["copy"]
    return 2 * source.nbytes / (timing.median * 1e-6)
