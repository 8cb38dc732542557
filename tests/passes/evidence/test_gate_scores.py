"""Which scores rank at a gate and which weigh."""

from __future__ import annotations

import types

import pytest
import torch

from sere_compile.passes import Use, UseKind, find_gates
from sere_compile.passes.evidence.gate_scores import gate_scores
from sere_compile.passes.graph import nodes

from .. import moe_modules
from ..graph.written import Written


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


class ByHand(Written):
    """A gate of which the scores ask; `probabilities` lie behind its router where they are asked for."""

    def __init__(self, scoring=None, columns=8):
        super().__init__()
        self.hidden = self.given(4, columns)
        options = {"dim": -1} if scoring is torch.softmax else {}
        self.scores = self.hidden if scoring is None else self.call(scoring, self.hidden, **options)

    def asked(self, selection, form="top-k", uses=(), experts=8):
        gate = types.SimpleNamespace(
            selection=selection, form=form, uses=uses, num_experts=experts, router_input=self.hidden
        )
        return gate_scores(gate)


class TestForms:
    def test_top_k(self):
        w = ByHand(torch.softmax)
        found = w.asked(w.call(torch.topk, w.scores, 3))
        assert (found.choice, found.worth, found.probabilities) == (w.scores, w.scores, True)

    @pytest.mark.parametrize(
        ("args", "kwargs", "descending"),
        [((-1, True), {}, True), ((-1,), {"descending": True}, True), ((-1, False), {}, False), ((), {}, False)],
    )
    @pytest.mark.parametrize("sort", [torch.sort, torch.argsort])
    def test_sorts(self, sort, args, kwargs, descending):
        """In ascending order the best are first of negated scores alone."""
        w = ByHand(torch.sigmoid)
        negated = w.call(torch.neg, w.scores)
        plain = w.asked(w.call(sort, w.scores, *args, **kwargs), "sort")
        turned = w.asked(w.call(sort, negated, *args, **kwargs), "sort")
        assert (plain.choice if descending else plain) is (w.scores if descending else None)
        assert turned.choice is (negated if descending else w.scores)
        assert w.asked(w.call(torch.topk, negated, 3)).choice is negated

    def test_other_columns(self):
        w = ByHand()
        assert w.asked(w.call(torch.topk, w.scores, 3), experts=7) is None
        assert w.asked(w.graph.call_function(torch.topk, (3, 2))) is None

    @pytest.mark.parametrize(
        ("scoring", "bounded"), [(torch.softmax, True), (torch.sigmoid, True), (torch.exp, False), (None, False)]
    )
    def test_what_is_worth_what_it_says(self, scoring, bounded):
        """Behind the router, not in front of it, and through what is done to it."""
        w = ByHand(scoring)
        assert w.asked(w.call(torch.topk, w.scores, 3)).probabilities is bounded
        assert w.asked(w.call(torch.topk, w.mul(w.scores, 2), 3)).probabilities is bounded
        early = ByHand()
        early.hidden = early.call(torch.sigmoid, early.hidden)
        assert early.asked(early.call(torch.topk, early.call(torch.exp, early.hidden), 3)).probabilities is False

    def test_weights_that_are_looked_up(self):
        """In scores of the same shape, by a gather; other tables are none."""
        w = ByHand(torch.sigmoid)
        biased = w.call(torch.add, w.scores, w.weight(8))
        best = w.call(torch.topk, biased, 3)
        ids = w.pick(best, 1)
        look_up = w.call(torch.gather, w.scores, 1, ids)
        found = w.asked(best, uses=[Use(look_up, ids, UseKind.LOOK_UP)])
        assert (found.choice, found.worth) == (biased, w.scores)
        others = [
            Use(look_up, ids, UseKind.UNKNOWN),
            Use(w.pick(w.weight(8), ids), ids, UseKind.LOOK_UP),
            Use(w.call(torch.gather, w.given(4, 9), 1, ids), ids, UseKind.LOOK_UP),
        ]
        assert w.asked(best, uses=others).worth is biased
