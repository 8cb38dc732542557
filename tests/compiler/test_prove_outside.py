"""Ids that leave their graph are re-routed only where running the code that receives them proves it right."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.compiler import dynamo
from sere_compile.compiler import prove_outside as module
from sere_compile.compiler.dynamo_graph import DynamoGraph
from sere_compile.compiler.gate_plan import experts_are_live
from sere_compile.compiler.prove_outside import made_up_order, prove_outside
from sere_compile.experts.owner import Owners
from sere_compile.passes import Gate, Skip, SkipReason, Use, UseKind, find_gates

from ..passes.graph.written import Written
from ..thinned import thinned

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


class InVmap(Experts):
    """All experts at once by `torch.func.vmap`, of which no part can be run by itself, and a table picks."""

    def forward(self, x, ids, weights):
        outputs = torch.func.vmap(lambda w: torch.tanh(x @ w))(self.w)
        return torch.einsum("te,eth->th", x.new_zeros(len(x), EXPERTS).scatter(1, ids, weights), outputs)


class Chained(Experts):
    """Experts by rank, one after the other: re-routed ids are right, merged ones change the order."""

    def forward(self, x, ids, weights):
        for slot in range(ids.shape[1]):
            rows = [self.expert(x[t], int(ids[t, slot])) * weights[t, slot] for t in range(len(x))]
            x = torch.stack(rows) + x
        return x


class Split(Experts):
    """Sorted slots split by counts from a table, which counts an expert that a token names twice once."""

    def forward(self, x, ids, weights):
        counts = ids.new_zeros(len(ids), EXPERTS).scatter_(1, ids, 1).sum(0)
        order = ids.view(-1).argsort()
        rows = x[order // ids.shape[1]]
        parts = rows.split(counts.tolist())
        made = torch.cat([self.expert(part, number) for number, part in enumerate(parts)])
        slots = torch.empty_like(made)
        slots[order] = made
        return (slots.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)


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


class Scaled(Experts):
    """A number per expert scales the weights: it goes with what the router chose, and new ids would fetch another."""

    def __init__(self, sizes=(EXPERTS,)):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(sizes) + 0.5)

    def forward(self, x, ids, weights):
        ids.sum().item()
        return super().forward(x, ids, weights * self.scale[ids].view(weights.shape))


class ScaledResidual(Scaled):
    """The scaled weights say as well how much of the hidden states stays, whatever the experts give."""

    def forward(self, x, ids, weights):
        weights = weights * self.scale[ids].view(weights.shape)
        return Experts.forward(self, x, ids, weights) + (1 - weights[:, :1]) * x


class Biased(Experts):
    """A number that each expert adds to all that it gives."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(EXPERTS))

    def expert(self, x, number):
        return super().expert(x, number) + self.bias[number]


class ScaledLoss(Scaled):
    """Its loss reads the scaled weights, whatever the experts give."""

    def forward(self, x, ids, weights):
        weights = weights * self.scale[ids].view(weights.shape)
        ids.sum().item()
        return Experts.forward(self, x, ids, weights), weights.std()


class MarksOutside(nn.Module):
    """Rows of padding get a number for their ids behind the end of the graph; None: the mask scales what comes out."""

    def __init__(self, marked):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = Experts()
        self.marked = marked

    def forward(self, x, mask):
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        torch._dynamo.graph_break()
        if self.marked is None:
            return self.experts(x, ids, weights) * torch.where(mask, 1.0, 0.5)[:, None]
        y = torch.zeros_like(x)
        ids = ids.masked_fill(~mask[:, None], self.marked)
        for expert in range(EXPERTS):
            token, slot = torch.where(ids == expert)
            y.index_add_(0, token, self.experts.expert(x[token], expert) * weights[token, slot, None])
        return y


class OneOutput(Experts):
    """Experts of one number each, the bias of which is a number per expert, too, and their own."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(EXPERTS))

    def expert(self, x, number):
        return (torch.tanh(x @ self.w[number]).sum(-1, keepdim=True) + self.bias[number]).expand(x.shape)


class Prompts(Experts):
    """Prompts that the indices fetch and the hidden states attend to; the weights weigh nothing of them."""

    def forward(self, x, ids, weights):
        ids.sum().item()
        prompts = self.w[ids].flatten(1, 2)
        return ((prompts @ x[:, :, None]).softmax(1) * prompts).sum(1)


class ScalingValues(Experts):
    """Values of a table that scale the hidden states: what comes out depends on them, and no expert acts on them."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x, ids, weights):
        ids.sum().item()
        return self.out((self.w[ids] * weights[..., None]).sum(1)) * x


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
        out, weights = self.routed(x)
        return self.returns(out.view(x.shape), weights)

    def routed(self, x):
        scores = self.gate(x.view(-1, HIDDEN)).softmax(-1)
        weights, ids = scores.topk(TOP_K)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.experts(x.view(-1, HIDDEN), ids, weights), weights


class Router(nn.Module):
    """With a number per expert beside its weight, which could be an expert's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.bias = nn.Parameter(torch.zeros(EXPERTS))

    def forward(self, x):
        return (F.linear(x, self.weight).softmax(-1) + self.bias).topk(TOP_K)


class Loaded(nn.Module):
    """A layer whose graph holds a count of the ids behind its router."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = Router(), Overwriting()

    def forward(self, x):
        weights, ids = self.router(x.view(-1, HIDDEN))
        load = ids.flatten().bincount(minlength=EXPERTS).tolist()
        return self.experts(x.view(-1, HIDDEN), ids, weights * (len(load) > 0)).view(x.shape)


class WithLoss(Block):
    """Its experts return a loss beside what they give."""

    def forward(self, x):
        (out, loss), _ = self.routed(x)
        return out.view(x.shape), loss


class ReturningIds(Block):
    """What it returns is what the router chose, and the same tensor goes to the experts."""

    def forward(self, x):
        weights, ids = self.gate(x.view(-1, HIDDEN)).softmax(-1).topk(TOP_K)
        return self.experts(x.view(-1, HIDDEN), ids, weights).view(x.shape), ids


class Counting(Block):
    """A buffer counts the tokens of each expert, as the router chose them."""

    def __init__(self, experts, count):
        super().__init__(experts)
        self.count = count
        self.register_buffer("load", torch.zeros(EXPERTS, dtype=torch.int64))

    def forward(self, x):
        weights, ids = self.gate(x.view(-1, HIDDEN)).softmax(-1).topk(TOP_K)
        self.count(self.load, ids)
        return self.experts(x.view(-1, HIDDEN), ids, weights).view(x.shape)


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


SEEN = []


class Owner(nn.Module):
    """Keeps what its layers chose."""

    def __init__(self):
        super().__init__()
        self.log = []
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


class Keeping(Block):
    """The ids are kept beside what is returned, in one of several places, for whoever asks later."""

    def __init__(self, place):
        super().__init__(Experts())
        self.place, self.log = place, []
        self.owner, self.numbers = [Owner()], itertools.count()

    def forward(self, x):
        weights, ids = self.gate(x.view(-1, HIDDEN)).softmax(-1).topk(TOP_K)
        out = self.experts(x.view(-1, HIDDEN), ids, weights).view(x.shape)
        if self.place == "a module that is no part of it":
            self.owner[0].log.append(ids)
        if self.place == "a buffer of a module that is no part of it":
            self.owner[0].count += ids.sum()
        if self.place == "an attribute":
            self.last = ids
        if self.place == "a list":
            self.log.append(ids)
        if self.place == "a global":
            SEEN.append(ids)
        if self.place == "by numbers that go on":
            self.log.extend(next(self.numbers) for _ in range(int(ids[:, -1].sum())))
        if self.place == "numbers":
            return out, ids.tolist()
        return (out, ids.numpy()) if self.place == "an array" else out


class Capped(Experts):
    """Each expert takes its first tokens only: some are dropped where there are many."""

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, slot = torch.where(ids == expert)
            token, slot = token[:40], slot[:40]
            out.index_add_(0, token, self.expert(x[token], expert) * weights[token, slot, None])
        return out


class OneIsSpecial(Experts):
    """The last of many experts has another activation."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(40, HIDDEN, HIDDEN))

    def expert(self, x, number):
        out = super().expert(x, number)
        return torch.relu(out) if number == 39 else out


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


@pytest.mark.parametrize(
    "experts", [Experts, InVmap, *(pytest.param(e, marks=pytest.mark.slow) for e in (Overwriting, Listed))]
)
def test_a_sum_over_experts_is_proven_with_merged_slots(experts):
    assert [v.merged for v in verdicts(Block(experts()), rows())] == [True]


def test_experts_that_all_compute_every_token_are_told():
    """A table picks of what all of them give: re-routing is right, and saves nothing."""
    [verdict] = verdicts(Block(InVmap()), rows())
    assert verdict.merged is not None
    assert verdict.saves_nothing.startswith(SkipReason.DENSE.value)
    assert "seen in a run of" in verdict.saves_nothing


@pytest.mark.slow
def test_experts_that_are_counted_by_a_table_take_merged_ids():
    """Plain ids make sizes that do not fit: that ends the trial of plain ids, and is not the reason of merged ones."""
    assert [v.merged for v in verdicts(Block(Split()), rows())] == [True]
    [refused] = verdicts(ReturningIds(Split()), rows())
    assert refused.merged is None
    assert "returns other things" in refused.reason


def test_a_router_that_is_a_module_shows_less_of_the_graph_than_its_layer():
    """`bincount` of the ids is part of the graph, and not of the router."""
    found = verdicts(Loaded(), rows())
    assert [v.merged for v in found] == [True], found


@pytest.mark.slow
def test_what_capture_cannot_trace_is_tried_again_without_it():
    for capturing in (False, True):
        with dynamo.dynamic_shape_capture() if capturing else contextlib.nullcontext():
            verdicts(Block(Split()), rows())
        assert {key[2] for key in module._verdicts} == {(capturing, capturing)}


@pytest.mark.parametrize(
    "count",
    [
        lambda load, ids: load.add_(F.one_hot(ids, EXPERTS).reshape(-1, EXPERTS).sum(0)),
        lambda load, ids: load.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten())),
        # In a form that is not known as a count.
        lambda load, ids: load.index_add_(0, ids.flatten(), torch.ones_like(ids.flatten())),
    ],
    ids=["one_hot", "scatter_add_", "index_add_"],
)
def test_a_buffer_counts_what_the_router_chose(count):
    """Its graph ends before the experts; the count in it stays the original's, and the trial leaves no mark."""
    block = Counting(Experts(), count)
    assert [v.merged for v in verdicts(block, rows())] == [True]
    assert block.load.sum() == rows()[..., 0].numel() * TOP_K


def test_a_buffer_that_new_ids_would_change_is_seen():
    """Dynamo ends the graph before it."""
    block = Counting(Experts(), lambda load, ids: load.add_(torch.bincount(ids.flatten(), minlength=EXPERTS)))
    [verdict] = verdicts(block, rows())
    assert verdict.merged is None
    assert "returns other things" in verdict.reason


class Loads(Block):
    """What is made of the ids ahead of a break is returned, or the experts behind it go by it."""

    def __init__(self, experts, returns):
        super().__init__(experts)
        self.returned = returns

    def forward(self, x):
        weights, ids = self.gate(x.view(-1, HIDDEN)).softmax(-1).topk(TOP_K)
        table = weights.new_zeros(len(weights), EXPERTS).scatter(1, ids, weights)
        load = (table > 0).sum(0)
        torch._dynamo.graph_break()
        made = self.experts(x.view(-1, HIDDEN), ids, weights if self.returned else table.gather(1, ids))
        return (made, load, table.sum(0)) if self.returned else made * load.max()


def test_loads_that_are_returned_are_of_what_the_router_chose():
    """New ids leave the graph as they are; a table of them and its sums are made of the router's own."""
    [verdict] = verdicts(Loads(Experts(), True), rows())
    assert (verdict.merged is not None, verdict.ids_alone) == (True, True)


def test_a_table_that_the_code_outside_reads_at_new_ids_is_refused():
    """The router's own table has nothing there, and one of new ids gives another load."""
    [verdict] = verdicts(Loads(Experts(), False), rows())
    assert verdict.merged is None


