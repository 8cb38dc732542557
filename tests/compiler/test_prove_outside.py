"""Ids that leave their graph are re-routed only where running the code that receives them proves it right."""

import contextlib
import copy
import functools
import itertools
import types

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
from sere_compile.passes import SkipReason, find_gates

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
    [
        ("an attribute", "leaves other things in last"),
        ("a list", "leaves other things in log"),
        ("a global", "leaves other things in SEEN"),
        ("a module that is no part of it", "leaves other things in owner.log"),
        ("a buffer of a module that is no part of it", "leaves other things in owner.buffers"),
        ("by numbers that go on", "leaves other things in log"),
        ("numbers", "returns other things"),
        ("an array", "returns other things"),
    ],
)
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
