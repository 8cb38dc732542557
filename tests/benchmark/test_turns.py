"""Who works when, in threads that stand for processes."""

from __future__ import annotations

import threading
import time

import pytest

from sere_compile.benchmark import turns as module
from sere_compile.benchmark.turns import Turns, ended


def place(folder, index, of=3):
    return {"folder": str(folder), "index": index, "of": of}


def worker(folder, index, rounds, order, pause=0.0):
    turn = Turns(place(folder, index))
    time.sleep(pause)
    turn.ready()
    for _ in range(rounds):
        with turn():
            order.append(("begins", index))
            time.sleep(0.01)
            order.append(("ends", index))


def run_all(workers):
    threads = [threading.Thread(target=target, args=args, daemon=True) for target, *args in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive(), "it waits for ever"


def test_one_at_a_time_each_after_the_one_before(tmp_path):
    """Also where the last one is ready late, and the first has gone ahead of nobody."""
    order: list[tuple[str, int]] = []
    run_all([(worker, tmp_path, index, 3, order, 0.1 * index) for index in range(3)])
    assert order == [(word, index) for _ in range(3) for index in range(3) for word in ("begins", "ends")]


def test_nobody_waits_for_one_that_has_ended(tmp_path):
    order: list[tuple[str, int]] = []

    def ends_early(folder, index):
        worker(folder, index, 1, order)
        ended(place(folder, index))

    run_all([(worker, tmp_path, 0, 3, order), (ends_early, tmp_path, 1), (worker, tmp_path, 2, 3, order)])
    assert [index for word, index in order if word == "begins"] == [0, 1, 2, 0, 2, 0, 2]


def test_a_turn_that_fails_is_over_too(tmp_path):
    turn, other = Turns(place(tmp_path, 0, of=2)), Turns(place(tmp_path, 1, of=2))
    turn.ready()
    other.ready()
    with pytest.raises(ZeroDivisionError), turn():
        raise ZeroDivisionError
    with other():
        pass


def test_a_process_alone_never_waits(monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda _: pytest.fail("waited"))
    turn = Turns(None)
    turn.ready()
    with turn():
        pass