@pytest.mark.parametrize(
    "weigh",
    [
        lambda weights: weights.softmax(-1),
        pytest.param(lambda weights: weights**2, marks=pytest.mark.slow),
        pytest.param(lambda weights: weights / weights.amax(-1, keepdim=True), marks=pytest.mark.slow),
        pytest.param(lambda weights: torch.where(weights > 0.3, weights, 0), marks=pytest.mark.slow),
        pytest.param(lambda weights: torch.nn.functional.normalize(weights, dim=-1), marks=pytest.mark.slow),
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


@pytest.mark.parametrize(
    ("place", "told"),
    thinned([
        ("an attribute", "leaves other things in last"),
        ("a list", "leaves other things in log"),
        ("a global", "leaves other things in SEEN"),
        ("a module that is no part of it", "leaves other things in owner.log"),
        ("a buffer of a module that is no part of it", "leaves other things in owner.buffers"),
        ("by numbers that go on", "leaves other things in log"),
        ("numbers", "returns other things"),
        ("an array", "returns other things"),
    ], (1, 4, 5, 7)),
)  # fmt: skip
def test_ids_that_are_kept_stay_what_the_router_chose(place, told):
    """What a block returns or keeps as no tensor is a result as well; the trial leaves a user's lists as they were."""
    SEEN.clear()
    model = Keeping(place)
    found = verdicts(model, rows())
    assert all(v.merged is None and v.is_gate for v in found)
    assert told in found[0].reason
    assert len(SEEN) == (1 if place == "a global" else 0)
    assert len(model.owner[0].log) == (1 if place == "a module that is no part of it" else 0)


def test_tokens_that_are_dropped_only_where_there_are_many():
    found = verdicts(Block(Capped()), rows())
    assert all(v.merged is None for v in found)
    assert "where there are 256 tokens" in found[0].reason


def test_one_of_many_experts_that_is_told_by_its_number():
    """Every expert is re-routed once."""
    block = Block(OneIsSpecial())
    block.gate = nn.Linear(HIDDEN, 40, bias=False)
    found = verdicts(block, rows())
    assert all(v.merged is None for v in found)
    assert "is off by" in found[0].reason


def test_where_no_rewrite_is_right_it_says_how_far_it_is_off():
    [verdict] = verdicts(Block(Unweighted()), rows())
    assert verdict.merged is None
    assert verdict.is_gate
    assert "run with the code that receives its ids, Block is off by" in verdict.reason


@pytest.mark.parametrize("values", [Values, ScalingValues])
def test_a_table_of_values_is_no_gate(values):
    found = verdicts(Block(values()), rows())
    assert all(v.merged is None and not v.is_gate and "values of a table" in v.reason for v in found)


@pytest.mark.parametrize("sizes", [(EXPERTS,), pytest.param((EXPERTS, 1), marks=pytest.mark.slow)])
def test_a_scale_per_expert_outside_keeps_what_the_router_chose(sizes):
    """New ids would fetch another scale: exchanged experts keep the old one, and nothing is proven."""
    assert [v.merged for v in verdicts(Block(Scaled(sizes)), rows())] == [None]


def test_a_scale_whose_weights_are_read_beside_the_experts():
    """It shows without any expert, and scales what they give: no bias of theirs."""
    assert [v.merged for v in verdicts(Block(ScaledResidual(EXPERTS)), rows())] == [None]


def test_a_number_that_experts_add_goes_with_them():
    assert [v.merged for v in verdicts(Block(Biased()), rows())] == [True]


@pytest.mark.slow
def test_a_scale_that_a_loss_of_the_weights_reads_is_no_experts_either():
    block = WithLoss(ScaledLoss())
    assert [v.merged for v in verdicts(block, rows())] == [None]


@pytest.mark.parametrize(("marked", "padded"), thinned([(-1, 2), (0, 0), (EXPERTS, 0)], (0,)))
def test_padding_that_is_marked_outside_is_refused(marked, padded):
    """The graph would count it among the tokens; also where the first call has none."""
    mask = torch.arange(5) < 5 - padded
    [verdict] = verdicts(MarksOutside(marked), rows()[0], mask)
    assert verdict.merged is None
    assert "mark their ids with -1 before the graph ends" in verdict.reason


@pytest.mark.slow
def test_a_mask_that_drops_no_token_is_no_padding():
    assert [v.merged for v in verdicts(MarksOutside(None), rows()[0], torch.arange(5) < 3)] == [True]


@pytest.mark.slow
def test_the_bias_of_experts_with_one_output_is_their_own():
    block = Block(OneOutput())
    assert [v.merged for v in verdicts(block, rows())] == [True]


def test_prompts_that_are_attended_to_are_no_experts():
    [verdict] = verdicts(Block(Prompts()), rows())
    assert verdict.merged is None
    assert "its scores do not weight what is computed" in verdict.reason


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


def test_where_torch_compile_copies_what_it_is_given(monkeypatch):
    """As Lightning's does, which keeps a deep copy of the arguments."""
    own = torch.compile

    def copying(*args, **kwargs):
        copy.deepcopy(kwargs)
        return own(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", copying)
    assert [v.merged for v in verdicts(Block(Experts()), rows())] == [True]


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
    monkeypatch.setattr(module, "Owners", None)  # each call asks: the heap is searched once for a weight
    assert all(module.computes_the_same(layer.gate.weight, verdict) for layer in (first, second))


@pytest.mark.slow
def test_a_layer_with_another_setting_is_not_covered_by_the_proof():
    first, second = Block(Experts()), Block(Experts(lambda weights: weights**2))
    [verdict] = verdicts(nn.Sequential(first, nn.Sequential(second)), rows())
    assert not module.computes_the_same(second.gate.weight, verdict)


def test_experts_that_are_to_be_chosen_take_the_places_behind_the_first():
    order = made_up_order((2, 5), EXPERTS, seed=4, chosen=[3, 5, 6], places=2)
    assert set(order[..., 1:3].flatten().tolist()) >= {3, 5, 6}
    assert set(order[..., 0].flatten().tolist()) == {0, 1}


def test_half_of_the_draws_let_most_tokens_name_an_expert_twice():
    order = made_up_order((4, 5), EXPERTS, seed=0)
    assert sorted(order[0, 0].tolist()) == list(range(EXPERTS))
    assert set(order[..., 0].flatten().tolist()) == {0, 1}
    assert len(set(made_up_order((4, 5), EXPERTS, seed=1)[..., 0].flatten().tolist())) > 2


class TestHowRunsAreCompared:
    """What a trial calls equal, changed, or something else."""

    def test_relative_to_the_largest_number_of_its_tensor(self):
        wanted = [torch.tensor([4.0, -8.0]), torch.tensor([0.5])]
        assert module._distance([w.clone() for w in wanted], wanted) == 0
        assert module._distance([torch.tensor([4.0, -7.0]), torch.tensor([0.5])], wanted) == 0.125
        assert module._distance([torch.tensor([4.0, -7.0]), torch.tensor([1.0])], wanted) == 1.0
        assert module._distance([torch.zeros(0, 3)], [torch.zeros(0, 3)]) == 0

    @pytest.mark.parametrize(
        ("got", "wanted"),
        [
            ([torch.ones(2)], []),
            ([torch.ones(2)], [torch.ones(3)]),
            ([torch.ones(2)], [torch.ones(2).double()]),
            ([torch.tensor([1, 2])], [torch.tensor([1, 3])]),
        ],
    )
    def test_other_things(self, got, wanted):
        """More of them, another shape or type, or other whole numbers."""
        assert module._distance(got, wanted) is None

    def test_whole_numbers_that_are_equal_are_followed_by_the_rest(self):
        ids = torch.tensor([1, 2])
        assert module._distance([ids, torch.tensor([3.0])], [ids.clone(), torch.tensor([2.0])]) == 0.5

    def test_rows_that_differ(self):
        """In any output that has a row per token; others tell nothing."""
        before = [torch.zeros(1, 3, 2), torch.zeros(3, 4), torch.zeros(5), torch.zeros(3, 2, dtype=torch.int64)]
        after = [value.clone() for value in before]
        assert module._changed_rows(before, after, 3).tolist() == [False, False, False]
        after[0][0, 1, 1] = 1e-9
        after[1][2, 0] = 1
        assert module._changed_rows(before, after, 3).tolist() == [False, True, True]
        assert module._changed_rows(before[2:], after[2:], 3) is None
        assert module._changed_rows(before[:1], [torch.zeros(3, 2)], 3) is None

    def test_close(self):
        """By the larger of both; empty tensors are."""
        left = torch.tensor([1.0, 100.0])
        assert module._close(left, left + 0.009)
        assert module._close(left + 0.009, left)
        assert not module._close(left, left + torch.tensor([0.0, 0.02]))
        assert module._close(torch.zeros(3), torch.full((3,), 5e-8))
        assert not module._close(torch.zeros(3), torch.full((3,), 1e-3))
        assert module._close(torch.zeros(0), torch.zeros(0))


class TestWhatIsMadeUp:
    def test_an_order_of_all_experts(self):
        """Even seeds: the first two experts are the first choices, by turns, so that most tokens name one twice."""
        for leading in ((6,), (2, 3)):
            for seed in range(4):
                order = made_up_order(leading, 5, seed)
                assert order.shape == (*leading, 5)
                assert order.dtype == torch.int64
                assert all(sorted(row) == list(range(5)) for row in order.view(-1, 5).tolist())
                first = order[..., 0].flatten().tolist()
                assert (first == [0, 1] * 3) is (seed % 2 == 0)
                assert torch.equal(order, made_up_order(leading, 5, seed))
            assert not torch.equal(made_up_order(leading, 5, 0)[..., 1:], made_up_order(leading, 5, 2)[..., 1:])
        assert made_up_order((3,), 1, 0).tolist() == [[0]] * 3
        assert {row[0] for row in made_up_order((6,), 2, 0).tolist()} == {0, 1}

    def test_an_exchange_moves_every_expert(self):
        assert module._shift(3) == {0: 1, 1: 2, 2: 0}

    def test_other_hidden_states(self):
        """Of the same kind; what is no floating-point number stays."""
        ids = torch.arange(3)
        assert module._turned(ids) is ids
        assert module._turned("x") == "x"
        assert module._turned(torch.tensor([2.0, 4.0])).tolist() == [2.0, 1.0]
        assert module._in_float32(torch.ones(2).half()).dtype == torch.float32
        assert module._in_float32(ids) is ids
        assert module._in_float32(7) == 7
        value = torch.ones(2, requires_grad=True)
        assert not module._detached(value).requires_grad
        assert module._detached(7) == 7

    def test_an_error_in_a_few_words(self):
        assert module._short(ValueError("first\nsecond")) == "ValueError: first"
        assert module._short(KeyError()) == "KeyError: "
        assert len(module._short(RuntimeError("x" * 500))) == len("RuntimeError: ") + 120


class TestWhoseBlock:
    def test_without_an_owner_nothing_is_proven(self):
        verdict = prove_outside(None, None)
        assert (verdict.merged, verdict.is_gate, verdict.block) == (None, False, -1)
        assert verdict.reason == "no module of this process owns its router weight"

    def test_modules_that_compute_the_same_have_one_number(self):
        first, second, other = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 4)
        assert module._number(first) == module._number(second)
        assert module._number(first) != module._number(other)

    def test_verdicts_hold_for_blocks_that_compute_the_same(self):
        layers = [nn.Sequential(nn.Linear(2, 3), nn.Tanh()) for _ in range(2)]
        verdict = module.Verdict(True, block=module._number(layers[0]))
        assert module.computes_the_same(layers[0][0].weight, verdict)
        assert module.computes_the_same(layers[1][0].weight, verdict)
        assert not module.computes_the_same(layers[0][0].weight, module.Verdict(True, block=-1))
        assert not module.computes_the_same(torch.zeros(3, 2), verdict)
        assert not module.computes_the_same(None, verdict)

    def test_a_verdict_holds_until_a_setting_changes(self):
        """Code outside graphs reads it anew in each call."""
        layer = Keeping("nowhere")
        verdict = module.Verdict(True, block=module._number(layer), written=frozenset({"log"}))
        holds = functools.partial(module.computes_the_same, layer.gate.weight)
        assert holds(verdict)
        layer.log.append(1)
        assert holds(verdict)
        layer.place = "an attribute"
        assert not holds(verdict)
        other = module.Verdict(True, block=module._number(layer), written=frozenset({"log"}))
        assert (holds(verdict), holds(other)) == (False, True)


def test_what_runs_write_is_told():
    """So that it is no setting."""
    [verdict] = verdicts(Keeping("a list"), rows())
    assert "log" in verdict.written


class Plain(nn.Module):
    """A router whose choice is made by `select`, and experts that take `(hidden, ids, weights, *more)`."""

    def __init__(self, experts, select=lambda logits: logits.softmax(-1).topk(TOP_K)):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = experts
        self.select = select

    def forward(self, x, *more):
        weights, ids = self.select(self.gate(x.view(-1, HIDDEN)))
        return self.experts(x.view(-1, HIDDEN), ids, weights, *more)


class EagerTrial(module._Trial):
    """A trial whose block is not compiled: what its graphs would hold is called in its router."""

    def __init__(self, experts, *, top_k=TOP_K, needs_merge=True):
        w = Written()
        scores = w.given(5, EXPERTS)
        self.gate = types.SimpleNamespace(
            num_experts=EXPERTS, top_k=top_k, form="top-k", scoring="softmax", needs_merge=needs_merge, uses=(),
            ids=w.top_k(scores, top_k)[1], weights=w.given(5, top_k), router_input=w.given(5, HIDDEN),
        )  # fmt: skip
        plain = Plain(experts)
        block = module.TrialBlock(plain, plain.gate.weight, plain, EXPERTS, EXPERTS)
        super().__init__(self.gate, block, None)
        self._call = block.module
        self._choose, self._score = module._Choose(self, scores, self.gate), module._Score(self)
        self._versions, self._refused = dict.fromkeys(("original", "plain", "merged"), None), {}
        block.module.select = self.select

    def select(self, logits):
        self._found = [self.gate]
        weights, ids = self._choose(self._score(logits).softmax(-1).topk(self.gate.top_k))
        module._Tell(self._ids)(ids)
        module._Tell(self._weights)(weights)
        if self._version == "plain":
            ids = torch.ops.sere.reroute(ids, self._matrix, 1)
        elif self._version == "merged":
            ids, weights = torch.ops.sere.reroute_merged(ids, weights, self._matrix, 1)
        return weights, ids

    def verdict(self):
        return self.run_whole(self._block.candidates())

    def experts(self):
        """Names of the parameters that are the experts', or why there are none."""
        found = self._experts(self._block.candidates(), self._inputs())
        return found if isinstance(found, str) else sorted(one.name for one in found)


class TwoLayers(Listed):
    """Two matrices and two vectors for each."""

    def expert(self, x, number):
        return torch.tanh(self.mlps[number](x)) * 2


class Padding(Experts):
    """Half of the tokens, or what a mask marks, are sent to the expert `target`; -1 is none."""

    def __init__(self, target, weigh=lambda weights: weights):
        super().__init__(weigh)
        self.target = target

    def forward(self, x, ids, weights, mask=None):
        mask = torch.arange(len(x)) < len(x) // 2 if mask is None else mask
        ids = torch.where(mask.view(-1, 1), ids, self.target)
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, slot = torch.where(ids == expert)
            out.index_add_(0, token, self.expert(x[token], expert) * weights[token, slot, None])
        return out


class BiasBeside(Experts):
    """A vector per expert, and a matrix that all share."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.shared = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def expert(self, x, number):
        return torch.tanh(x @ self.w[number]) + self.bias[number] + (x @ self.shared.T).sum(-1, keepdim=True)


class Flat(Experts):
    """No output has a row per token."""

    def forward(self, x, ids, weights):
        return super().forward(x, ids, weights).sum(0)


class Failing(Experts):
    """What new ids make it do raises."""

    def forward(self, x, ids, weights):
        if any(len(set(row)) < len(row) for row in ids.tolist()):
            raise ValueError("named twice\nand more")
        return super().forward(x, ids, weights)


class TestTrialsWithoutCompiling:
    """What is concluded from runs of a block, in no time: what makes them run is tested above."""

    @pytest.mark.parametrize(
        ("experts", "merged"),
        [
            (Experts(), True),
            (Overwriting(), True),
            (Chained(), False),
            (Experts(lambda weights: weights**2), False),
            (Experts(lambda weights: weights.softmax(-1)), False),
            (OneOutput(), True),
            (TwoLayers(), True),
            (BiasBeside(), True),
            (Failing(), True),
            (Split(), True),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_proven(self, experts, merged):
        verdict = EagerTrial(experts).verdict()
        assert (verdict.merged, verdict.reason, verdict.is_gate, verdict.whole) == (merged, "", True, True)

    def test_what_is_tried_first(self):
        """A rewrite that merges where the gate needs it, else plain ids: both are right of a plain sum."""
        assert EagerTrial(Experts(), needs_merge=True).verdict().merged is True
        assert EagerTrial(Experts(), needs_merge=False).verdict().merged is False

    @pytest.mark.parametrize(
        ("experts", "is_gate", "reason"),
        [
            (Unweighted(), True, "run with the code that receives its ids, Plain is off by"),
            (Values(), False, "values of a table"),
            (ScalingValues(), False, "which act on no hidden states"),
            (Prompts(), True, "its scores do not weight what is computed"),
            (Scaled(), True, "is off by"),
            (Flat(), False, "no parameter around its router acts on the tokens of one expert alone"),
            (Padding(0), False, "no parameter around its router acts on the tokens of one expert alone"),
            (Padding(EXPERTS - 1), True, "is off by"),
            (Padding(-1), True, "mark their ids with -1 before the graph ends"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
    )
    def test_refused(self, experts, is_gate, reason):
        verdict = EagerTrial(experts).verdict()
        assert (verdict.merged, verdict.is_gate) == (None, is_gate)
        assert reason in verdict.reason

    def test_the_first_way_tried_is_the_one_told_of(self):
        assert "could not be run on made-up choices: ValueError: named twice" in (
            EagerTrial(type("Both", (Failing, Unweighted), {})(), needs_merge=False).verdict().reason
        )
        trial = EagerTrial(Unweighted())
        trial._versions, trial._refused = {"original": None}, {"merged": "of this", "plain": "of that"}
        assert trial.verdict().reason == "of this"
        trial._refused = {}
        assert trial.verdict().reason == "it cannot be rewritten"

    def test_another_gate_than_the_models(self):
        trial = EagerTrial(Experts())
        trial.gate = types.SimpleNamespace(**{**vars(trial.gate), "top_k": TOP_K + 1})
        trial._gate = types.SimpleNamespace(**{**vars(trial._gate), "scoring": "sigmoid"})
        trial.gate.top_k = TOP_K
        verdict = trial.verdict()
        assert (verdict.merged, verdict.is_gate, verdict.whole) == (None, True, False)
        assert verdict.reason == "Plain compiled alone has another gate than it has in the model"

    def test_a_block_without_the_gate(self):
        trial = EagerTrial(Experts())
        trial._block.module.select = lambda logits: logits.softmax(-1).topk(TOP_K)
        assert trial.verdict() is None
        trial = EagerTrial(Experts())
        trial._block.module.select = None
        assert trial.verdict() is None

    @pytest.mark.parametrize(
        ("experts", "names"),
        [
            (Experts(), ["experts.w"]),
            (BiasBeside(), ["experts.bias", "experts.w"]),
            (OneOutput(), ["experts.bias", "experts.w"]),
            (Scaled(), ["experts.w"]),
            (Scaled((EXPERTS, 1)), ["experts.w"]),
            (TwoLayers(), ["experts.mlps.*.bias", "experts.mlps.*.weight"]),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
    )
    def test_whose_parameters(self, experts, names):
        assert EagerTrial(experts).experts() == names

    def test_a_tensor_is_taken_once(self):
        """In the first of the ways to cut it that fits; those behind it are looked at all the same."""
        trial = EagerTrial(BiasBeside())
        wanted = ("experts.w", "experts.bias")
        w, bias = (next(c for c in trial._block.candidates() if c.name == name and c.dim == 0) for name in wanted)
        assert trial._experts([w, w, bias], trial._inputs()) == [w, bias]

    def test_one_expert_a_token(self):
        """There is no weight to tell by: one score for one choice."""
        trial = EagerTrial(Experts(), top_k=1)
        assert not trial._weighs_nothing([], ((), {}))

    def test_masks_of_tokens(self):
        """Padding that a mask says there is none of is asked for."""
        trial = EagerTrial(Padding(0))
        x, full = torch.randn(6, HIDDEN), torch.ones(6, dtype=torch.bool)
        [one] = [c for c in trial._block.candidates() if c.name == "experts.w" and c.dim == 0]
        for target in (0, EXPERTS - 1, -1):
            trial._block.module.experts.target = target
            assert trial._sends_elsewhere([one], ((x, full), {}))
        trial._block.module.experts = EagerTrial(Marked())._block.module.experts
        [one] = [c for c in trial._block.candidates() if c.name == "experts.w" and c.dim == 0]
        assert trial._sends_elsewhere([one], ((x, full), {})) is False

    @pytest.mark.parametrize(("mark", "misses"), [(-1, False), (EXPERTS, False), (None, True)])
    def test_tokens_without_a_choice_are_not_missed(self, mark, misses):
        """Their ids are marked before the graph ends; those that are dropped behind it had one."""
        trial = EagerTrial(Padding(-1))
        [one] = [c for c in trial._block.candidates() if c.name == "experts.w" and c.dim == 0]
        real, own = (torch.arange(6) < 3).view(-1, 1), trial._choose
        if mark is not None:

            def choose(picked):
                weights, ids = own(picked)
                return weights, torch.where(real, ids, mark)

            trial._choose = choose
        assert trial._misses_tokens([one], ((torch.randn(6, HIDDEN), real.flatten()), {})) is misses

    def test_every_expert_may_be_chosen(self):
        """With as many choices as experts there is none that nobody chose."""
        trial = EagerTrial(Experts(), top_k=EXPERTS)
        [one] = [c for c in trial._block.candidates() if c.name == "experts.w" and c.dim == 0]
        assert trial._adds_tokens([one], trial._inputs()) is False

    def test_what_is_tried_as_input(self):
        """What the model calls the block with, if that is little; else made-up hidden states of one batch, or none."""
        trial = EagerTrial(Experts())
        assert [a.shape for a in trial._inputs()[0]] == [(1, 12, HIDDEN)]
        trial._called_with = ((torch.ones(5, HIDDEN).double(),), {})
        found = trial._inputs()[0][0]
        assert (found.shape, found.dtype) == ((5, HIDDEN), torch.float32)
        w = Written()
        trial._gate.ids = w.input(torch.zeros(200, TOP_K, dtype=torch.int64))
        assert [a.shape for a in trial._inputs()[0]] == [(1, 12, HIDDEN)]
        trial._gate.ids = w.input(torch.zeros(64, TOP_K, dtype=torch.int64))
        assert [a.shape for a in trial._inputs()[0]] == [(5, HIDDEN)]
        trial._gate.ids = w.input(torch.zeros(65, TOP_K, dtype=torch.int64))
        trial._called_with = None
        trial._call = lambda x: trial._block.module(x) if x.dim() == 2 else [][0]
        assert [a.shape for a in trial._inputs()[0]] == [(12, HIDDEN)]

    def test_how_wide_made_up_hidden_states_are(self):
        """As what the router reads; else, where that is not known, as its weight."""
        trial = EagerTrial(Experts())
        trial._block.weight = torch.zeros(HIDDEN, EXPERTS)
        assert trial._inputs()[0][0].shape[-1] == HIDDEN
        trial._block.weight = torch.zeros(EXPERTS, HIDDEN)
        trial._gate.router_input = Written().graph.placeholder("unknown")
        assert trial._inputs()[0][0].shape[-1] == HIDDEN

    @pytest.mark.parametrize(
        ("sizes", "by_sequence", "dim"),
        [
            ((5,), False, 0),
            ((1, 5), False, 1),
            ((5, 1), False, 1),
            ((5, 7), False, 0),
            ((7, 5), False, 1),
            ((1, 7), True, 0),
            ((5, 2, 7), False, 2),
            ((1, 2, 7), True, 2),
            ((5,), True, 0),
        ],
    )
    def test_what_counts_who_chooses(self, sizes, by_sequence, dim):
        """Tokens; in [B, T, H] sequences, where there are as many choices, or one was seen to be made for all."""
        trial = EagerTrial(Experts())  # five choose
        trial._by_sequence = by_sequence
        assert trial._counting_dim(torch.zeros(*sizes, HIDDEN)) == dim

    def test_runs_tell_what_is_returned_and_written(self):
        trial = EagerTrial(Experts())
        x = torch.randn(5, HIDDEN, requires_grad=True)
        [out] = trial._run(((x,), {}), seed=4)
        assert not out.requires_grad
        assert torch.equal(trial._run(((x,), {}), seed=4)[0], out)
        assert not torch.equal(trial._run(((x,), {}), seed=6)[0], out)
        assert torch.equal(trial._run(((), {"x": x}), seed=4)[0], out)
        assert len(trial._ids) == len(trial._weights) == 1
        state = torch.get_rng_state()
        trial._run(((x,), {}))
        assert torch.equal(torch.get_rng_state(), state)

    def test_what_re_routing_makes_of_each_expert(self):
        trial = EagerTrial(Experts())
        trial._run(trial._inputs())
        found = trial._expert_map()
        ids = trial._ids[0]
        assert {u: found[u] for u in ids.flatten().tolist()} == found
        assert set(found.values()) <= set(ids[:, 0].flatten().tolist())


class Marked(Padding):
    """What a mask marks gets no expert, and had none before."""

    def __init__(self):
        super().__init__(-1)

    def forward(self, x, ids, weights, mask=None):
        return Experts.forward(self, x, ids, weights)


class TestCallsInGraphs:
    """What stands in a block's graph while it is tried."""

    @staticmethod
    def trial(**changes):
        own = {"scores": "own", "seed": 1, "seed_of_scores": 1, "absent": None, "chosen": ()}
        return types.SimpleNamespace(**{**own, **changes})

    def choose(self, form="top-k", columns=6, flat=False, leading=(4,), **changes):
        w = Written()
        scores = w.given(*leading, columns)
        ids = w.input(torch.zeros(*leading, *(() if flat else (2,)), dtype=torch.int64))
        return module._Choose(self.trial(**changes), scores, types.SimpleNamespace(form=form, ids=ids, top_k=2))

    @pytest.mark.parametrize("leading", [(4,), (2, 3)])
    def test_a_choice_in_place_of_the_routers(self, leading):
        like = torch.zeros(*leading, 2, dtype=torch.int32)
        ids = self.choose(leading=leading)(like)
        assert (ids.shape, ids.dtype) == (like.shape, like.dtype)
        assert torch.equal(ids, made_up_order(leading, 6, 1)[..., :2].int())
        picked = self.choose(leading=leading)((torch.zeros(*leading, 2, dtype=torch.float64), like))
        assert torch.equal(picked.indices, ids)
        assert picked[1] is picked.indices
        assert (picked.values.shape, picked.values.dtype) == (like.shape, torch.float64)
        assert picked.values.is_contiguous()
        assert (picked.values[..., 0] > picked.values[..., 1]).all()
        assert (picked.values >= 0.1).all()
        assert (picked.values <= 1.1).all()

    def test_one_choice_without_its_dimension(self):
        like = torch.zeros(4, dtype=torch.int64)
        ids = self.choose("max", flat=True)(like)
        assert torch.equal(ids, made_up_order((4,), 6, 1)[..., 0])
        picked = self.choose("max", flat=True)((torch.zeros(4), like))
        assert torch.equal(picked.indices, ids)
        assert picked.values.shape == (4,)

    def test_other_scores_are_of_another_seed(self):
        like = (torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64))
        own, other = self.choose()(like), self.choose(seed_of_scores=2)(like)
        assert torch.equal(own.indices, other.indices)
        assert not torch.equal(own.values, other.values)
        assert torch.equal(own.values, self.choose()(like).values)

    def test_an_absent_expert_is_the_last_choice(self):
        order = made_up_order((4,), 6, 1, last=3)
        assert (order[:, -1] == 3).all()
        assert (made_up_order((4,), 6, 1, last=0)[:, -1] == 0).all()
        ids = self.choose(absent=3)(torch.zeros(4, 5, dtype=torch.int64))
        assert not (ids == 3).any()

    @pytest.mark.parametrize(("scores", "power"), [("own", 1), ("others", 2)])
    def test_scores_of_steps(self, scores, power):
        """The best that is left is the next choice, whatever a step masks."""
        made = self.choose("steps", scores=scores)(torch.zeros(4, 6, dtype=torch.float64))
        order = made_up_order((4,), 6, 1)
        assert torch.equal(made.argsort(-1, descending=True), order)
        want = torch.arange(6, 0, -1).double().expand(4, 6) / 6
        torch.testing.assert_close(made.gather(-1, order), want**power)
        assert made.dtype == torch.float64

    def test_logits(self):
        logits = torch.tensor([[1.0, -2.0, 4.0]], dtype=torch.float64)
        assert module._Score(self.trial())(logits) is logits
        assert module._Score(self.trial(scores="equal"))(logits).tolist() == [[0, 0, 0]]
        other = module._Score(self.trial(scores="others"))(logits)
        assert other.dtype == torch.float64
        ratio = other / logits
        assert ((ratio >= 0.5) & (ratio <= 1.5)).all()
        assert len(ratio.unique()) == 3
        assert torch.equal(other, module._Score(self.trial(scores="others"))(logits))
        assert not torch.equal(other, module._Score(self.trial(scores="others", seed_of_scores=2))(logits))

    def test_what_is_told_is_a_copy(self):
        told, value = [], torch.ones(2, requires_grad=True)
        assert module._Tell(told)(value) is None
        assert told[0].tolist() == [1, 1]
        assert not told[0].requires_grad
        assert told[0].data_ptr() != value.data_ptr()

    def test_a_mask_of_tokens_marks_the_second_half(self):
        assert module._half_masked(torch.ones(5, dtype=torch.bool), 5).tolist() == [True, True, False, False, False]
        assert module._half_masked(torch.ones(2, 2, dtype=torch.bool), 4).tolist() == [[True, True], [False, False]]
        assert module._half_masked(torch.ones(2, dtype=torch.bool), 2).tolist() == [True, False]
        others = (7, torch.ones(1, dtype=torch.bool), torch.ones(5), torch.ones(4, dtype=torch.bool))
        for value, tokens in zip(others, (5, 1, 5, 5), strict=True):
            assert module._half_masked(value, tokens) is value

    def test_vectors(self):
        for sizes, vector in (((3,), True), ((1, 3), True), ((), True), ((1, 1), True), ((2, 2), False)):
            assert module._is_vector(torch.zeros(sizes)) is vector


class MaskedLater(nn.Module):
    """The code behind the end of the graph makes a mask of what it is given, and sends what that marks to an expert."""

    def __init__(self, told, sent=lambda ids: 2):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = Experts()
        self.told, self.sent = told, sent

    def forward(self, x, given=None):
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        torch._dynamo.graph_break()
        ids = ids if given is None else torch.where(self.told(given), ids, self.sent(ids))
        return self.experts(x, ids, weights)


@pytest.mark.parametrize(
    ("told", "given"),
    thinned(
        [
            (lambda given: given[:, None].bool(), torch.ones(5, dtype=torch.int64)),
            (lambda given: given[:, None] > 0.5, torch.ones(5)),
            (lambda given: given[:, None] == 0, torch.zeros(5)),
            (lambda given: given[:, None] != 0, torch.arange(5) + 3),
            (lambda given: torch.arange(5)[:, None] < given, torch.tensor(5)),
            (lambda given: given, torch.tensor(True)),
            (lambda given: torch.arange(5)[:, None] < given, 5),
            (lambda given: torch.tensor(given), True),
        ],
        (0, 5, 6),
    ),
)
def test_what_marks_nothing_yet_may_mark_later(told, given):
    """Tokens that are sent to an expert in the middle, by masks of any form."""
    [verdict] = verdicts(MaskedLater(told), rows()[0], given)
    assert verdict.merged is None
    assert "mark their ids with -1 before the graph ends" in verdict.reason


def test_a_mask_that_only_a_later_call_has():
    """The graph before the break serves that call too: it did not ask."""
    [verdict] = verdicts(MaskedLater(lambda given: given[:, None]), rows()[0])
    assert verdict.merged is None
    assert "mark their ids with -1 before the graph ends" in verdict.reason


def test_the_mask_of_a_long_prompt_is_tried():
    """Though so many tokens are not: the block takes made-up hidden states without a mask as well."""
    long = torch.randn(100, HIDDEN)
    block = MaskedLater(lambda given: given[:, None])
    assert [v.merged for v in verdicts(block, long, torch.ones(100, dtype=torch.bool))] == [None]


def test_padding_that_takes_the_choice_of_another_token():
    """What it chose itself makes no primaries, and an exchange of all experts shows in every token."""
    block = MaskedLater(lambda given: given[:, None], lambda ids: ids[:1])
    [verdict] = verdicts(block, rows()[0], torch.ones(5, dtype=torch.bool))
    assert verdict.merged is None
    assert "mark their ids with -1 before the graph ends" in verdict.reason


VERSIONS = [f"{name}{way}" for way in ("", ", ids alone", ", ids kept") for name in ("plain", "merged")]


def gate_of(ids, *uses, **changes):
    """A gate whose ids are used so; what else it has does not matter."""
    own = {"selection": ids, "values": None, "router_weight": ids, "router_input": ids, "scoring": "softmax"}
    own |= {"num_experts": EXPERTS, "top_k": TOP_K, "is_sorted": True, "all_ids": (ids,)}
    return Gate(ids=ids, uses=tuple(Use(consumer, ids, kind) for consumer, kind in uses), **own | changes)


class TestWhichIdsAreNew:
    """Of a gate some of whose ids leave the graph, as they are or in what is made of them."""

    def written(self):
        w = Written()
        ids = w.input(torch.zeros(5, TOP_K, dtype=torch.int64))
        inside, made = w.call(torch.add, ids, 1), w.call(torch.mul, ids, 2)
        last = w.call(torch.neg, inside)
        w.give(ids, made, last)
        return ids, inside, made, last, w.graph.output_node()

    def test_what_is_made_of_ids_is_of_the_routers_where_they_leave_themselves(self):
        ids, inside, made, _, output = self.written()
        gate = gate_of(ids, (output, UseKind.LEAVES), (made, UseKind.UNKNOWN), (inside, UseKind.LOOK_UP))
        found = module.ids_alone(gate)
        assert [use.kind for use in found.uses] == [UseKind.LEAVES, UseKind.STATISTIC, UseKind.LOOK_UP]
        assert [use.consumer for use in found.uses] == [output, made, inside]

    def test_where_all_of_it_leaves_in_one_way(self):
        """As it is, or in what is made of it: what keeps the router's ids anyway does not count."""
        ids, inside, made, _, output = self.written()
        assert module.ids_alone(gate_of(ids, (output, UseKind.LEAVES), (inside, UseKind.STATISTIC))) is None
        assert module.ids_alone(gate_of(ids, (made, UseKind.LEAVES), (output, UseKind.STATISTIC))) is None

    def test_only_the_dispatch_in_the_graph_gets_new_ids(self, monkeypatch):
        ids, inside, made, last, output = self.written()
        monkeypatch.setattr(module, "ends_of", lambda gate: types.SimpleNamespace(complete=last))
        uses = [(inside, UseKind.GROUPED), (made, UseKind.LEAVES), (output, UseKind.LEAVES), (made, UseKind.LOOK_UP)]
        kinds = [use.kind for use in module._ids_kept(gate_of(ids, *uses)).uses]
        assert kinds == [UseKind.GROUPED, UseKind.STATISTIC, UseKind.STATISTIC, UseKind.LOOK_UP]
        assert module._ids_kept(gate_of(ids, *uses[1:])) is None
        skip = Skip(SkipReason.NO_IDS, ids)
        monkeypatch.setattr(module, "ends_of", lambda gate: skip)
        assert module._ids_kept(gate_of(ids, *uses)) is None

    def test_what_tells_gates_of_a_block_apart(self):
        ids, inside, made, _, output = self.written()
        uses = (output, UseKind.LEAVES), (inside, UseKind.GROUPED)
        gate = gate_of(ids, *uses)
        assert module._signature(gate) == module._signature(gate_of(made, *reversed(uses), is_sorted=False))
        others = [{"form": "sort"}, {"num_experts": 9}, {"top_k": 2}, {"scoring": "sigmoid"}, {"weights": ids}]
        others = [gate_of(ids, *uses, **changes) for changes in others]
        others += [gate_of(ids, *uses[:1]), gate_of(ids, *uses, (made, UseKind.LOOK_UP)), gate_of(ids, *uses[1:])]
        assert len({module._signature(one) for one in [gate, *others]}) == 1 + len(others)

    def test_names_of_versions(self):
        assert module._version(True, ", ids kept") == "merged, ids kept"
        assert module._version(False, "") == "plain"


class TestWhichModulesAreTried:
    """Those around the router's weight, from the inside out, until one holds the gate as the model does."""

    @pytest.fixture
    def tried(self, monkeypatch):
        """Sets what is found of each module, and tells of which it was asked."""
        asked = []

        def prove(*found, kept=False, modules=None, spread=()):
            modules = modules or [nn.Linear(2, 3 + place) for place in range(len(found))]
            self.modules, self.numbers = modules, [module._number(one) for one in modules]
            self.weight = nn.Parameter(torch.zeros(3, 2))
            of_modules = dict(zip(modules, found, strict=True))
            asked.clear()

            def verdict_on(one, block, gate, owner, kept):
                assert block == module._number(one)
                asked.append((modules.index(one), kept))
                return of_modules[one]

            monkeypatch.setattr(module, "_verdict_on", verdict_on)
            monkeypatch.setattr(module, "spread_over_ranks", lambda one: dict(spread).get(modules.index(one), ""))
            owner = types.SimpleNamespace(surroundings=tuple(modules), weight=self.weight)
            return prove_outside(types.SimpleNamespace(num_experts=EXPERTS), owner, kept=kept)

        prove.asked = asked
        return prove

    def test_none_could_be_run(self, tried):
        verdict = tried(None, None)
        assert (verdict.merged, verdict.is_gate, verdict.block, verdict.written) == (None, False, -1, None)
        assert verdict.reason == "no module around its router could be run"
        assert tried.asked == [(0, False), (1, False)]
        assert module._blocks_around[self.weight] == frozenset(self.numbers)
        assert self.weight not in module._settings

    def test_of_what_ranks_exchange_nothing_is_run(self, tried):
        verdict = tried(module.Verdict(True), None, spread={1: "w is spread over ranks"})
        assert (verdict.merged, verdict.is_gate, tried.asked) == (None, True, [])
        assert verdict.reason.startswith("w is spread over ranks, and a trial of the code outside the graph would wait")

    def test_the_first_that_holds_the_gate_is_the_last_tried(self, tried):
        verdict = tried(None, module.Verdict(False, written=frozenset("a")), module.Verdict(True))
        assert (verdict.merged, verdict.block, verdict.written) == (False, self.numbers[1], frozenset("a"))
        assert tried.asked == [(0, False), (1, False)]

    def test_a_part_of_the_gate_is_looked_at_further_out(self, tried):
        part, none = module.Verdict(None, "part", whole=False), module.Verdict(None, "none", is_gate=False)
        verdict = tried(part, module.Verdict(True))
        assert (verdict.merged, verdict.block) == (True, self.numbers[1])
        for outer in (none, None):
            verdict = tried(part, outer)
            assert (verdict.reason, verdict.block, len(tried.asked)) == ("part", self.numbers[0], 2)

    def test_the_outermost_of_those_without_experts_tells_why(self, tried):
        first, second = (module.Verdict(None, reason, is_gate=False) for reason in ("first", "second"))
        verdict = tried(first, second)
        assert (verdict.reason, verdict.block) == ("second", self.numbers[1])
        assert tried(first, None).reason == "first"

    def test_the_settings_of_what_was_tried_are_watched(self, tried):
        layer = nn.Sequential(nn.Identity())
        tried(module.Verdict(True, written=frozenset()), modules=[layer])
        assert module._settings[self.weight].are_the_same()
        layer.register_forward_hook(print)
        assert not module._settings[self.weight].are_the_same()
        tried(None, modules=[layer])
        assert self.weight not in module._settings

    @pytest.mark.parametrize("written", [None, frozenset(), frozenset({"log"})])
    def test_what_calls_write_is_no_setting(self, tried, written):
        layer = Keeping("nowhere")
        layer.forward_log = layer.log
        tried(module.Verdict(True, written=written), modules=[layer])
        layer.log.append(1)
        assert module._settings[self.weight].are_the_same() is (written == {"log"})
        layer.log.clear()
        assert module._settings[self.weight].are_the_same()
        layer.place = "a list"
        assert not module._settings[self.weight].are_the_same()

    def test_what_is_around_is_tried_where_ids_are_kept(self, tried, monkeypatch):
        """It says more only where it is such a gate, and a rewrite gives something else there."""
        around = []

        def holds_more(one, inner, experts):
            around.append((self.modules.index(one), self.modules.index(inner)))
            return experts == EXPERTS

        monkeypatch.setattr(module, "_holds_more_of_experts", holds_more)
        inner = module.Verdict(None, "inner", written=frozenset("a"), off=frozenset({False}))
        off = {"off": frozenset({True})}

        def kept(*found):
            verdict = tried(*found, kept=True)
            assert (verdict.block, verdict.written) == (self.numbers[-1], None)
            assert self.weight not in module._settings
            return verdict.reason

        assert kept(inner, module.Verdict(None, "outer", **off)) == "outer"
        assert tried.asked == [(0, True), (1, True)]
        others = [None, module.Verdict(None, "outer", is_gate=False, **off), module.Verdict(None, "outer")]
        for outer in (*others, module.Verdict(None, "outer", whole=False, **off)):
            assert kept(inner, outer) == "inner"
        around.clear()
        assert kept(None, inner, module.Verdict(None, "outer", **off)) == "outer"
        assert around == [(2, 1)]
        assert kept(inner, None, module.Verdict(None, "outer", **off)) == "outer"
        assert around[1:] == [(1, 0), (2, 0)]
        monkeypatch.setattr(module, "_holds_more_of_experts", lambda one, inner, experts: False)
        assert kept(inner, module.Verdict(None, "outer", **off)) == "inner"
        assert tried.asked == [(0, True)]

    def test_what_counts_experts_beside_a_block(self):
        """A parameter or buffer of its own, and not where other blocks of the kind stand in it."""
        inner = nn.Linear(EXPERTS, 3)
        outer = nn.Sequential(inner, nn.LayerNorm(3))
        holds = functools.partial(module._holds_more_of_experts, outer, inner, EXPERTS)
        assert not holds()
        outer.scale = nn.Parameter(torch.zeros(2, EXPERTS))
        assert holds()
        del outer.scale
        outer.register_buffer("load", torch.zeros(EXPERTS, 2))
        assert holds()
        outer.append(nn.Linear(3, 3))
        assert not holds()

    def test_one_trial_for_all_that_compute_the_same(self, monkeypatch):
        """For each kind of call, each way of tracing, and each question."""
        asked, one = [], nn.Linear(2, 3)
        monkeypatch.setattr(module, "_verdicts", {})
        monkeypatch.setattr(module, "_try_block", lambda *given: asked.append(given))
        gate = gate_of(Written().input(torch.zeros(5, TOP_K, dtype=torch.int64)))
        other = dataclasses.replace(gate, top_k=1)
        owner, calls = object(), []
        monkeypatch.setattr(dynamo, "arguments_of", lambda one: calls[-1])
        for called in ((), (torch.zeros(2),)):
            calls.append((called, {}))
            for block, of, kept in ((7, gate, False), (7, gate, True), (7, other, False), (8, gate, False)):
                for _ in range(2):
                    assert module._verdict_on(one, block, of, owner, kept) is None
                assert asked[-1] == (of, one, owner, calls[-1], kept)
        assert len(asked) == 8
        for traced in ("captures_dynamic_shapes", "makes_graphs_before_loops"):
            monkeypatch.setattr(dynamo, traced, lambda: True)
            module._verdict_on(one, 7, gate, owner, False)
        assert len(asked) == 10

    def test_a_weight_that_nobody_owns(self):
        verdict = module.Verdict(True, block=module._number(nn.Linear(2, 3)), written=frozenset())
        weight = nn.Parameter(torch.zeros(3, 2))
        assert not module.computes_the_same(weight, verdict)
        assert module._blocks_around[weight] == frozenset()

    def test_settings_are_watched_from_the_first_verdict_that_tells_what_calls_write(self):
        layer = Keeping("nowhere")
        holds = functools.partial(module.computes_the_same, layer.gate.weight)
        other = module.Verdict(True, block=-2, written=frozenset())
        silent = module.Verdict(True, block=module._number(layer))
        assert (holds(other), holds(silent)) == (False, True)
        assert layer.gate.weight not in module._settings
        assert holds(module.Verdict(True, block=silent.block, written=frozenset({"log"})))
        layer.log.append(1)
        assert holds(silent)
        assert module._settings[layer.gate.weight].are_the_same()
        layer.place = "a list"
        assert not holds(silent)
        assert layer.gate.weight not in module._settings

    @pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError, NotImplementedError])
    def test_a_block_that_cannot_be_copied(self, error, monkeypatch):
        def refuse(*_):
            raise error("why\nand where")

        monkeypatch.setattr(module, "TrialBlock", refuse)
        ids = Written().input(torch.zeros(5, TOP_K, dtype=torch.int64))
        owner = types.SimpleNamespace(weight=None, root=None)
        verdict = module._try_block(gate_of(ids), nn.Linear(2, 3), owner, None, False)
        assert (verdict.merged, verdict.is_gate, verdict.whole, verdict.written) == (None, True, True, None)
        assert verdict.reason == f"Linear cannot be copied to try it: {error.__name__}: why"

    def test_what_a_block_is_tried_with(self, monkeypatch):
        """Its columns are those of the scores, some of which may be no experts'."""
        made, w = [], Written()
        scores = w.given(5, EXPERTS + 2)
        block = types.SimpleNamespace(candidates=lambda: made[-1][-1:] if len(made) < 3 else [])
        trial = types.SimpleNamespace(written={"log"}, run_whole=lambda found: module.Verdict(True, str(found)))
        monkeypatch.setattr(module, "TrialBlock", lambda *given: made.append(given) or block)
        monkeypatch.setattr(module, "_Trial", lambda *given: made.append(given) or trial)
        owner, call = types.SimpleNamespace(weight="w", root="r"), ((), {})
        gate = gate_of(w.top_k(scores, TOP_K)[1])
        gate = dataclasses.replace(gate, selection=gate.ids.args[0])
        verdict = module._try_block(gate, "the block", owner, call, True)
        assert verdict == module.Verdict(True, f"({EXPERTS + 2},)", written=frozenset({"log"}))
        assert made == [("the block", "w", "r", EXPERTS, EXPERTS + 2), (gate, block, call, True)]
        trial.run_whole = lambda found: None
        made.clear()
        assert module._try_block(gate, "the block", owner, call, True) is None
        assert len(made) == 2
        alone = dataclasses.replace(gate, selection=scores)
        assert module._try_block(alone, "the block", owner, call, True) is None
        assert made[2:] == [("the block", "w", "r", EXPERTS, EXPERTS)]


