"""No lookalike is taken for a gate, in two tracers, alone and beside a real MoE layer with as many experts."""

import pytest
import torch
from torch import nn

from sere_compile.passes import find_gates
from sere_compile.passes.graph import nodes

from ..passes.moe_modules import Grouped, ScatterCombine, from_dynamo, from_make_fx
from .negatives import EXPERTS, HIDDEN, NEGATIVES, TOKENS, Lookalike

# Taken for gates today: an entry goes when the matcher knows better, and the test insists on it.
KNOWN: frozenset[str] = frozenset()
# Their results have no shape that could be added to hidden states.
BY_THEMSELVES = {"multi_label_statistics", "median_filter"}


def cases():
    for name in NEGATIVES:
        known = pytest.mark.xfail(name in KNOWN, reason="taken for a gate", strict=True)
        yield pytest.param(name, marks=known)


class BesideExperts(nn.Module):
    """A real MoE layer first, then the lookalike on its output."""

    def __init__(self, name):
        super().__init__()
        self.moe, self.other = Grouped(), Lookalike(name)

    def forward(self, x):
        y = self.moe(x)
        return y, self.other(y)


class BeforeExperts(nn.Module):
    """The lookalike first, its result part of the hidden states that a real MoE layer gets."""

    def __init__(self, name):
        super().__init__()
        self.other, self.moe = Lookalike(name), ScatterCombine()

    def forward(self, x):
        y = self.other(x).to(x.dtype)
        if y.shape != x.shape:
            y = y.flatten(1).mean(1, keepdim=True) if y.dim() > 1 and len(y) == len(x) else y.mean()
        return self.moe(x + y)


def rows():
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0))


def names(graph):
    return [str(gate.selection) for gate in find_gates(graph, lambda weight, experts: False).gates]


def test_there_are_many():
    assert len(NEGATIVES) >= 30


@pytest.mark.parametrize("name", list(cases()))
def test_lookalike_is_no_gate(name):
    """Zero matches in the graphs of Dynamo and make_fx."""
    for trace in (from_dynamo, from_make_fx):
        assert names(trace(Lookalike(name), rows())) == [], trace.__name__


@pytest.mark.parametrize("name", list(cases()))
def test_only_the_gate_beside_it_is_found(name):
    """With experts in the same graph, as many as the lookalike selects from, the one match is theirs."""
    graph = from_dynamo(BesideExperts(name), rows())
    found = find_gates(graph).gates
    assert len(found) == 1, [str(gate.selection) for gate in found]
    assert "other" not in found[0].router_weight.name
    assert found[0].num_experts == EXPERTS


@pytest.mark.parametrize("name", [case for case in cases() if case.values[0] not in BY_THEMSELVES])
def test_only_the_gate_behind_it_is_found(name):
    """What is made of the lookalike's ids runs through the experts as hidden states, not as a choice of them."""
    found = find_gates(from_make_fx(BeforeExperts(name), rows())).gates
    assert len(found) == 1, [str(gate.selection) for gate in found]
    # The lookalike's parameters come first.
    assert nodes.shape(found[0].router_weight) == (EXPERTS, HIDDEN)
    assert found[0].dispatch == "unknown dispatch"
