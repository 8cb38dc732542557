"""What a layer keeps or returns of its dispatch is made of the ids that the router chose."""

import warnings

import pytest
import torch
from torch import nn

import sere_compile
from sere_compile import SimilarityProfile
from sere_compile.compiler import dynamo
from sere_compile.passes import Proof, find_gates, find_separate_gates, separate_kept, verify_rewrite
from sere_compile.passes.graph import nodes
from sere_compile.testing import reroute_oracle

from ..thinned import thinned
from .moe_modules import from_dynamo

EXPERTS, HIDDEN, TOP_K, TOKENS = 6, 8, 3, 7


class Keeps(nn.Module):
    """A dispatch that stays in attributes of the layer: an order, rows, weights, and sizes as numbers."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN))

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        self.order = ids.flatten().sort(0)[1]
        self.rows = self.order.div(TOP_K, rounding_mode="trunc")
        self.weights = weights.flatten()[self.order]
        self.sizes = torch.zeros(len(x), EXPERTS).scatter(1, ids, 1.0).long().sum(0).tolist()
        return self.experts(x)

    def experts(self, x):
        parts = x[self.rows].split(self.sizes)
        made = torch.cat([torch.tanh(part @ self.w[number]) for number, part in enumerate(parts)])
        return torch.zeros_like(x).index_add(0, self.rows, made * self.weights[:, None])

    @property
    def load(self):
        """What a later reader makes of it."""
        return torch.tensor(self.sizes, dtype=torch.float32)


class Nonzero(Keeps):
    """Slots that weigh nothing are left out: how many there are is known in a call alone."""

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        table = torch.zeros(len(x), EXPERTS).scatter(1, ids, weights)
        places = weights.flatten().nonzero().squeeze(-1)
        self.order = places[ids.flatten()[places].sort(0)[1]]
        self.rows = self.order.div(TOP_K, rounding_mode="trunc")
        self.weights = weights.flatten()[self.order]
        self.sizes = (table > 0).long().sum(0).tolist()
        return self.experts(x)


class Returns(Keeps):
    """The same, returned."""

    def forward(self, x):
        y = super().forward(x)
        return y, self.order, self.rows, self.sizes


class KeepsWhatExpertsGive(Keeps):
    """Rows behind the experts are in the order of the dispatch, and cost what experts cost."""

    def experts(self, x):
        parts = x[self.rows].split(self.sizes)
        self.made = torch.cat([torch.tanh(part @ self.w[number]) for number, part in enumerate(parts)])
        return torch.zeros_like(x).index_add(0, self.rows, self.made * self.weights[:, None])


class Random(Keeps):
    """A number that is drawn is another in a second draw."""

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        table = torch.zeros(len(x), EXPERTS).scatter(1, ids, weights)
        self.table = torch.nn.functional.dropout(table, 0.5, training=True)
        return torch.einsum("te,eij,ti->tj", self.table, self.w, x)


class InPlace(Keeps):
    """A table that is written in place."""

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        self.table = torch.zeros(len(x), EXPERTS)
        self.table.scatter_(1, ids, weights)
        return torch.einsum("te,eij,ti->tj", self.table, self.w, x)


def rows(seed=0):
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def made(kind):
    torch.manual_seed(1)
    return kind().eval().requires_grad_(False)


def graph_of(kind):
    with dynamo.dynamic_shape_capture():
        return from_dynamo(made(kind), rows())


def separated(graph):
    copies = separate_kept(graph.graph, find_gates(graph).gates)
    graph.graph.lint()
    graph.recompile()
    return copies


@pytest.mark.parametrize("kind", [Keeps, Nonzero, Returns])
def test_what_is_kept_is_read_from_a_copy(kind):
    graph = graph_of(kind)
    given = graph.captured_inputs
    before, output = graph(*given), graph.graph.output_node()
    copies = separated(graph)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(graph(*given), before, strict=True))
    assert {"sort", "scatter"} <= {nodes.kind(node) for node in copies}
    assert not {"matmul", "cat", "index_add", "split"} & {nodes.kind(node) for node in copies}
    assert {user for node in copies for user in node.users} <= {*copies, output} | {
        node for node in graph.graph.nodes if nodes.raw_name(node) == "item" or nodes.kind(node) in ("select", "slice")
    }
    [gate] = find_gates(graph).gates
    assert isinstance(verify_rewrite(gate, value_of(graph, given)), Proof)
    assert separated(graph) == []


def value_of(graph, given):
    held = dict(zip(graph.graph.find_nodes(op="placeholder"), given, strict=True))
    return held.get


@pytest.mark.parametrize("kind", [Keeps, Nonzero])
def test_without_copies_no_rewrite_is_right(kind):
    graph = graph_of(kind)
    [gate] = find_gates(graph).gates
    assert not isinstance(verify_rewrite(gate, value_of(graph, graph.captured_inputs)), Proof)


def test_sizes_of_copies_are_symbols_of_their_own():
    graph = graph_of(Nonzero)
    symbols = [set(node.meta["unbacked_bindings"]) for node in graph.graph.nodes if "unbacked_bindings" in node.meta]
    separated(graph)
    found = [set(node.meta["unbacked_bindings"]) for node in graph.graph.nodes if "unbacked_bindings" in node.meta]
    assert len(found) > len(symbols)
    assert sum(map(len, found)) == len(set().union(*found))


@pytest.mark.parametrize("kind", [Random, InPlace])
def test_what_cannot_be_made_twice_stays(kind):
    graph = graph_of(kind)
    text = str(graph.graph)
    assert find_gates(graph).gates
    assert separated(graph) == []
    assert str(graph.graph) == text


def test_a_dispatch_that_nobody_keeps_is_not_copied():
    class Plain(Keeps):
        def forward(self, x):
            weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
            table = torch.zeros(len(x), EXPERTS).scatter(1, ids, weights)
            return torch.einsum("te,eij,ti->tj", table, self.w, x)

    graph = graph_of(Plain)
    text = str(graph.graph)
    assert len(find_separate_gates(graph, lambda *_: 0).gates) == 1
    assert str(graph.graph) == text


# --- programs that read what is kept ----------------------------------------------------------------------------------


class NextCall(Keeps):
    """What one call has kept scales what the next one gives."""

    def __init__(self):
        super().__init__()
        self.before = torch.ones(TOKENS * TOP_K)

    def forward(self, x):
        scale = self.before.sum()
        y = super().forward(x)
        self.before = self.order.float() * self.weights
        return y * scale


class Sibling(nn.Module):
    """Another module reads the attributes of the layer."""

    def __init__(self):
        super().__init__()
        self.layer = Keeps()
        self.held = [self.layer]  # not a child

    def forward(self, x):
        return self.layer(x) + self.read()

    def read(self):
        layer = self.held[0]
        return (layer.order * layer.weights).sum()


class ByProperty(Sibling):
    """The same, through a property and `getattr`."""

    def read(self):
        return (self.held[0].load * torch.arange(EXPERTS)).sum() + getattr(self.held[0], "or" + "der")[0]


class InClosure(nn.Module):
    """What is kept is in a list that a function closes over, which Dynamo does not trace."""

    def __init__(self):
        super().__init__()
        self.layer = Keeps()
        seen = []

        def keep(value):
            seen.clear()
            seen.append(value)

        self.keep, self.read = keep, lambda: seen[0]

    def forward(self, x):
        y = self.layer(x)
        self.keep(self.layer.order)
        return y + self.read().float()[:1]


class Hooked(nn.Module):
    """A hook reads the attributes."""

    def __init__(self):
        super().__init__()
        self.layer = Keeps()
        self.layer.register_forward_hook(lambda module, _, result: result + module.order.float()[0])

    def forward(self, x):
        return self.layer(x)


class Loss(nn.Module):
    """The parent makes a loss of what its layer has kept, when it is asked."""

    def __init__(self):
        super().__init__()
        self.layer = Keeps()

    def forward(self, x):
        return self.layer(x)

    def loss(self):
        return self.layer.load.var() + (self.layer.order * self.layer.weights).mean()


READERS = [Keeps, Nonzero, Returns, NextCall, Sibling, ByProperty, Hooked, Loss]


def similarity():
    half = torch.rand(EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(2))
    return ((half + half.T) / 2).fill_diagonal_(1.0)


def layer_of(model):
    return model if isinstance(model, Keeps) else model.layer


def everything(model, x):
    """What a call gives, and what is found in the layer afterwards."""
    layer = layer_of(model)
    given = model(x)
    given = given if isinstance(given, tuple) else (given,)
    found = [*given, layer.order, layer.rows, layer.weights, layer.sizes, layer.load]
    return [torch.as_tensor(value).clone() for value in [*found, *([model.loss()] if isinstance(model, Loss) else [])]]


def exchanged(model, x, matrix):
    """The same of the program as it is written, where expert u has the parameters of expert m(u)."""
    layer = layer_of(model)
    ids = layer.gate(x).softmax(-1).topk(TOP_K)[1]
    new = reroute_oracle(ids, matrix, 1, 0.0, TOP_K)
    assert not torch.equal(new, ids)
    own = layer.w.clone()
    for old, other in zip(ids.flatten().tolist(), new.flatten().tolist(), strict=True):
        layer.w[old] = own[other]
    found = everything(model, x)
    layer.w.copy_(own)
    return found


def compared(kind, inner="eager", calls=3, **options):
    model = made(kind)
    name = next(name for name, weight in model.named_parameters() if weight is layer_of(model).gate.weight)
    matrix = similarity()
    sere_compile.attach(model, SimilarityProfile({name: matrix}))
    wanted_of, plain_of = made(kind), made(kind)
    torch._dynamo.reset()
    compiled = sere_compile.compile(model, select_top_k=1, inner=inner, **options)
    changes = 0
    with torch.no_grad():
        for seed in range(calls):
            x = rows(seed)
            wanted = exchanged(wanted_of, x, matrix)
            plain = everything(plain_of, x)
            got = everything_of(compiled, model, x)
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted, strict=True)), seed
            changes += not torch.allclose(wanted[0], plain[0], atol=1e-3)
    torch._dynamo.reset()
    assert changes == calls


def everything_of(compiled, model, x):
    layer, given = layer_of(model), compiled(x)
    given = given if isinstance(given, tuple) else (given,)
    found = [*given, layer.order, layer.rows, layer.weights, layer.sizes, layer.load]
    return [torch.as_tensor(value).clone() for value in [*found, *([model.loss()] if isinstance(model, Loss) else [])]]


@pytest.mark.parametrize("kind", READERS)
def test_whoever_reads_it_finds_what_the_router_chose(kind):
    compared(kind, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Keeps, Nonzero, Returns])
def test_inductor_tells_both_apart(kind):
    """Its counts and sizes are numbers of each call, of the original ids and of the others."""
    compared(kind, inner="inductor", strict=True)


@pytest.mark.parametrize("kind", thinned([Keeps, NextCall, Sibling, ByProperty, Hooked, Loss], (0, 4, 5)))
def test_across_a_break_one_attribute_serves_both_and_nothing_is_re_routed(kind, monkeypatch):
    """The experts read the attributes outside the graph of the router, where those can hold one choice only."""
    own = Keeps.experts

    def behind_a_break(self, x):
        torch._dynamo.graph_break()
        return own(self, x)

    monkeypatch.setattr(Keeps, "experts", behind_a_break)
    unchanged(kind)


TOLD = []


def tell(order):
    TOLD.append(order.clone())


class Tells(Keeps):
    """Code behind a break, which is run to try it, calls a helper that keeps a list, and warns."""

    def experts(self, x):
        torch._dynamo.graph_break()
        tell(self.order)
        warnings.warn("a default is taken", stacklevel=1)
        return super().experts(x)


def test_a_trial_of_the_code_outside_says_nothing():
    TOLD.clear()
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        unchanged(Tells)
    assert len(TOLD) == 4  # two calls, and two of the model that is compared
    assert sum(str(one.message) == "a default is taken" for one in given) == 4


def test_what_a_closure_keeps_is_refused():
    unchanged(InClosure)


def unchanged(kind):
    """Two calls give and keep what they always did, bit for bit."""
    model = made(kind)
    name = next(name for name, weight in model.named_parameters() if weight is layer_of(model).gate.weight)
    sere_compile.attach(model, SimilarityProfile({name: similarity()}))
    plain = made(kind)
    torch._dynamo.reset()
    compiled = sere_compile.compile(model, select_top_k=1, inner="eager")
    with torch.no_grad():
        for seed in range(2):
            got, wanted = everything_of(compiled, model, rows(seed)), everything(plain, rows(seed))
            assert all(map(torch.equal, got, wanted))
    torch._dynamo.reset()


def test_what_experts_give_in_the_order_of_the_dispatch_is_refused():
    """No order but the router's own may be found there, and experts do not run twice."""
    model = made(KeepsWhatExpertsGive)
    sere_compile.attach(model, SimilarityProfile({"gate.weight": similarity()}))
    wanted = model(rows()), model.made
    torch._dynamo.reset()
    with torch.no_grad():
        got = sere_compile.compile(model, select_top_k=1, inner="eager")(rows()), model.made
    torch._dynamo.reset()
    assert all(map(torch.equal, got, wanted))


