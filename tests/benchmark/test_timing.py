"""What is timed, and how it is summed up."""

import pytest
import torch

from sere_compile.benchmark.timing import Timing, summarize, time_in_turn


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

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("wait"), raising=False)
    times = time_in_turn({"graph": Graph(), "eager": lambda: log.append("call")}, calls=2, rounds=2, warmup=0)
    assert log == ["wait", "event", "replay", "event", "event", "call", "event"] * 2
    assert times["graph"].median == pytest.approx(10.0)
