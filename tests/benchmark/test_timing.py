"""What is timed, and how it is summed up."""

import re

import pytest
import torch

from sere_compile.benchmark.timing import (
    Calls,
    Timing,
    cache_bytes,
    capture,
    copy_bandwidth,
    machine_name,
    summarize,
    time_in_turn,
)


def test_summary_is_median_and_spread():
    assert summarize([5.0, 1.0, 2.0, 3.0, 4.0]) == Timing(3.0, pytest.approx(1.2), pytest.approx(4.8))


def test_the_launch_of_a_graph_is_not_timed(monkeypatch):
    """The device waits before the first event of a graph; a function is timed with what the host does."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 0.02

    class Graph:
        def replay(self):
            log.append("replay")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("wait"), raising=False)
    times = time_in_turn({"graph": Graph(), "eager": lambda: log.append("call")}, calls=2, rounds=2, warmup=0)
    assert log == ["wait", "event", "replay", "event", "event", "call", "event"] * 2
    assert times["graph"].median == pytest.approx(10.0)


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_calls_stand_for_a_graph_on_a_cpu(on_a_cpu):
    """They run on what the inputs hold by then, and a replay replaces the results."""
    inputs, results = [torch.ones(2), torch.zeros(2)], []
    graph = capture(lambda x: x + 1, inputs, results)
    assert isinstance(graph, Calls)
    graph.replay()
    inputs[0].fill_(5.0)
    graph.replay()
    assert [x.tolist() for x in results] == [[6.0, 6.0], [1.0, 1.0]]


def test_a_cpu_takes_turns_by_the_clock(on_a_cpu, monkeypatch):
    """Microseconds per call; rounds of warm-up are not counted."""
    order, clock = [], iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock) * 1e-3)
    runs = {"calls": Calls(order.append, ["graph"]), "eager": lambda: order.append("call")}
    times = time_in_turn(runs, calls=2, rounds=2, warmup=1)
    assert order == ["graph", "call"] * 3
    assert [times[name].median for name in runs] == pytest.approx([500.0, 500.0])


def test_a_cpu_is_named(on_a_cpu):
    """With its threads, its cache and how fast it copies."""
    assert re.search(rf", {torch.get_num_threads()} threads?$", machine_name())
    assert cache_bytes() >= 0
    assert copy_bandwidth(0.001) > 1e6  # however busy the machine is
