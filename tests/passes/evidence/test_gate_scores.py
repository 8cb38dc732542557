"""Which scores rank at a gate and which weigh."""

from __future__ import annotations

import pytest
import torch

from sere_compile.passes import find_gates
from sere_compile.passes.evidence.gate_scores import gate_scores
from sere_compile.passes.graph import nodes

from .. import moe_modules


class Logits(moe_modules.Indexed):
    """Selects by logits and takes the softmax of those that it chose."""

    def scores(self, x):
        return torch.nn.functional.linear(x, self.router)

    def route(self, x):
        values, ids = self.scores(x).topk(self.top_k, dim=-1)
        return ids, values.softmax(-1)


@pytest.mark.parametrize("trace", [moe_modules.from_dynamo, moe_modules.from_export], ids=lambda f: f.__name__)
def test_one_tensor_mostly(trace):
    """What is selected from is what weights are made from; a softmax makes probabilities of it, logits are none."""
    for kind, probabilities in ((moe_modules.Indexed, True), (Logits, False)):
        (gate,) = find_gates(trace(kind().eval(), moe_modules.rows())).gates
        scores = gate_scores(gate)
        assert scores.choice is scores.worth is nodes.operand(gate.selection)
        assert scores.probabilities is probabilities


@pytest.mark.parametrize("trace", [moe_modules.from_dynamo, moe_modules.from_export], ids=lambda f: f.__name__)
def test_a_bias_ranks_and_does_not_weigh(trace):
    """The weights are looked up in the scores without it."""
    (gate,) = find_gates(trace(moe_modules.BiasCorrected().eval(), moe_modules.rows())).gates
    scores = gate_scores(gate)
    assert nodes.kind(scores.choice) == "add"
    assert nodes.kind(scores.worth) == "sigmoid"
    assert scores.probabilities
