"""Which experts run on how many tokens, and what decides that they are the right ones."""

from __future__ import annotations

import pytest
import torch

from sere_compile.calibration import observed_model
from sere_compile.experts.counterfactual import CounterfactualExperts

from ..tiny_models import EAGER_SLOW, build, gate_names, tokens
from .plain import run


def test_holds_one_chunk_only(qwen, monkeypatch):
    """Never the outputs of all experts on more than `chunk` tokens."""
    sizes = []
    original = CounterfactualExperts.outputs

    def outputs(self, numbers, num_experts):
        sizes.append(len(numbers))
        return original(self, numbers, num_experts)

    monkeypatch.setattr(CounterfactualExperts, "outputs", outputs)
    run(qwen, [tokens(4, 9)], chunk=8)
    assert max(sizes) == 8
    assert sum(sizes) >= 2 * 4 * 9


@pytest.mark.parametrize("experts", EAGER_SLOW)
def test_nothing_is_computed_for_slots_without_weight(experts, monkeypatch):
    """A module that takes ids of any width gets one a row, in a handful of calls."""
    calls, find = [], observed_model.find_experts

    def found(owner, number):
        module = find(owner, number)

        def recorded(hidden, ids, weights):
            calls.append(tuple(ids.shape))
            return module(hidden, ids, weights)

        return recorded

    monkeypatch.setattr(observed_model, "find_experts", found)
    run(build("qwen3_moe", experts), [tokens(4, 8)], chunk=32)
    assert calls.count((16 * 32, 1)) == 2
    assert len(calls) <= 6, "two for the chunks, the others to compare"


def test_a_module_that_disagrees_is_not_used(monkeypatch):
    """What the graph computes decides, not what stands beside the router."""
    model, batches = build("mixtral"), [tokens(2, 5)]
    expected = run(model, batches)
    monkeypatch.setattr(
        observed_model, "find_experts", lambda owner, number: lambda hidden, ids, weights: hidden * ids.float()
    )
    torch._dynamo.reset()
    got = run(model, batches)
    for name in gate_names():
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5)
