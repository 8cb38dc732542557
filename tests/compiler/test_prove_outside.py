"""Ids that leave their graph are re-routed only where running the code that receives them proves it right."""

import pytest
import torch
from torch import nn

from sere_compile.compiler import prove_outside as module
from sere_compile.compiler.dynamo_graph import DynamoGraph
from sere_compile.compiler.gate_plan import experts_are_live
from sere_compile.compiler.prove_outside import made_up_order, prove_outside
from sere_compile.experts.owner import Owners
from sere_compile.passes import find_gates

EXPERTS, HIDDEN, TOP_K = 8, 16, 3


class Experts(nn.Module):
    """A loop over the experts that were hit, which breaks the graph; `weigh` is done to the weights inside."""

    def __init__(self, weigh=lambda weights: weights):
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN))
        self.weigh = weigh

    def forward(self, x, ids, weights):
        weights = self.weigh(weights)
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            token, slot = torch.where(ids == expert)
            out.index_add_(0, token, self.expert(x[token], expert) * weights[token, slot, None])
        return out

    def expert(self, x, number):
        return torch.tanh(x @ self.w[number])


class Overwriting(Experts):
    """`out[token] += y` loses one of two slots of a token that name the same expert."""

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            token, slot = torch.where(ids == expert)
            out[token] += self.expert(x[token], expert) * weights[token, slot, None]
        return out


class Chained(Experts):
    """Experts by rank, one after the other: re-routed ids are right, merged ones change the order."""

    def forward(self, x, ids, weights):
        for slot in range(ids.shape[1]):
            rows = [self.expert(x[t], int(ids[t, slot])) * weights[t, slot] for t in range(len(x))]
            x = torch.stack(rows) + x
        return x


class Unweighted(Experts):
    """Divides by the number of distinct experts, whatever the weights are: no rewrite is right."""

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for t in range(len(x)):
            distinct = ids[t].unique().tolist()
            out[t] = sum(self.expert(x[t], e) for e in distinct) / len(distinct)
        return out


class Values(Experts):
    """A table of values that the indices fetch: no expert acts on a hidden state."""

    def forward(self, x, ids, weights):
        ids.sum().item()
        return (self.w[ids, 0] * weights[..., None]).sum(-2)


class Listed(Experts):
    """A list of modules."""

    def __init__(self):
        super().__init__()
        del self.w
        self.mlps = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))

    def expert(self, x, number):
        return self.mlps[number](x)


class Block(nn.Module):
    def __init__(self, experts, returns=lambda output, weights: output):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = experts
        self.returns = returns

    def forward(self, x):
        scores = self.gate(x.view(-1, HIDDEN)).softmax(-1)
        weights, ids = scores.topk(TOP_K)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.returns(self.experts(x.view(-1, HIDDEN), ids, weights).view(x.shape), weights)


class Layer(nn.Module):
    """Router and experts inside a layer that takes more than hidden states."""

    def __init__(self, experts):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = experts

    def forward(self, x, *, scale):
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        return x + self.experts(x * scale, ids, weights)


class Classifier(nn.Module):
    """As many labels as layers: its three best labels are no experts."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, HIDDEN)
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))
        self.head = nn.Linear(HIDDEN, EXPERTS)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x).softmax(-1).topk(TOP_K)


class Counted(Classifier):
    """Layers with counters, and places that index a table: whole numbers with a part per label."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(HIDDEN) for _ in range(EXPERTS))
        self.places = nn.Buffer(torch.arange(EXPERTS) % 2)
        self.table = nn.Parameter(torch.randn(2, HIDDEN))

    def forward(self, tokens):
        x = self.embedding(tokens) + self.table[self.places].sum(0)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.relu(norm(layer(x)))
        return self.head(x).softmax(-1).topk(TOP_K)


def verdicts(model, *args, **kwargs):
    """Of every gate of the model's graphs whose ids leave; the compiled model gives what the model gives."""
    torch._dynamo.reset()
    module._verdicts.clear()
    found = []

    def backend(graph, inputs):
        traced, owners = DynamoGraph(graph, inputs), Owners()
        for gate in find_gates(traced.module, experts_are_live(traced.value_of, owners)).gates:
            found.append(prove_outside(gate, owners.find(traced.value_of(gate.router_weight))))
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(*args, **kwargs)
    return found


