"""Which tensors are the experts' parameters."""

import torch

from sere_compile.passes.proof.expert_parameters import ExpertParameters, Stack

MAP = torch.tensor([0, 0, 2])


def test_blocks_and_turns():
    """[E * width] with each expert's rows together, or every E-th row an expert's."""
    assert Stack(0, 3).places(6, MAP).tolist() == [0, 1, 0, 1, 4, 5]
    assert Stack(0, 3, in_turn=True).places(6, MAP).tolist() == [0, 0, 2, 3, 3, 5]


def test_rows_that_are_no_experts_stay():
    assert Stack(0, 4).places(4, MAP).tolist() == [0, 0, 2, 3]


def test_lists_exchange_whole_tensors():
    values = {"a": torch.zeros(1), "b": torch.ones(1), "c": torch.full((1,), 2.0)}
    swapped = ExpertParameters(lists=[{0: "a", 1: "b", 2: "c"}]).swapped(values, MAP)
    assert [float(swapped[name]) for name in "abc"] == [0.0, 0.0, 2.0]