class Maps(Keeps):
    """Experts of two matrices around attention: what is kept sends the tokens to the second one."""

    def __init__(self, breaks):
        super().__init__()
        self.out = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN))
        self.breaks = breaks

    def forward(self, x):
        y = super().forward(x)
        if self.breaks:
            torch._dynamo.graph_break()
        parts = y[self.rows].split(self.sizes)
        made = torch.cat([torch.tanh(part @ self.out[number]) for number, part in enumerate(parts)])
        return torch.zeros_like(x).index_add(0, self.rows, made * self.weights[:, None])


@pytest.mark.parametrize("breaks", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_second_matrix_of_each_expert_that_goes_by_what_is_kept(breaks):
    """New ids for the one and the router's own for the other would be half of an expert."""
    unchanged(lambda: Maps(breaks))


class BiasBehind(Keeps):
    """A vector of each expert is added behind a break, by the ids that the layer keeps."""

    def __init__(self, adds=True):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.adds = adds

    def forward(self, x):
        weights, self.ids = self.gate(x).softmax(-1).topk(TOP_K)
        self.order, self.rows = self.ids.flatten().sort(stable=True)[1], self.ids
        self.weights, self.sizes = weights, [1] * EXPERTS
        y = torch.einsum("tkij,ti,tk->tj", self.w[self.ids], x, weights)
        torch._dynamo.graph_break()
        behind = self.bias[self.ids] * self.weights[..., None] if self.adds else self.ids[..., None].expand(-1, -1, 8)
        return y + behind.sum(1)


@pytest.mark.slow
def test_a_vector_of_each_expert_behind_a_break():
    """The graph holds a whole dispatch, and is re-routed where the rest makes nothing of experts by the ids."""
    unchanged(BiasBehind)
    compared(lambda: BiasBehind(adds=False), strict=True)


class AroundIt(nn.Module):
    """A block whose layer is a whole dispatch, and that adds vectors of its own experts behind a break."""

    def __init__(self, adds=True):
        super().__init__()
        self.layer = BiasBehind(adds=False)
        del self.layer.bias
        self.offsets = nn.Embedding(EXPERTS, HIDDEN)
        self.adds = adds

    def forward(self, x):
        y = self.layer(x)
        torch._dynamo.graph_break()
        return y + self.offsets(self.layer.ids if self.adds else self.layer.ids * 0).sum(1)


@pytest.mark.slow
def test_a_vector_of_each_expert_that_a_block_around_the_layer_adds():
    """What is around a layer that is right is tried as well, where it has numbers of each expert."""
    unchanged(AroundIt)
    compared(lambda: AroundIt(adds=False), strict=True)


@pytest.mark.slow
def test_each_block_is_asked_what_it_adds():
    """Dynamo would serve the second by the graph of the first: what tells them apart is read behind the break."""
    torch.manual_seed(1)
    model = nn.Sequential(AroundIt(adds=False), AroundIt()).requires_grad_(False)
    names = [f"{place}.layer.gate.weight" for place in (0, 1)]
    sere_compile.attach(model, SimilarityProfile(dict.fromkeys(names, similarity())))
    torch._dynamo.reset()
    report = sere_compile.explain(model, rows(), config=sere_compile.SereConfig(select_top_k=1))
    assert [row.status for row in report] == ["rewritten", "skipped"]


class Twice(Keeps):
    """Behind a break the same experts run again, by what is kept."""

    def forward(self, x):
        y = super().forward(x)
        torch._dynamo.graph_break()
        return self.experts(y)


def test_a_second_run_of_the_same_experts_by_what_is_kept():
    unchanged(Twice)