def rows():
    return torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("experts", [Experts, Overwriting, Listed])
def test_a_sum_over_experts_is_proven_with_merged_slots(experts):
    assert [v.merged for v in verdicts(Block(experts()), rows())] == [True]


@pytest.mark.parametrize(
    "weigh",
    [
        lambda weights: weights.softmax(-1),
        lambda weights: weights**2,
        lambda weights: weights / weights.amax(-1, keepdim=True),
        lambda weights: torch.where(weights > 0.3, weights, 0),
        lambda weights: torch.nn.functional.normalize(weights, dim=-1),
    ],
)
def test_weights_that_pass_another_function_are_not_merged(weigh):
    """Merging before the function gives another number; the new ids alone are right, for slots stay apart."""
    assert [v.merged for v in verdicts(Block(Experts(weigh)), rows())] == [False]


def test_experts_in_order_of_rank_take_plain_ids():
    assert [v.merged for v in verdicts(Block(Chained()), rows())] == [False]


def test_weights_that_are_returned_stay_what_the_router_chose():
    block = Block(Experts(), returns=lambda output, weights: (output, weights))
    assert [v.merged for v in verdicts(block, rows())] == [False]


def test_where_no_rewrite_is_right_it_says_how_far_it_is_off():
    [verdict] = verdicts(Block(Unweighted()), rows())
    assert verdict.merged is None
    assert verdict.is_gate
    assert "run with the code that receives its ids, Block is off by" in verdict.reason


def test_a_table_of_values_is_no_gate():
    found = verdicts(Block(Values()), rows())
    assert all(v.merged is None and not v.is_gate and "values of a table" in v.reason for v in found)


def test_a_classifier_with_as_many_labels_as_layers_is_no_gate():
    [verdict] = verdicts(Classifier(), torch.arange(6))
    assert verdict.merged is None
    assert not verdict.is_gate


def test_whole_numbers_that_have_to_be_what_they_are_are_no_experts():
    """Disturbing them raises: that says nothing of the gate."""
    [verdict] = verdicts(Counted().eval(), torch.arange(6))
    assert not verdict.is_gate
    assert verdict.reason == "no parameter around its router acts on the tokens of one expert alone"


def test_a_layer_is_run_on_what_it_is_called_with():
    assert [v.merged for v in verdicts(Layer(Experts()), rows()[0], scale=2.0)] == [True]


def test_the_model_is_left_as_it_was():
    """Parameters, buffers, hooks and the state of the random generator."""
    model = Block(Experts())
    model.register_buffer("seen", torch.zeros(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert [v.merged for v in verdicts(model, rows())] == [True]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_that_compute_the_same_are_tried_once(monkeypatch):
    tried = []
    try_block = module._try_block
    monkeypatch.setattr(module, "_try_block", lambda *args: tried.append(args[1]) or try_block(*args))
    first, second = Block(Experts()), Block(Experts())
    first.layer_idx, second.layer_idx = 0, 1
    second.returns, second.experts.weigh = first.returns, first.experts.weigh
    [verdict] = verdicts(nn.Sequential(first, second), rows())
    assert verdict.merged
    assert tried.count(first) == 1
    assert second not in tried
    assert module.computes_the_same(second.gate.weight, verdict)


def test_a_layer_with_another_setting_is_not_covered_by_the_proof():
    first, second = Block(Experts()), Block(Experts(lambda weights: weights**2))
    [verdict] = verdicts(nn.Sequential(first, nn.Sequential(second)), rows())
    assert not module.computes_the_same(second.gate.weight, verdict)


def test_half_of_the_draws_let_most_tokens_name_an_expert_twice():
    order = made_up_order((4, 5), EXPERTS, seed=0)
    assert sorted(order[0, 0].tolist()) == list(range(EXPERTS))
    assert set(order[..., 0].flatten().tolist()) == {0, 1}
    assert len(set(made_up_order((4, 5), EXPERTS, seed=1)[..., 0].flatten().tolist())) > 2