def watched_compiling(monkeypatch):
    """A list that is empty but while nothing more is to be compiled."""
    inside = []

    @contextlib.contextmanager
    def nothing_more():
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(dynamo, "compiling_nothing_more", nothing_more)
    return inside


def trial_of(**methods):
    """A trial of which these methods do something else."""
    trial = EagerTrial(Experts())
    for name, does in methods.items():
        setattr(trial, name, does)
    return trial


def returning(value):
    return lambda *_, **__: value


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


class TestWhatATrialConcludes:
    """From the answers to each of its questions, in order."""

    RIGHT = module.Verdict(True, ids_alone=True)

    def conclude(self, **answers):
        asked = []
        own = {"_experts": ["one"], "_compare": self.RIGHT, "_find_restless": {"last": True}}
        own |= {"_weighs_nothing": False, "_sends_elsewhere": False, "_computes_all": False}
        methods = {name: answer if callable(answer) else returning(answer) for name, answer in (own | answers).items()}
        trial = trial_of()
        trial._found, trial._inputs = [trial._gate], lambda: ((), {})
        for name, does in methods.items():
            setattr(trial, name, lambda *given, name=name, does=does: asked.append(name) or does(*given))
        return trial, asked, trial.run_whole(["candidate"])

    def test_all_that_is_asked(self):
        trial, asked, verdict = self.conclude()
        assert verdict is self.RIGHT
        assert (trial._restless, trial._is_compiled) == ({"last": True}, True)
        assert asked == [
            *("_find_restless", "_experts", "_compare", "_weighs_nothing", "_sends_elsewhere", "_computes_all"),
        ]

    @pytest.mark.parametrize(
        ("answers", "reason", "is_gate"),
        [
            ({"_experts": "no experts"}, "no experts", False),
            ({"_weighs_nothing": True}, SkipReason.NOTHING_WEIGHED.value, True),
            ({"_sends_elsewhere": True}, module._SENT_ELSEWHERE, True),
            ({"_find_restless": raising(KeyError("a"))}, "could not be run on made-up choices: KeyError: 'a'", False),
            ({"_experts": raising(ValueError("a"))}, "could not be run on made-up choices: ValueError: a", False),
            ({"_compare": raising(IndexError("a"))}, "could not be run on made-up choices: IndexError: a", True),
            ({"_computes_all": raising(TypeError("a"))}, "could not be run on made-up choices: TypeError: a", True),
        ],
    )
    def test_why_nothing_is_proven(self, answers, reason, is_gate):
        _, asked, verdict = self.conclude(**answers)
        assert (verdict.merged, verdict.is_gate, verdict.whole, verdict.saves_nothing) == (None, is_gate, True, "")
        assert verdict.reason.removeprefix("Plain ") == reason
        assert asked[-1] == next(iter(answers))

    def test_where_no_rewrite_is_right_nothing_more_is_asked(self):
        refused = module.Verdict(None, "off", off=frozenset({True}))
        _, asked, verdict = self.conclude(_compare=refused)
        assert (verdict is refused, asked[-1]) == (True, "_compare")

    def test_experts_that_all_compute(self):
        _, _, verdict = self.conclude(_computes_all=True)
        told = f"{SkipReason.DENSE.value} (seen in a run of Plain)"
        assert verdict == dataclasses.replace(self.RIGHT, saves_nothing=told)

    def test_several_gates_of_one_router(self):
        trial = trial_of(_inputs=lambda: ((), {}))
        trial._found = [trial._gate] * 2
        verdict = trial.run_whole([])
        assert (verdict.merged, verdict.is_gate, verdict.whole) == (None, True, False)

    def test_programming_errors_are_not_hidden(self):
        with pytest.raises(ZeroDivisionError):
            self.conclude(_compare=raising(ZeroDivisionError()))


