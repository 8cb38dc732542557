"""What is computed of the model's state alone."""

import pytest
import torch

from sere_compile.passes.graph import nodes
from sere_compile.passes.graph.state import computed_of_state

from ..moe_modules import Indexed, from_make_fx, rows
from .written import Written


class Parts(Indexed):
    def forward(self, x):
        return x @ (self.experts[0] + self.router[:, :1].sum())


def test_sums_of_parts_are_and_products_with_activations_are_not():
    graph = from_make_fx(Parts(), rows())
    by_kind = {str(node.target): node for node in graph.graph.nodes}
    assert computed_of_state(by_kind["aten.add.Tensor"])
    assert not computed_of_state(by_kind["aten.mm.default"])
    assert torch.is_tensor(by_kind["aten.add.Tensor"].meta["val"])


def traced(function):
    """The graph of a function of (module, x), whose result is the operand of its last node but one."""

    class Made(Indexed):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.arange(6.0))
            self.register_buffer("written", torch.zeros(6))

        def forward(self, x):
            return function(self, x).neg()

    graph = from_make_fx(Made(), rows())
    [negated] = [node for node in graph.graph.nodes if nodes.kind(node) == "neg"]
    return nodes.operand(negated)


def far(tensor, steps):
    for _ in range(steps):
        tensor = tensor.sin()
    return tensor


@pytest.mark.parametrize(
    ("function", "of_state"),
    [
        (lambda m, x: m.experts, True),
        (lambda m, x: m.table * 2 + m.router[:1], True),
        (lambda m, x: x, False),
        (lambda m, x: m.table + x[:1], False),
        (lambda m, x: torch.zeros(3) + 1, False),
        (lambda m, x: torch.zeros(3, 6).add_(m.table), True),
        (lambda m, x: torch.zeros(10, 6).add_(x), False),
        (lambda m, x: torch.zeros_like(x) + m.table, True),
        (lambda m, x: far(m.table, 20), True),
        (lambda m, x: far(m.table, 40), False),
    ],
    ids=[
        "a parameter", "sums", "an activation", "both", "constants alone", "written", "written by an activation",
        "sizes of an activation", "near", "far",
    ],
)  # fmt: skip
def test_what_is_computed_of_state(function, of_state):
    assert computed_of_state(traced(function)) is of_state


class TestByHand:
    def test_how_far_a_parameter_may_be(self):
        """Twenty-three operations, of which each counts."""
        w = Written()
        node = w.weight(3)
        for _ in range(23):
            node = w.call(torch.sin, node)
        assert computed_of_state(node)
        assert not computed_of_state(w.call(torch.sin, node))

    def test_what_counts_is_met_once(self):
        w = Written()
        weight = w.weight(3)
        node = w.call(torch.add, weight, weight)
        for _ in range(15):
            node = w.call(torch.add, node, node)
        assert computed_of_state(node)

    def test_writes_before_and_after(self):
        """An activation that is written later is no part of what was read."""
        w = Written()
        x, memory = w.given(3), w.call(torch.clone, w.weight(3))
        before = w.call(torch.exp, memory)
        write = w.call("add_", memory, x)
        after = w.call(torch.exp, memory)
        assert computed_of_state(before)
        assert not computed_of_state(after)
        assert not computed_of_state(write)

    def test_sizes(self):
        """A number that a graph takes is none of the model's."""
        w = Written()
        size = w.input(3)
        assert not computed_of_state(w.call(torch.zeros, size))
        assert computed_of_state(w.call(torch.mul, w.weight(3), size))
        assert not computed_of_state(size)
