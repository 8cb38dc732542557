"""What the simulation of docs/parallel.md claims, and that the page says what it gives."""

from __future__ import annotations

import pytest
import torch

from benchmarks import parallel_simulation as simulation

FIRST = (128, 8, 4)  # E, ranks, batch per rank


@pytest.mark.parametrize(("ranks", "batch", "experts"), [(8, 2, 128), (4, 5, 32)])
def test_agreeing_reads_the_same_experts_and_keeps_more(ranks, batch, experts):
    """Where `min_active` does not act: every primary expert of a rank is read, whoever decides, and no other is."""
    generator = torch.Generator().manual_seed(0)
    ids, matrix = simulation.draw(ranks * batch, experts, generator), simulation.similarity(experts, generator)
    alone = simulation.per_rank(ids, matrix, ranks, 0)
    agreed = simulation.RULES["agreed"](ids, matrix, ranks)
    assert set(ids[:, 0].tolist()) == set(alone.flatten().tolist()) == set(agreed.flatten().tolist())
    assert simulation.loads(ids, agreed, matrix, ranks).kept > simulation.loads(ids, alone, matrix, ranks).kept
    balanced = simulation.balanced(ids, matrix, ranks)
    assert set(balanced.flatten().tolist()) == set(agreed.flatten().tolist())


def test_balancing_sends_slots_elsewhere():
    generator = torch.Generator().manual_seed(0)
    ids, matrix = simulation.draw(32, 128, generator), simulation.similarity(128, generator)
    rules = [simulation.RULES[name] for name in ("agreed", "agreed, balanced")]
    found = [simulation.loads(ids, rule(ids, matrix, 8), matrix, 8) for rule in rules]
    assert found[0].rows != found[1].rows
    assert found[0].active == found[1].active


def test_loads_are_counted_by_rank():
    """Four experts on two ranks."""
    old, new = torch.tensor([[0, 3], [1, 3]]), torch.tensor([[0, 1], [1, 1]])
    matrix = torch.eye(4).masked_fill(torch.eye(4) == 0, 0.5)
    assert simulation.loads(old, old, matrix, 2) == simulation.Loads(1.5, 2.0, 1.0, 1.0)
    assert simulation.loads(old, new, matrix, 2) == simulation.Loads(1.0, 2.0, 2.0, 0.75)


def test_the_page_says_what_the_simulation_gives():
    experts, ranks, batch = FIRST
    written = simulation.read()
    expected = [(e, r, b) for e in simulation.EXPERTS for r in simulation.RANKS for b in simulation.ROWS]
    assert list(written) == expected
    assert written[FIRST] == simulation.row(experts, ranks, batch, simulation.simulate(ranks, batch, experts))
    assert simulation.PICTURE.stat().st_size < 200_000


@pytest.mark.slow
def test_a_picture_is_drawn_the_same_each_time(tmp_path):
    loads = dict.fromkeys(simulation.RULES, simulation.Loads(1.0, 2.0, 1.0, 1.0))
    found = {(e, r, b): loads for e in simulation.EXPERTS for r in simulation.RANKS for b in simulation.BATCHES}
    for name in ("a.svg", "b.svg"):
        simulation.draw_picture(found, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
