"""`find_routing_weights`: the weights in the form in which the dispatch consumes them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.passes import Evidence, SkipReason, find_gates
from sere_compile.passes.graph import nodes

from ..moe_modules import (
    EXPERTS,
    TRACERS,
    Block,
    Grouped,
    Indexed,
    ScatterCombine,
    from_dynamo,
    from_export,
    one_gate,
    rows,
)


class Weighted(ScatterCombine):
    """Selected scores, then a function of (block, values, ids, scores) that makes the weights."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.rand(EXPERTS))

    def route(self, x):
        scores = self.scores(x)
        values, ids = torch.topk(scores, self.top_k, dim=-1)
        return ids, self.function(self, values, ids, scores)


def in_place(values):
    values /= values.sum(-1, keepdim=True)
    return values


# name -> (function of (block, values, ids, scores), operation whose result is the weights)
CHAINS = {
    "selected scores": (lambda b, v, ids, s: v, "item"),
    "normalised": (lambda b, v, ids, s: v / v.sum(-1, keepdim=True), "div"),
    "normalised in place": (lambda b, v, ids, s: in_place(v), "div"),
    "normalised with epsilon": (lambda b, v, ids, s: v / (v.sum(-1, keepdim=True) + 1e-9), "div"),
    "scaled after normalising": (lambda b, v, ids, s: v / v.sum(-1, keepdim=True) * 2.5, "mul"),
    "softmax of selected": (lambda b, v, ids, s: F.softmax(v, -1), "softmax"),
    "looked up": (lambda b, v, ids, s: s.gather(1, ids), "gather"),
    "looked up and normalised": (lambda b, v, ids, s: F.normalize(s.gather(1, ids), p=1.0, dim=-1), "div"),
    "scaled by expert": (lambda b, v, ids, s: v * b.scale[ids], "mul"),
    "joined with a shared expert's score": (
        lambda b, v, ids, s: torch.cat([v, s[:, :1]], -1).sigmoid().exp()[:, :3] * 1.0,
        "mul",
    ),
    "cast": (lambda b, v, ids, s: v.double().float() * 1.0, "mul"),
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("name", CHAINS)
def test_last_form_with_one_number_a_slot(name, tracer):
    """The weights are found behind normalising, scaling, looking up and casting."""
    function, kind = CHAINS[name]
    if (name, tracer) == ("looked up and normalised", "dynamo"):
        kind = "normalize"
    gate = one_gate(TRACERS[tracer](Weighted(function), rows()))
    assert gate.weights_skip is None
    assert nodes.kind(gate.weights) == kind
    assert nodes.shape(gate.weights) == (10, 3)


class TestRefusals:
    def test_no_weights(self):
        """Without any weight a slot there is nothing to merge."""
        module = Weighted(lambda b, v, ids, s: torch.full(ids.shape, 0.5))
        gate = one_gate(from_export(module, rows()))
        assert (gate.weights, gate.weights_skip.reason) == (None, SkipReason.NO_WEIGHTS)
        assert gate.weights_skip.evidence is Evidence.DISPATCH
        assert gate.weights_skip.node is gate.ids

    def test_ambiguous_weights(self):
        """Two forms with consumers of their own: both are named."""

        class Both(ScatterCombine):
            def route(self, x):
                self.values, ids = torch.topk(self.scores(x), self.top_k)
                return ids, self.values * 2

            def forward(self, x):
                ids, weights = self.route(x)
                return self.dispatch(x, ids, weights), self.values.reshape(-1)

        gate = one_gate(from_export(Both(), rows()))
        skip = gate.weights_skip
        assert (skip.reason, skip.node) == (SkipReason.AMBIGUOUS_WEIGHTS, gate.ids)
        assert skip.detail == "getitem, mul"

    @pytest.mark.parametrize("trace", [from_dynamo, from_export])
    def test_scores_masked_by_ids(self, trace):
        """`probs * mask` takes the weights from the scores by the ids: new ids would choose new weights."""

        class Masked(ScatterCombine):
            def forward(self, x):
                scores = self.scores(x)
                values, ids = torch.topk(scores, self.top_k)
                mask = torch.zeros_like(scores).scatter(1, ids, 1.0)
                gates = scores * mask / values.sum(-1, keepdim=True)
                return torch.einsum("te,eth->th", gates, self.all_experts(mask.T[..., None] * x))

        gate = one_gate(trace(Masked(), rows()))
        skip = gate.weights_skip
        assert (skip.reason, nodes.kind(skip.node)) == (SkipReason.SCORES_BY_ID, "mul")
        assert "test_routing_weights.py:" in skip.detail

    def test_masked_softmax(self):
        """A softmax over the selected scores in place, as in noisy top-k, is the same case."""

        class Masked(ScatterCombine):
            def forward(self, x):
                scores = self.scores(x)
                ids = torch.topk(scores, self.top_k)[1]
                mask = torch.zeros_like(scores).scatter_(1, ids, 1.0)
                gates = scores.masked_fill(mask == 0, -1e9).softmax(-1)
                return torch.einsum("te,eth->th", gates, self.all_experts(gates.T[..., None] * x))

        gate = one_gate(from_export(Masked(), rows()))
        assert gate.weights_skip.reason is SkipReason.SCORES_BY_ID

    def test_load_loss_is_no_such_case(self):
        """Mean scores over the batch in an auxiliary loss are no weights of a token."""

        class Loss(ScatterCombine):
            def forward(self, x):
                scores = self.scores(x)
                values, ids = torch.topk(scores, self.top_k)
                load = F.one_hot(ids, EXPERTS).float().mean((0, 1))
                return self.dispatch(x, ids, values), (load * scores.mean(0)).sum()

        assert one_gate(from_export(Loss(), rows())).weights_skip is None


class Unweighted:
    """Weights that are the same for all that was chosen."""

    def route(self, x):
        ids = torch.topk(self.scores(x), self.top_k)[1]
        return ids, torch.full(ids.shape, 0.5)


def test_not_needed_for_summing_dispatch():
    """A dispatch that sums duplicates is no matter of weights: none are needed to re-route it."""
    gate = one_gate(from_export(type("Even", (Unweighted, Grouped), {})(), rows()))
    assert not gate.needs_merge
    assert gate.weights is None


def test_needed_where_indices_fetch():
    """Without weights, what indices fetch may be documents or prompts as well as experts."""
    [skip] = find_gates(from_export(type("Even", (Unweighted, Indexed), {})(), rows())).skips
    assert skip.reason is SkipReason.NOTHING_WEIGHED


class BentLater(Block):
    """makeMoE and Llama 4: the selected logits are scattered among -inf and made weights there."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        values, ids = F.linear(x, self.router).topk(self.top_k)
        weights = self.function(torch.full((len(x), self.num_experts), float("-inf")).scatter(-1, ids, values))
        return torch.einsum("te,eth->th", weights, self.all_experts((weights.T > 0)[..., None] * x))


class ScaledInput(Block):
    """Weights scale what goes into the experts, whose activation is not linear."""

    def dispatch(self, x, ids, weights):
        combine = x.new_zeros(x.shape[0], self.num_experts).scatter(1, ids, weights)
        inputs = x.repeat(self.num_experts, 1) * combine.transpose(0, 1).reshape(-1, 1)
        return self.all_experts(inputs.view(self.num_experts, *x.shape)).sum(0)


@pytest.mark.parametrize("tracer", TRACERS)
class TestWhereSumsAreWrong:
    """Merging adds the weights of two slots: where that is not the sum of two outputs the gate is refused."""

    @pytest.mark.parametrize("function", [lambda w: w.softmax(-1), torch.sigmoid], ids=["softmax", "sigmoid"])
    def test_bent_later(self, function, tracer):
        """The function behind the scatter is named."""
        gate = one_gate(TRACERS[tracer](BentLater(function), rows()))
        assert gate.weights_skip.reason in (SkipReason.BENT_WEIGHTS, SkipReason.SCORES_BY_ID)

    def test_scaled_input(self, tracer):
        """The product with the hidden states is named."""
        gate = one_gate(TRACERS[tracer](ScaledInput(), rows()))
        assert gate.weights_skip.reason is SkipReason.SCALED_INPUT
        assert nodes.kind(gate.weights_skip.node) == "mul"