class TestRunsOfATrial:
    X = ((torch.randn(5, HIDDEN),), {})

    @pytest.mark.parametrize(
        ("tokens", "masked", "order"),
        [
            (64, False, ["called", "made up", "one batch"]),
            (64, True, ["called", "made up", "one batch"]),
            (65, False, ["made up", "one batch", "called"]),
            (65, True, ["few", "made up", "one batch", "called"]),
        ],
    )
    def test_what_is_tried_as_input_in_order(self, tokens, masked, order):
        """The first for which a graph with the gate is made; what was found of those before does not count."""
        trial, hidden = trial_of(_of_many=lambda given: given), torch.randn(tokens, HIDDEN).double()
        mask = (torch.ones(tokens, dtype=torch.bool),) if masked else ()
        trial._called_with = ((hidden, *mask), {})
        trial._gate.ids = Written().input(torch.zeros(tokens, TOP_K, dtype=torch.int64))
        kinds = {(tokens, HIDDEN): "called", (12, HIDDEN): "few" if masked else "one batch", (1, 12, HIDDEN): "made up"}
        for last in (*order, None):
            seen = []

            def run(given, seen=seen, last=last):
                assert given[0][0].dtype == torch.float32
                few = len(given[0]) > 1 and len(given[0][1]) == 12
                of = kinds[given[0][0].shape] if few or given[0][0].shape != (12, HIDDEN) else "one batch"
                seen.append(of)
                assert trial._found == []
                if of == last:
                    trial._found.append("gate")
                elif len(seen) % 2:
                    trial._found.append("of a call that fails")
                    raise ValueError(of)

            trial._run = run
            found = trial._inputs()
            assert seen == order[: order.index(last) + 1 if last else None]
            assert (found is None) is (last is None)

    def test_what_differs_between_two_runs_is_restless(self):
        """Also what only one has left; True where it is of other sizes, too."""
        left = [
            {"": 1, "time": 0.5, "log": [1], "same": 1.0, "gone": 1},
            {"": 1, "time": 0.7, "log": [1, 2], "same": 1.0, "new": 1},
        ]
        trial = trial_of()
        runs = iter(left)
        trial._run = lambda inputs: setattr(trial, "kept", next(runs))
        assert trial._find_restless(self.X) == {"time": False, "log": True, "gone": True, "new": True}

    def test_what_is_left_alike(self):
        trial = trial_of()
        trial._restless = {"time": False, "log": True}
        alike = trial._is_left_alike
        assert alike("log", [1], None)
        assert alike("time", 0.5, 0.7)
        assert not alike("time", 0.5, None)
        assert alike("last", 0.5, 0.5)
        assert not alike("last", 0.5, 0.7)

    @pytest.mark.parametrize(
        ("results", "ids", "serves"),
        [
            ([torch.ones(2), torch.ones(2, dtype=torch.int64)], [0], True),
            ([], [0], True),
            ([torch.ones(2)], [], False),
            ([torch.ones(2), torch.tensor([1.0, float("nan")])], [0], False),
            ([torch.tensor([float("inf")])], [0], False),
        ],
    )
    def test_a_call_that_is_served(self, results, ids, serves):
        """The gate runs, and all that comes out is finite."""
        trial = trial_of(_run=returning(results), _ids=ids)
        assert trial._serves(self.X) is serves

    def test_a_call_that_is_not_taken(self):
        for error in (RuntimeError, KeyError, AttributeError):
            assert trial_of(_run=raising(error()), _ids=[0])._serves(self.X) is False

    def test_other_calls_are_made_up_once(self, monkeypatch):
        """Of the inputs, and of those with a mask that they do not have, where the block takes it."""
        made = []
        monkeypatch.setattr(module, "other_calls", lambda given, block: [(given, number) for number in range(2)])

        def with_masks(given, block, leading, device):
            made.append((given, leading, device))
            return ["taken", "refused"]

        monkeypatch.setattr(module, "with_masks", with_masks)
        trial = trial_of(_serves=lambda given: given not in ("refused", ("taken", 1), (self.X, 0)))
        assert trial._other_calls(self.X) == [(self.X, 1), ("taken", 0)]
        assert made == [(self.X, (5,), torch.device("cpu"))]
        assert trial._other_calls(None) == [(self.X, 1), ("taken", 0)]
        assert len(made) == 1
        without = ((torch.arange(5),), {})
        assert list(trial_of(_serves=returning(True))._made_up_calls(without)) == [(without, 0), (without, 1)]
        assert len(made) == 1

    @pytest.mark.parametrize(
        ("sizes", "choices", "several"),
        [((1, 4), TOP_K, True), ((1, 4), TOP_K + 1, False), ((4,), TOP_K, False), ((1, 4), 1, True)],
    )
    def test_several_sequences_where_one_choice_is_made_for_one(self, sizes, choices, several):
        ran, given = [], ((torch.randn(*sizes, HIDDEN),), {})
        trial = trial_of(_run=ran.append, _ids=[torch.zeros(choices)], _found=["before"])
        found = trial._of_many(given)
        assert trial._by_sequence is several
        if several:
            assert (found[0][0].shape, ran, trial._found) == ((12, 4, HIDDEN), [found], [])
        else:
            assert (found is given, ran, trial._found) == (True, [], ["before"])
        without = ((torch.arange(5),), {})
        assert trial._of_many(without) is without

    def test_what_a_run_is_told(self):
        trial = trial_of(_run_once=returning(["result"]))
        state = lambda: (trial._version, trial.seed, trial.scores, trial.absent, trial.chosen)  # noqa: E731
        assert trial._run(self.X) == ["result"]
        assert state() == ("original", 0, "own", None, ())
        assert trial.seed_of_scores == 0
        trial._run(self.X, "merged", 3, scores="others", absent=2, chosen=[1])
        assert state() == ("merged", 3, "others", 2, [1])
        assert trial.seed_of_scores == 1003
        trial._run(self.X, seed=3, scores="equal")
        assert trial.seed_of_scores == 3

    def test_code_behind_the_graph_is_not_compiled_anew(self, monkeypatch):
        """But the graph is, where no graph serves the call."""
        ran, inside = [], watched_compiling(monkeypatch)
        trial = trial_of(_ids=[0])
        trial._run_once = lambda inputs: ran.append(bool(inside)) or len(ran)
        assert (trial._run(self.X), ran) == (1, [False])
        trial._is_compiled = True
        assert (trial._run(self.X), ran) == (2, [False, True])
        trial._ids = []
        assert (trial._run(self.X), ran) == (4, [False, True, True, False])

    def test_a_run_leaves_its_inputs_and_its_block_as_they_were(self):
        class Writing(Experts):
            def __init__(self):
                super().__init__()
                self.register_buffer("load", torch.zeros(2))
                self.last = None

            def forward(self, x, ids, weights):
                out = super().forward(x, ids, weights)
                self.load += 1
                self.last = x.mul_(2)
                return out, "word"

        trial, given = EagerTrial(Writing()), ((torch.ones(5, HIDDEN),), {})
        experts = trial._block.module.experts
        before = experts.load.clone()
        for _ in range(2):
            out, load = trial._run(given)
            assert torch.equal(load, before + 1)
        assert (given[0][0].sum(), experts.last) == (5 * HIDDEN, None)
        assert torch.equal(experts.load, before)
        assert set(trial.kept) == {"", "experts.last"}
        assert trial.written >= {"", "experts.last"}
        assert trial.kept["experts.last"].sum() == 2 * 5 * HIDDEN
        assert torch.equal(trial.kept[""][2][1], out)
        trial._block.module.experts = Experts()
        trial._run(given)
        assert trial.written >= {"", "experts.last"}

    def test_what_a_trial_is_made_of(self, monkeypatch):
        """A block that is compiled by a backend of its own, for one size; a similarity of experts as any other."""
        asked = []
        monkeypatch.setattr(torch, "compile", lambda block, **options: asked.append((block, options)))
        first, second = trial_of(), trial_of()
        block, options = asked[0]
        assert block is first._block.module
        assert list(options) == ["backend", "dynamic"]
        assert isinstance(options["backend"], dynamo.OwnBackend)
        assert options["dynamic"] is False
        assert torch.equal(first._matrix, second._matrix)
        assert first._matrix.shape == (EXPERTS, EXPERTS)
        assert len(first._matrix.unique()) == EXPERTS**2

    def test_what_is_around_a_run(self, recwarn):
        """No gradients, no inference mode, the same random numbers in each; its warnings are not the program's."""
        trial, drawn = trial_of(), []
        state = torch.get_rng_state()
        for outer in (torch.inference_mode, torch.enable_grad):
            with outer(), trial._aside_of_model():
                assert not torch.is_inference_mode_enabled()
                assert not torch.is_grad_enabled()
                drawn.append(float(torch.rand(1)))
                warnings.warn("of a trial", stacklevel=1)
        assert drawn[0] == drawn[1]
        assert torch.equal(torch.get_rng_state(), state)
        assert len(recwarn) == 0

    def test_hidden_states_may_vary_in_number(self, monkeypatch):
        told = []
        monkeypatch.setattr(dynamo, "let_vary", lambda tensor, dim: told.append((tensor.shape, dim)))
        trial = trial_of()
        trial._run(((torch.randn(1, 7, HIDDEN),), {}))
        trial._run(((torch.randn(7, HIDDEN),), {}))
        trial._block.module.forward = lambda x, mask: x
        trial._run(((torch.randn(7, HIDDEN), torch.ones(7)), {}))
        assert told == [((1, 7, HIDDEN), 1), ((7, HIDDEN), 0)]


