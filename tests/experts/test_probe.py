"""What is refused before anything runs: experts of which one rank has a part. What probing gives: tests/compiler."""

from __future__ import annotations

import pytest
from torch import nn

from sere_compile import ProbeError
from sere_compile.experts.probe import find_dispatch, probe_gate
from sere_compile.passes import Skip, SkipReason, extract_dispatch

from ..passes.moe_modules import Indexed, from_dynamo, one_gate, rows
from ..passes.proof.test_parts import OwnExperts, Summed, mesh  # noqa: F401
from ..passes.test_verify_rewrite import weights_of


def dispatch_of(module, beside=None, *, in_graph=True):
    graph = from_dynamo(module, rows())
    gate = one_gate(graph)
    region = extract_dispatch(gate) if in_graph else Skip(SkipReason.NO_EXIT, gate.ids)
    weight = module.router
    return find_dispatch(gate, region, "gate", weight, lambda: beside, weights_of(graph), "Attach a profile")


@pytest.mark.parametrize("kind", [OwnExperts, Summed])
def test_a_dispatch_of_a_part_of_the_experts(mesh, kind):  # noqa: F811
    """It gives zeros for the others, which would all be alike, or waits for the rank that has them."""
    with pytest.raises(ProbeError, match="spread over ranks, and one rank cannot measure them: attach a profile"):
        dispatch_of(kind(mesh))


def test_an_experts_module_with_parts(mesh):  # noqa: F811
    with pytest.raises(ProbeError, match="by one rank: experts is spread over ranks; attach a profile to every rank"):
        dispatch_of(Indexed(), OwnExperts(mesh), in_graph=False)


def test_a_whole_experts_module():
    dispatch, _ = dispatch_of(Indexed(), nn.Identity(), in_graph=False)
    assert callable(dispatch)


def test_an_experts_module_raises_what_it_likes():
    """It may fail an `assert` on what nobody but a measurement gives it."""

    def experts(hidden, ids, weights):
        assert ids.shape[1] > 99, "a slot is missing"

    graph = from_dynamo(module := Indexed(), rows())
    gate = one_gate(graph)
    outside, held = Skip(SkipReason.NO_EXIT, gate.ids), weights_of(graph)
    with pytest.raises(ProbeError, match=r"states they raise AssertionError: a slot is missing\. Attach a profile"):
        probe_gate(gate, outside, "gate", module.router, lambda: experts, held, "Attach a profile")