class TestWhoseParametersTheyAre:
    """What is concluded from the outputs of runs with others in their place."""

    X = ((torch.randn(5, HIDDEN),), {})

    @staticmethod
    def of(trial, *names):
        found = {one.name: one for one in trial._block.candidates() if one.dim in (0, None)}
        return [found[name] for name in names]

    def test_a_number_that_may_scale_weights(self):
        """Not what is no number, nor what is all that there is; else its effect has to show without the others."""
        trial = EagerTrial(OneOutput())
        [w, bias] = self.of(trial, "experts.w", "experts.bias")
        trial._changes_with = returning([True])
        trial._adds_alone = returning(False)
        scales = trial._scales_weights
        assert scales(bias, [w, bias], self.X) is True
        assert scales(bias, [bias], self.X) is False
        assert scales(w, [w, bias], self.X) is False
        trial._adds_alone = returning(True)
        assert scales(bias, [w, bias], self.X) is False
        for changes in ([False, True], [True, False]):  # of all else, and of the number alone
            found = iter([[changes[0], True], [changes[1], False]])
            trial._changes_with = lambda *_, found=found: next(found)
            assert scales(bias, [w, bias], self.X) is True

    def test_what_is_exchanged_to_tell_a_scale(self):
        """First the others; then the number, where the others are zero."""
        trial = EagerTrial(OneOutput())
        [w, bias] = self.of(trial, "experts.w", "experts.bias")
        asked = []

        def changes(exchanged, inputs):
            asked.append((exchanged, bool(w.tensors[0].any()), bool(bias.tensors[0].any())))
            return [True]

        trial._changes_with = changes
        trial._adds_alone = lambda *given: asked.append(given)
        assert trial._scales_weights(bias, [w, bias], self.X) is True
        assert asked == [([w], True, True), ([bias], False, True), (bias, [w], self.X)]

    def test_what_adds_the_same_whatever_a_number_is(self):
        trial = EagerTrial(OneOutput())
        [w, bias] = self.of(trial, "experts.w", "experts.bias")
        words, runs = torch.tensor([1]), {}
        kept = bias.tensors[0].clone()

        def exchange(experts, inputs):
            return runs[torch.equal(bias.tensors[0], kept)]

        trial._with_exchange = exchange
        one, two = torch.tensor([1.0]), torch.tensor([2.0])
        runs[True] = [one, words], [two, words + 1]
        for before, after, alone in ((two, two + 1, True), (two, two + 1.5, False), (two, two, False)):
            runs[False] = [before, words], [after, words]
            assert trial._adds_alone(bias, [w], self.X) is alone
        assert torch.equal(bias.tensors[0], kept)

    def test_which_outputs_change(self):
        trial = trial_of(_with_exchange=returning(([torch.ones(2), torch.ones(2)], [torch.ones(2), torch.zeros(2)])))
        assert trial._changes_with([], self.X) == [False, True]

    def test_an_exchange(self):
        """Of all experts, at the same choice and scores."""
        trial, ran = EagerTrial(Experts()), []
        [w] = self.of(trial, "experts.w")
        kept = w.tensors[0].clone()
        trial._run = lambda *given, **options: ran.append((given, options, w.tensors[0].clone())) or len(ran)
        assert trial._with_exchange([w], self.X, seed=3, scores="equal") == (1, 2)
        assert [(given, options) for given, options, _ in ran] == [((self.X,), {"seed": 3, "scores": "equal"})] * 2
        assert torch.equal(ran[0][2], kept)
        assert torch.equal(ran[1][2], kept.roll(-1, 0))
        assert torch.equal(w.tensors[0], kept)

    @pytest.mark.parametrize(("second", "same"), [((3.0, 5.0), True), ((3.0, 6.0), False), ((0.0, -2.0), False)])
    def test_the_same_effect(self, second, same):
        """Whole numbers do not count."""
        words = torch.arange(2)
        runs = {"own": (1.0, 3.0), "others": second}
        asked = []

        def exchange(experts, inputs, *, scores):
            asked.append((experts, inputs, scores))
            before, after = runs[scores]
            return [torch.tensor([before]), words], [torch.tensor([after]), words + int(after)]

        trial = trial_of(_with_exchange=exchange)
        assert trial._is_same_effect(["e"], ("a", "own"), ("b", "others")) is same
        assert asked == [(["e"], "a", "own"), (["e"], "b", "others")]

    def test_what_is_asked_of_an_effect(self):
        """Other scores, and other hidden states at equal ones."""
        asked = []
        for same in (True, False):
            trial = trial_of(_is_same_effect=lambda *given, same=same: asked.append(given) or same)
            assert trial._weighs_nothing(["e"], self.X) is same
            assert trial._acts_on_hidden(["e"], self.X) is not same
        assert asked[0] == (["e"], (self.X, "own"), (self.X, "others"))
        experts, (inputs, scores), (turned, scores_of_turned) = asked[1]
        assert (experts, inputs is self.X, scores, scores_of_turned) == (["e"], True, "equal", "equal")
        assert torch.equal(turned[0][0], module._turned(self.X[0][0]))

    @pytest.mark.parametrize(
        ("changed", "weights", "belongs"),
        [
            ([0, 1], 0.0, True),
            ([1], 0.0, True),
            ([], 0.0, False),
            ([0, 1, 3], 0.0, False),
            ([0, 1], 1.0, False),
            (None, 0.0, False),
            (RuntimeError("no such place"), 0.0, False),
        ],
    )
    def test_only_tokens_that_name_an_expert_change(self, changed, weights, belongs):
        """At the same weights; expert 2 is named by tokens 0 and 1, expert 4 by 0 and 3."""
        trial = trial_of()
        [one] = self.of(trial, "experts.w")
        kept, disturbed = one.tensors[0].clone(), []
        ids = torch.tensor([[-1, 2, 4], [5, 2, 6], [EXPERTS, 1, 0], [4, 3, 1]])
        base = torch.zeros(4, HIDDEN)

        def run(inputs):
            [expert] = [n for n in range(EXPERTS) if not torch.equal(one.tensors[0][n], kept[n])]
            disturbed.append(expert)
            trial._weights = [torch.ones(4, TOP_K) + weights]
            if isinstance(changed, Exception):
                raise changed
            if changed is None:
                return [torch.zeros(3)]
            result = base.clone()
            result[{2: changed, 4: [0, 3]}[expert]] = 1
            return [result]

        trial._run = run
        given = [torch.zeros(3)] if changed is None else [base]
        assert trial._belongs_to_experts(one, self.X, given, ids, [torch.ones(4, TOP_K)]) is belongs
        assert disturbed == ([2, 4] if belongs else [2])
        assert torch.equal(one.tensors[0], kept)

    @pytest.mark.parametrize("of_first", [True, False])
    def test_both_experts_are_asked(self, of_first):
        """What is right for one may be chance."""
        trial, runs = trial_of(), []
        [one] = self.of(trial, "experts.w")
        ids = torch.tensor([[2, 3, 4], [5, 6, 7]])

        def run(inputs):
            runs.append(1)
            result = torch.zeros(2, HIDDEN)
            result[0 if (len(runs) == 1) is of_first else 1] = 1
            return [result]

        trial._run = run
        assert trial._belongs_to_experts(one, self.X, [torch.zeros(2, HIDDEN)], ids, []) is False
        assert len(runs) == (2 if of_first else 1)

    def test_why_there_are_none(self):
        trial = EagerTrial(BiasBeside())
        bias, w = self.of(trial, "experts.bias", "experts.w")
        trial._scales_weights, trial._acts_on_hidden = returning(False), returning(True)
        belonging = {"experts.bias": True, "experts.w": True}
        trial._belongs_to_experts = lambda one, *_: belonging[one.name]
        find = functools.partial(trial._experts, [bias, w], trial._inputs())
        assert find() == [bias, w]
        belonging["experts.w"] = False
        assert find().startswith("what its indices fetch are vectors")
        belonging.update({"experts.w": True, "experts.bias": False})
        assert find() == [w]
        trial._acts_on_hidden = returning(False)
        assert find().startswith("what its indices fetch is added up whatever the hidden states are")
        trial._scales_weights = returning(True)
        assert find() == "no parameter around its router acts on the tokens of one expert alone"


class TestWhoIsServed:
    """Tokens that the code outside sends to other experts than they chose, or to none."""

    X = ((torch.randn(4, HIDDEN),), {})

    @pytest.mark.parametrize("where", ["_adds_tokens", "_misses_tokens"])
    def test_every_call_is_asked(self, where):
        asked, own = [], ((torch.randn(4, HIDDEN), torch.ones(4, dtype=torch.bool)), {})
        trial = trial_of(_other_calls=returning(["other"]), _run=lambda inputs: None, _ids=[torch.zeros(4, TOP_K)])
        trial._adds_tokens = trial._misses_tokens = lambda experts, given: asked.append(given) or False
        assert trial._sends_elsewhere([], own) is False
        assert [asked[place] is own for place in (0, 1)] == [True, True]
        assert [given[0][1].tolist() for given in asked[2:4]] == [[True, True, False, False]] * 2
        assert asked[4:] == ["other"] * 2
        asked.clear()
        assert trial._sends_elsewhere([], self.X) is False
        assert asked == [self.X, self.X, "other", "other"]
        setattr(trial, where, lambda experts, given: given == "other")
        assert trial._sends_elsewhere([], self.X) is True

    @pytest.mark.parametrize("outer", [0, EXPERTS - 1, None])
    def test_experts_that_nobody_chose(self, outer):
        """The first and the last are disturbed in all of their parameters."""
        trial = EagerTrial(BiasBeside())
        experts = TestWhoseParametersTheyAre.of(trial, "experts.w", "experts.bias")
        kept = [one.tensors[0].clone() for one in experts]
        ran = []

        def run(inputs, *, seed, absent):
            now = [one.tensors[0] for one in experts]
            at = [{n for n in range(EXPERTS) if not torch.equal(a[n], b[n])} for a, b in zip(now, kept, strict=True)]
            ran.append((seed, absent, *at))
            return [torch.ones(2), torch.full((2,), float(at[0] == {outer}))]

        trial._run = run
        assert trial._adds_tokens(experts, self.X) is (outer is not None)
        both = [(1, n, *at) for n in (0, EXPERTS - 1) for at in ((set(), set()), ({n}, {n}))]
        assert ran == both[: 2 if outer == 0 else 4]
        assert all(torch.equal(one.tensors[0], before) for one, before in zip(experts, kept, strict=True))

    @pytest.mark.parametrize(
        ("changed", "ids", "misses"),
        [
            ([[0, 1, 2, 3]] * 3, None, False),
            ([[0, 1], [2], [3]], None, False),
            ([[0, 1], [2], [2]], None, True),
            ([[], [], []], None, False),
            ([[0, 1], [2], [2]], -1, False),
            ([[0, 1], [2], [2]], EXPERTS, False),
            ([[0, 1], [2], [2]], EXPERTS - 1, True),
            ([[0, 1], [2], [2]], 0, True),
        ],
    )
    def test_tokens_that_are_the_same_in_each_draw(self, changed, ids, misses):
        """One that chose nobody is not missed; where no expert does anything, a flag switches them off."""
        trial, seeds = trial_of(_takes_others=returning(False)), []
        chosen = torch.ones(4, TOP_K, dtype=torch.int64)
        if ids is not None:
            chosen[3] = ids
        trial._ids = [chosen.view(1, 4, TOP_K)]

        def exchange(experts, inputs, *, seed):
            seeds.append(seed)
            after = torch.zeros(4, HIDDEN)
            after[changed[seed]] = 1
            return [torch.zeros(4, HIDDEN)], [after]

        trial._with_exchange = exchange
        assert trial._misses_tokens([], self.X) is misses
        assert seeds == [0, 1, 2]

    def test_what_has_no_row_for_each_token_tells_nothing(self):
        trial = trial_of(_takes_others=returning(True), _with_exchange=returning(([torch.ones(1)], [torch.ones(1)])))
        trial._ids = [torch.ones(4, TOP_K, dtype=torch.int64)]
        assert trial._misses_tokens([], self.X) is False

    def test_tokens_that_take_others(self):
        trial = trial_of(_ids=[torch.ones(4, TOP_K, dtype=torch.int64)])
        before, asked = [torch.zeros(4, HIDDEN)], []
        trial._with_exchange = returning((before, [torch.ones(4, HIDDEN)]))
        trial._takes_others = lambda *given: asked.append(given) or len(asked) == 2
        assert trial._misses_tokens(["e"], self.X) is True
        assert [given[:4] for given in asked] == [(["e"], self.X, seed, before) for seed in (0, 1)]
        assert asked[0][4].shape == (4, TOP_K)

    def test_who_takes_others(self):
        """Half of the experts are disturbed: no token changes that names none of them."""
        trial = EagerTrial(BiasBeside())
        experts = TestWhoseParametersTheyAre.of(trial, "experts.w", "experts.bias")
        kept = [one.tensors[0].clone() for one in experts]
        before, seen, changed = [torch.zeros(EXPERTS, HIDDEN)], [], []
        ids = torch.arange(EXPERTS)[:, None].expand(EXPERTS, TOP_K)

        def run(inputs, *, seed):
            now = [one.tensors[0] for one in experts]
            at = [[n for n in range(EXPERTS) if not torch.equal(a[n], b[n])] for a, b in zip(now, kept, strict=True)]
            assert at[0] == at[1]
            seen.append((seed, at[0]))
            after = torch.zeros(EXPERTS, HIDDEN)
            after[[*at[0], *changed]] = 1
            return [after]

        trial._run = run
        takes = functools.partial(trial._takes_others, experts, self.X)
        assert takes(0, before, ids) is False
        assert takes(1, before, ids) is False
        assert [(seed, len(some)) for seed, some in seen] == [(0, EXPERTS // 2), (1, EXPERTS // 2)]
        assert seen[0][1] != seen[1][1]
        changed += [next(n for n in range(EXPERTS) if n not in seen[0][1])]
        assert takes(0, before, ids) is True
        trial._run = returning([torch.zeros(3)])
        assert takes(0, [torch.zeros(3)], ids) is False


class TestWhichRewriteIsRight:
    X = ((torch.randn(5, HIDDEN),), {})

    def compare(self, *right, needs_merge=True, kept=False, alone=True, known=None, fails=(), monkeypatch):
        """The verdict where these versions are right, and the versions that were asked for."""
        asked = []
        trial = EagerTrial(Experts(), needs_merge=needs_merge)
        trial._found, trial._ids_are_kept = ["found"], kept
        monkeypatch.setattr(module, "ids_alone", lambda gate: "another" if alone and gate == "found" else None)

        def problem(version, experts, inputs):
            asked.append(version)
            if version in fails:
                raise ValueError(version)
            return None if version in right else f"not {version}"

        trial._problem_with = problem
        trial._versions = dict.fromkeys(known if known is not None else (*VERSIONS, "original"))
        return trial._compare([], self.X), asked

    def test_the_first_that_is_right(self, monkeypatch):
        compare = functools.partial(self.compare, monkeypatch=monkeypatch)
        for needs_merge, first in ((True, True), (False, False)):
            names = ["merged", "plain"] if first else ["plain", "merged"]
            order = [*names, *(f"{name}, ids alone" for name in names)]
            for place, version in enumerate(order):
                verdict, asked = compare(version, needs_merge=needs_merge)
                alone = place > 1
                assert verdict == module.Verdict(version.startswith("merged"), ids_alone=alone)
                assert asked == order[: place + 1]
            verdict, asked = compare(needs_merge=needs_merge)
            assert verdict == module.Verdict(None, f"not {order[0]}", off=frozenset({True, False}))
            assert asked == order
            assert compare(needs_merge=needs_merge, alone=False)[1] == names

    def test_where_ids_are_kept(self, monkeypatch):
        compare = functools.partial(self.compare, kept=True, monkeypatch=monkeypatch)
        verdict, asked = compare("plain, ids kept")
        assert (verdict, asked) == (module.Verdict(False), ["merged, ids kept", "plain, ids kept"])
        verdict, _ = compare(known=["plain, ids kept"])
        assert verdict.off == {False}

    def test_a_run_that_fails_is_not_off(self, monkeypatch):
        """An expert named twice may not fit: that is a reason, and shows no other numbers."""
        verdict, _ = self.compare(alone=False, fails=("merged",), monkeypatch=monkeypatch)
        assert verdict.reason == "Plain could not be run on made-up choices: ValueError: merged"
        assert verdict.off == {False}
        assert self.compare("plain", fails=("merged",), monkeypatch=monkeypatch)[0] == module.Verdict(False)

    def test_how_a_version_differs(self):
        problems, asked = {}, []
        trial = trial_of(_other_calls=returning(["other"]), _problem_with_more=returning("more"))
        trial._versions, trial._refused = {"plain": None}, {"merged": "refused"}

        def in_draws(version, experts, given):
            asked.append(given)
            return problems.get("own" if given is self.X else given)

        trial._problem_in_draws = in_draws
        problem = functools.partial(trial._problem_with, experts=[], inputs=self.X)
        assert problem("merged") == "refused"
        assert problem("unknown") == "it cannot be rewritten"
        assert asked == []
        assert problem("plain") == "more"
        assert asked == [self.X, "other"]
        problems["other"] = "off"
        assert problem("plain") == f"off under another mask: {module._SENT_ELSEWHERE}"
        problems["own"] = "own"
        assert problem("plain") == "own"

    def test_draws_until_each_expert_was_re_routed(self):
        """Three at least; the others are chosen then, with even seeds."""
        maps, asked = [], []
        trial = trial_of(_problem_in_draw=lambda *given: asked.append(given[3:]), _expert_map=lambda: maps.pop(0))
        draws = functools.partial(trial._problem_in_draws, "plain", [], self.X)
        maps += [dict.fromkeys(range(1, 6), 0), {0: 1, 6: 6}, {}, {6: 0}, {7: 0}]
        assert draws() is None
        assert asked == [(0, ()), (1, ()), (2, ()), (6, [6, 7]), (8, [7])]
        maps += [{n: (n + 1) % EXPERTS for n in range(EXPERTS)}] * 3
        asked.clear()
        assert draws() is None
        assert asked == [(0, ()), (1, ()), (2, ())]
        asked.clear()
        maps += [{}] * 30
        assert draws() is None
        assert [seed for seed, _ in asked] == [0, 1, 2, *range(6, 48, 2)]
        trial._problem_in_draw = lambda *given: "off" if given[3] == 6 else None
        assert draws() == "off"

    @pytest.mark.parametrize(
        ("got", "wanted", "left", "told"),
        [
            (1.0, 1.0, ({}, {}), None),
            (1.00009, 1.0, ({}, {}), None),
            (1.0002, 1.0, ({}, {}), "is off by 0.0002 of its scale"),
            (None, 1.0, ({}, {}), "returns other things"),
            (1.0, 1.0, ({"": 1}, {"": 2}), "returns other things"),
            (1.0, 1.0, ({"log": 1, "last": 1}, {"log": 1, "last": 2}), "leaves other things in last, where"),
            (1.0, 1.0, ({"last": 1}, {}), "leaves other things in last, where"),
            (1.0, 1.0, ({}, {"last": 1}), "leaves other things in last, where"),
            (1.0, 1.0, ({"time": 1, "b": 1, "a": 1}, {"time": 2, "b": 2, "a": 2}), "leaves other things in a, where"),
            (1.0, 1.0, ({"time": 1}, {"time": 2}), None),
            (1.5, 1.0, ({"last": 1}, {"last": 2}), "is off by 0.5 of its scale"),
        ],
    )
    def test_what_a_draw_shows(self, got, wanted, left, told):
        """The version's run against that of the traced one where experts have others' parameters."""
        trial, ran = trial_of(_expert_map=returning({0: 1})), []
        trial._restless = {"time": True}
        [w] = TestWhoseParametersTheyAre.of(trial, "experts.w")
        kept = w.tensors[0].clone()

        def run(inputs, version, seed, *, chosen):
            trial.kept = left[len(ran)]
            ran.append((version, seed, chosen, torch.equal(w.tensors[0], kept)))
            assert torch.equal(w.tensors[0][0], kept[0 if version == "plain" else 1])
            found = got if version == "plain" else wanted
            return [] if found is None else [torch.tensor([found], dtype=torch.float64)]

        trial._run = run
        problem = trial._problem_in_draw("plain", [w], self.X, 4, [3])
        assert ran == [("plain", 4, [3], True), ("original", 4, [3], False)]
        assert (problem is None) is (told is None)
        assert told is None or f"run with the code that receives its ids, Plain {told}" in problem
        assert torch.equal(w.tensors[0], kept)

    @pytest.mark.parametrize(("sizes", "by_tokens"), [((5,), True), ((1, 5), False)])
    def test_many_tokens(self, sizes, by_tokens, monkeypatch):
        """Where the block takes them, and its graph serves them."""
        inside, ran = watched_compiling(monkeypatch), []
        trial = trial_of(_ids=[0], _run=lambda given: ran.append((given[0][0].shape, bool(inside))))
        trial._counting_dim = returning(0)
        asked = []
        trial._problem_in_draw = lambda *given: asked.append((given[0], given[3], bool(inside))) or "off"
        given = ((torch.randn(*sizes, HIDDEN),), {})
        more = functools.partial(trial._problem_with_more, "plain", [])
        assert more(given) == "off where there are 256 tokens"
        assert ran == [((256, *sizes[1:], HIDDEN), by_tokens)]
        assert asked == [("plain", 0, by_tokens)]
        trial._problem_in_draw = returning(None)
        assert more(given) is None
        trial._problem_in_draw = returning("off")
        trial._ids = []
        assert more(given) is None
        trial._ids, trial._run = [0], raising(ValueError())
        assert more(given) is None
        ran.clear()
        assert more(((torch.arange(5),), {})) is None
        assert ran == []


class TestGraphsOfATrial:
    """The graph with the gate, in each of its versions, on choices that are made up."""

    class Written:
        """A graph that ends behind the router: `more` gives what else leaves it, of `w, ids, weights`."""

        def __init__(self, more=lambda w, ids, weights: [], top_k=TOP_K, form="top_k"):
            plain, w = Plain(Experts()), Written()
            self.block = module.TrialBlock(plain, plain.gate.weight, plain, EXPERTS, EXPERTS)
            x, weight = w.given(5, HIDDEN), w.input(self.block.weight)
            self.logits = w.call(F.linear, x, weight)
            scores = w.call(torch.softmax, self.logits, -1)
            weights, ids = getattr(self, form)(w, scores, top_k)
            w.give(weights, ids, *more(w, ids, weights))
            self.graph = torch.fx.GraphModule(nn.Module(), w.graph)
            self.inputs = [node.meta["example_value"] for node in (x, weight)]
            [gate] = module._gates_of(dynamo.copy_graph(self.graph), self.inputs, self.block)
            self.trial = module._Trial(gate, self.block, None)
            self.run = self.trial._backend(self.graph, self.inputs)

        @staticmethod
        def top_k(w, scores, k):
            return w.top_k(scores, k)

        @staticmethod
        def max(w, scores, k):
            best = w.call(torch.max, scores, -1)
            return w.pick(best, 0), w.pick(best, 1)

        @staticmethod
        def sort(w, scores, k):
            best = w.call(torch.sort, scores, -1, descending=True)
            return tuple(w.pick(w.pick(best, place), (slice(None), slice(None, k))) for place in (0, 1))

        @staticmethod
        def steps(w, scores, k):
            """Each takes the best that is left."""
            rest, ids = scores, []
            for _ in range(k):
                ids.append(w.call(torch.argmax, rest, -1))
                taken = w.call("bool", w.call(F.one_hot, ids[-1], EXPERTS))
                rest = w.call("masked_fill", rest, taken, -math.inf)
            ids = w.call(torch.stack, ids, -1)
            return w.call(torch.gather, scores, -1, ids), ids

        def __call__(self, version, seed=4):
            """What leaves in a version."""
            self.trial._version, self.trial._seed = version, seed
            self.trial._ids.clear()
            self.trial._weights.clear()
            return self.run(*self.inputs)

    def test_versions(self):
        """Each is told what was chosen, and gives what re-routing makes of it."""
        one = self.Written()
        assert set(one.trial._versions) == {"original", "plain", "merged"}
        assert set(one.trial._refused) == set(VERSIONS) - {"plain", "merged"}
        assert all("all of it leaves in one way" in why for why in one.trial._refused.values())
        assert len(one.trial._found) == 1
        order = made_up_order((5,), EXPERTS, 4)[:, :TOP_K]
        weights, ids = one("original")
        assert torch.equal(ids, order)
        plain = one("plain")
        assert torch.equal(plain[1], torch.ops.sere.reroute(ids, one.trial._matrix, 1))
        assert torch.equal(plain[0], weights)
        merged = one("merged")
        new_ids, new_weights = torch.ops.sere.reroute_merged(ids, weights, one.trial._matrix, 1)
        assert torch.equal(merged[1], new_ids)
        torch.testing.assert_close(merged[0], new_weights)
        for version in ("original", "plain", "merged"):
            one(version)
            assert (len(one.trial._ids), len(one.trial._weights)) == (1, 1)
            assert torch.equal(one.trial._ids[0], order)
            assert torch.equal(one.trial._weights[0], weights)
        assert not torch.equal(one("original", 6)[1], order)

    def test_the_graph_itself_stays_as_it_is(self):
        one = self.Written()
        before = [node.format_node() for node in one.graph.graph.nodes]
        self.Written()
        assert [node.format_node() for node in one.graph.graph.nodes] == before
        assert not any(name.startswith("sere") for name, _ in one.graph.named_buffers())

    def test_what_is_made_of_ids_and_leaves_beside_them(self):
        """With ids alone it is of the router's own, else of new ones; a graph without a dispatch keeps none."""
        one = self.Written(lambda w, ids, weights: [w.call(torch.mul, ids, 2)])
        assert {"plain, ids alone", "merged, ids alone"} <= set(one.trial._versions)
        assert set(one.trial._refused) == {"plain, ids kept", "merged, ids kept"}
        _, own, doubled = one("original")
        _, ids, of_own = one("plain, ids alone")
        assert torch.equal(doubled, 2 * own)
        assert torch.equal(of_own, doubled)
        assert torch.equal(ids, torch.ops.sere.reroute(own, one.trial._matrix, 1))
        _, ids, of_new = one("plain")
        assert torch.equal(of_new, 2 * ids)

    @pytest.mark.parametrize("form", ["sort", "steps", "top_k"])
    def test_ways_to_select(self, form):
        """Each gives the choice that is made up, and what re-routing makes of it."""
        one = self.Written(form=form)
        assert set(one.trial._versions) >= {"original", "plain", "merged"}
        assert one.trial._found[0].form == {"top_k": "top-k"}.get(form, form)
        for seed in (3, 4):
            order = made_up_order((5,), EXPERTS, seed)[:, :TOP_K]
            weights, ids = one("original", seed)
            assert torch.equal(ids, order)
            assert (weights.diff(dim=-1) < 0).all()
            assert torch.equal(one("plain", seed)[1], torch.ops.sere.reroute(order, one.trial._matrix, 1))
            assert torch.equal(one.trial._ids[0], order)

    def test_weights_that_are_not_known(self):
        """Nothing is told of them."""
        one = self.Written()
        one.graph.graph.output_node().args = ((list(one.graph.graph.nodes)[-2],),)
        one.graph.graph.eliminate_dead_code()
        one.trial._found.clear()
        one.run = one.trial._backend(one.graph, one.inputs)
        assert one.trial._found[0].weights is None
        assert torch.equal(one("plain")[0], torch.ops.sere.reroute(one.trial._ids[0], one.trial._matrix, 1))
        assert one.trial._weights == []

    def test_one_choice_without_its_dimension(self):
        one = self.Written(form="max")
        _, ids = one("original", 1)
        assert torch.equal(ids, made_up_order((5,), EXPERTS, 1)[:, 0])

    def test_scores_are_put_in_behind_the_router(self):
        """Where they are asked for: what is read of them besides the choice shows it."""
        one = self.Written(lambda w, ids, weights: [w.call(torch.gather, list(w.graph.nodes)[3], 1, ids)])
        own = one("original")[2]
        one.trial.scores = "equal"
        torch.testing.assert_close(one("original")[2], torch.full((5, TOP_K), 1 / EXPERTS))
        assert not torch.allclose(own, torch.full((5, TOP_K), 1 / EXPERTS))

    def test_a_graph_without_the_router(self):
        """Runs as it is, also where it has another gate."""
        one = self.Written()
        inputs = [one.inputs[0], nn.Parameter(torch.randn(EXPERTS, HIDDEN))]
        one.trial._found.clear()
        run = one.trial._backend(one.graph, inputs)
        assert one.trial._found == []
        weights, ids = run(*inputs)
        want = F.linear(*inputs).softmax(-1).topk(TOP_K)
        assert torch.equal(ids, want.indices)
        torch.testing.assert_close(weights, want.values)


class Dense(Experts):
    """All experts compute every token, and a table picks; a buffer counts the calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x, ids, weights):
        self.calls += 1
        outputs = torch.stack([torch.tanh(x @ w) for w in self.w], 1)
        x.zero_()
        return torch.einsum("te,teh->th", x.new_zeros(len(x), EXPERTS).scatter(1, ids, weights), outputs)


class TestArgumentsOfATrial:
    X = torch.randn(5, HIDDEN)

    def test_hidden_states_are_all_the_tensors_there_are(self):
        """Floats, of two tokens or more."""
        x = self.X
        for hidden in (x, x[None], torch.zeros(3, 2, 4), torch.zeros(2, 1)):
            assert module._hidden_of(((hidden, "word", 2.5), {"flag": None})) is hidden
            assert module._hidden_of(((), {"x": [hidden]})) is hidden
        for hidden in (x[0], x[:1], x[:, None], x[None, None], x.long(), x > 0, "word"):
            assert module._hidden_of(((hidden,), {})) is None
        assert module._hidden_of(((x, torch.ones(5)), {})) is None
        assert module._hidden_of(((), {})) is None

    def test_more_rows(self):
        """The same each time; what else is given stays."""
        for dim, sizes in ((0, (7, 5, HIDDEN)), (1, (3, 7, HIDDEN))):
            x, word = torch.ones(3, 5, HIDDEN).double(), "word"
            (made, same), kwargs = module._with_rows(((x, word), {"flag": 1}), dim, 7)
            assert (made.shape, made.dtype, same, kwargs) == (sizes, torch.float64, word, {"flag": 1})
            assert torch.equal(made, module._with_rows(((x, word), {}), dim, 7)[0][0])
            assert made.std() > 0.5
            assert (x == 1).all()

    def test_rows_of_an_output(self):
        for sizes in ((6, 4), (2, 3, 4), (6, 1), (1, 6, 4), (6, 2, 2), (1, 2, 3, 1)):
            assert module._counts_rows(torch.Size(sizes), 6)
        for sizes in ((6,), (4, 6), (2, 2, 3), (5, 4), ()):
            assert not module._counts_rows(torch.Size(sizes), 6)

    def test_finite_numbers(self):
        assert module._is_finite(torch.arange(3))
        assert module._is_finite(torch.ones(2))
        assert not module._is_finite(torch.tensor([1.0, float("-inf")]))
        assert module._is_finite(torch.zeros(0))

    def test_every_expert_that_computes_every_token(self):
        """Nothing is left of the run in which that is seen."""
        for experts, every in ((Dense(), True), (Experts(), False)):
            trial = EagerTrial(experts)
            inputs = ((self.X.clone(),), {})
            trial._run(inputs)
            [w] = TestWhoseParametersTheyAre.of(trial, "experts.w")
            before = {name: value.clone() for name, value in trial._block.module.state_dict().items()}
            assert trial._computes_all([w], inputs) is every
            assert torch.equal(inputs[0][0], self.X)
            assert all(torch.equal(value, before[name]) for name, value in trial._block.module.state_dict().items())

    def test_weights_of_every_order(self):
        """In one draw of three, so that what is left out for weighing little shows."""
        choose, like = TestCallsInGraphs().choose, (torch.zeros(400, 6), torch.zeros(400, 6, dtype=torch.int64))
        for seed in range(6):
            values = choose(leading=(400,), seed=seed)(like).values
            assert (values.diff(dim=-1) <= 0).all()
            low, high = (1e-4, 1.0) if seed % 3 == 2 else (0.1, 1.1)
            assert low <= values.min() <= low * 1.5
            assert high * 0.9 <= values.max() <= high

    @pytest.mark.parametrize(("top_k", "places"), [(1, 1), (2, 1), (3, 2), (4, 3)])
    def test_experts_that_are_chosen_leave_a_token_its_first_choice(self, top_k, places):
        """But where it has only one."""
        w, like = Written(), torch.zeros(4, top_k, dtype=torch.int64)
        gate = types.SimpleNamespace(form="top-k", ids=w.input(like), top_k=top_k)
        choose = module._Choose(TestCallsInGraphs.trial(chosen=[5, 3]), w.given(4, 6), gate)
        order = made_up_order((4,), 6, 1, chosen=[5, 3], places=places)
        assert torch.equal(choose(like), order[:, :top_k])

    def test_places_behind_the_first_choice(self):
        order = made_up_order((4,), 6, 1, chosen=[5, 3], places=2)
        assert [sorted(row) for row in order[:, :2].tolist()] == [[3, 5]] * 4
        assert order[:, 2:].unique().tolist() == [0, 1, 2, 4]
        order = made_up_order((2, 2), 6, 1, last=5, chosen=[5, 3, 4], places=1)
        assert order[..., -1].flatten().tolist()[0] == 5
        assert order[..., 0].flatten().tolist()[1:3] == [3, 4]


class TestGatesOfARouter:
    def graph(self, *, attribute=False, columns=EXPERTS):
        """A graph with the block's router, and a gate of another whose experts it holds itself."""
        plain, w = Plain(Experts()), Written()
        block = module.TrialBlock(plain, plain.gate.weight, plain, EXPERTS, EXPERTS)
        x = w.given(5, HIDDEN)
        if attribute:
            weight = w.graph.get_attr("router")
            weight.meta["example_value"] = block.weight
        else:
            weight = w.input(block.weight)
        other, experts = w.weight(EXPERTS, HIDDEN), w.weight(EXPERTS, HIDDEN, HIDDEN)
        found = []
        for router in (other, weight):
            scores = w.call(torch.softmax, w.call(F.linear, x, router), -1)
            found.append(w.top_k(scores, TOP_K))
        weights, ids = found[0]
        rows = w.call(torch.reshape, x, (5, 1, 1, HIDDEN))
        made = w.call(torch.squeeze, w.call(torch.matmul, rows, w.pick(experts, ids)), 2)
        summed = w.call(torch.sum, w.mul(made, w.column(weights)), 1)
        w.give(summed, *found[1])
        root = nn.Module()
        root.router = block.weight
        inputs = [node.meta["example_value"] for node in w.graph.find_nodes(op="placeholder")]
        return torch.fx.GraphModule(root, w.graph), inputs, block, found[1][1]

    @pytest.mark.parametrize("attribute", [False, True])
    def test_those_of_others_are_left_alone(self, attribute):
        graph, inputs, block, ids = self.graph(attribute=attribute)
        both = find_gates(dynamo.copy_graph(graph), lambda node, columns: EXPERTS).gates
        assert len(both) == 2
        [gate] = module._gates_of(dynamo.copy_graph(graph), inputs, block)
        assert (gate.ids.name, gate.num_experts) == (ids.name, EXPERTS)

    def test_experts_may_be_fewer_than_columns(self):
        """As where the last column is no expert's."""
        graph, inputs, block, _ = self.graph()
        for experts, found in ((EXPERTS - 1, EXPERTS - 1), (EXPERTS + 1, EXPERTS)):
            block.num_experts = experts
            [gate] = module._gates_of(dynamo.copy_graph(graph), inputs, block)
            assert gate.num_experts == found
