"""`find_routing_weights`: the weights in the form in which the dispatch consumes them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.passes import Evidence, Skip, SkipReason, Use, UseKind, find_gates
from sere_compile.passes.evidence.routing_weights import find_routing_weights, outer_consumers, weigh_a_product
from sere_compile.passes.graph import nodes

from ..graph.written import Written
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


TOKENS, HIDDEN, TOP_K = 4, 6, 3


class Layer(Written):
    """A router, written by hand; `dispatched` reads its ids as experts do, `looked_up` looks numbers up by them."""

    def __init__(self):
        super().__init__()
        self.x = self.given(TOKENS, HIDDEN)
        self.projection = self.call(F.linear, self.x, self.weight(EXPERTS, HIDDEN))
        self.scores = self.call(torch.softmax, self.projection, -1)
        self.values, self.ids = self.top_k(self.scores, TOP_K)
        self.uses = []

    def use(self, kind, target, *args):
        node = self.call(target, *args)
        self.uses.append(Use(node, self.ids, kind))
        return node

    def table(self, kind=UseKind.UNKNOWN):
        """A mask [T, E] of the chosen experts."""
        return self.use(kind, torch.scatter, self.call(torch.zeros_like, self.scores), 1, self.ids, 1.0)

    def consumed(self, weights):
        """The weights times outputs [T, K, 2]."""
        return self.call(torch.mul, self.column(weights), self.given(TOKENS, TOP_K, 2))

    def found(self):
        values = [self.values] if self.values.users else []
        return find_routing_weights(self.ids, values, self.uses, self.projection)


# How weights are made of the selected scores: the node that `found` should name.
FORMS = {
    "as selected": lambda w: w.values,
    "scaled": lambda w: w.mul(w.values, 2.5),
    "scaled by token": lambda w: w.mul(w.values, w.given(TOKENS, 1)),
    "normalised": lambda w: w.call(torch.div, w.values, w.call(torch.sum, w.values, -1, True)),
    "normalised by the largest": lambda w: w.call(torch.div, w.values, w.call(torch.amax, w.values, -1, True)),
    "with an epsilon": lambda w: w.call(
        torch.div, w.values, w.call(torch.add, w.call(torch.sum, w.values, -1, True), 1e-9)
    ),
    "bent": lambda w: w.call(torch.exp, w.call(torch.log, w.values)),
    "cast": lambda w: w.call("float", w.call("double", w.values)),
    "more columns, cut": lambda w: w.pick(
        w.call(torch.softmax, w.call(torch.cat, [w.values, w.given(TOKENS, 1)], -1), -1),
        (slice(None), slice(0, TOP_K)),
    ),
    "more columns by number": lambda w: w.pick(
        w.call(torch.exp, w.call(torch.cat, [w.values, w.given(TOKENS, 1)], 1)), (slice(None), slice(0, TOP_K))
    ),
    "norm of a decomposition": lambda w: w.pick(
        w.call(torch.ops.aten.native_layer_norm.default, w.values, [TOP_K], None, None, 1e-5), 0
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    w = Layer()
    weights = FORMS[name](w)
    w.consumed(weights)
    assert w.found() is weights


def test_looked_up_scores_are_weights():
    w = Layer()
    weights = w.use(UseKind.LOOK_UP, torch.gather, w.scores, 1, w.ids)
    w.consumed(weights)
    assert w.found() is weights
    # A count is looked up as well, and weighs nothing.
    w.call(torch.eq, w.use(UseKind.LOOK_UP, torch.gather, w.call("long", w.scores), 1, w.ids), 1)
    assert w.found() is weights


@pytest.mark.parametrize(
    "write",
    [
        lambda w: None,
        lambda w: w.mul(w.values, 2),
        lambda w: w.consumed(w.given(TOKENS, TOP_K)),
        lambda w: w.call(torch.zeros_like, w.values),
    ],
    ids=["unread", "unread product", "others", "sizes alone"],
)  # fmt: skip
def test_no_weights_are_consumed(write):
    w = Layer()
    write(w)
    skip = w.found()
    assert isinstance(skip, Skip), skip
    assert (skip.reason, skip.node, skip.evidence) == (SkipReason.NO_WEIGHTS, w.ids, Evidence.DISPATCH)


@pytest.mark.parametrize("start", [0, 1])
def test_more_scores_than_ids(start):
    """One more is selected, and cut off again: the first columns are the slots'."""
    w = Layer()
    w.values, ids = w.top_k(w.scores, TOP_K + 1)
    w.ids = w.pick(ids, (slice(None), slice(0, TOP_K)))
    weights = w.pick(w.call(torch.softmax, w.values, -1), (slice(None), slice(start, start + TOP_K)))
    w.consumed(weights)
    found = w.found()
    assert found is weights if start == 0 else found.reason is SkipReason.NO_WEIGHTS


def test_further_rows_are_no_columns():
    w = Layer()
    w.call(torch.sum, w.call(torch.cat, [w.values, w.given(TOKENS, TOP_K)]))
    assert w.found() is w.values


@pytest.mark.parametrize("parts", [lambda w: [w.given(TOKENS, 1), w.values], lambda w: [w.values, w.values]])
def test_columns_in_front_or_of_the_same_are_no_further_ones(parts):
    w = Layer()
    w.consumed(w.pick(w.call(torch.cat, parts(w), 1), (slice(None), slice(0, TOP_K))))
    assert w.found() is w.values


def test_columns_that_moved_are_no_form_of_them():
    w = Layer()
    joined = w.call(torch.cat, [w.given(TOKENS, 1), w.values], -1)
    w.consumed(w.pick(joined, (slice(None), slice(0, TOP_K))))
    w.consumed(w.pick(joined, (slice(None), slice(1, TOP_K + 1))))
    assert w.found() is w.values


def test_two_forms_are_consumed():
    w = Layer()
    w.consumed(w.values)
    w.consumed(w.mul(w.values, 2))
    skip = w.found()
    assert (skip.reason, skip.node, skip.evidence) == (SkipReason.AMBIGUOUS_WEIGHTS, w.ids, Evidence.DISPATCH)
    assert skip.detail == ", ".join(sorted([w.values.name, "mul_1"]))


class TestConsumers:
    def test_those_behind_the_last_form(self):
        w = Layer()
        normalised = w.call(torch.div, w.values, w.call(torch.sum, w.values, -1, True))
        last = w.mul(normalised, 2)
        consumer = w.column(last)
        w.call(torch.zeros_like, last)
        assert outer_consumers(last, w.ids) == [consumer]
        assert outer_consumers(normalised, w.ids) == []

    def test_a_sum_that_scales_nothing_consumes(self):
        w = Layer()
        total = w.call(torch.sum, w.values, -1, True)
        w.mul(total, w.given(TOKENS, HIDDEN))
        assert outer_consumers(w.values, w.ids) == [total]

    def test_what_is_stacked_has_no_further_columns(self):
        w = Layer()
        both = w.call(torch.stack, [w.values, w.given(TOKENS, TOP_K)], -1)
        w.pick(w.call(torch.exp, both), (Ellipsis, 0))
        assert outer_consumers(w.values, w.ids) == [both]

    def test_ids_of_unknown_size_have_no_form(self):
        w = Layer()
        scaled = w.mul(w.values, 2)
        assert outer_consumers(w.values, w.graph.placeholder("unknown")) in ([scaled], [])

    def test_whole_numbers_consume(self):
        w = Layer()
        chosen = w.call(torch.gt, w.values, 0.5)
        assert outer_consumers(w.values, w.ids) == [chosen]


# What follows the weights, and the refusal.
BEHIND = {
    "selected again": (lambda w, v: w.call(torch.topk, v, 1), SkipReason.RESELECTED, "topk"),
    "bent in a table": (lambda w, v: w.call(torch.softmax, scattered(w, v), -1), SkipReason.BENT_WEIGHTS, "softmax"),
    "bent behind a view": (
        lambda w, v: w.call(torch.sigmoid, w.call(torch.t, w.call("view", scattered(w, v), TOKENS, EXPERTS))),
        SkipReason.BENT_WEIGHTS,
        "sigmoid",
    ),
    "bent where joined": (
        lambda w, v: w.call(torch.tanh, w.call(torch.cat, [w.call("view", v, -1), w.given(3)])),
        SkipReason.BENT_WEIGHTS,
        "tanh",
    ),
    "a part bent": (
        lambda w, v: w.call(torch.exp, w.pick(w.column(v), slice(0, 2))),
        SkipReason.BENT_WEIGHTS,
        "exp",
    ),
    "scaled inputs": (
        lambda w, v: w.call(
            torch.matmul, w.mul(w.pick(w.column(v), (slice(None), 0)), w.x), w.weight(HIDDEN, 2)
        ),
        SkipReason.SCALED_INPUT,
        "mul",
    ),
    "scaled rows of inputs": (
        lambda w, v: w.call(
            F.linear,
            w.call("clone", w.mul(w.column(v), w.call("repeat", w.call("unsqueeze", w.x, 1), 1, 3, 1))),
            w.weight(2, HIDDEN),
        ),
        SkipReason.SCALED_INPUT,
        "mul",
    ),
}  # fmt: skip


def scattered(w, values):
    return w.call(torch.scatter, w.call(torch.zeros_like, w.scores), 1, w.ids, values)


@pytest.mark.parametrize("name", BEHIND)
def test_what_follows_the_weights(name):
    write, reason, kind = BEHIND[name]
    w = Layer()
    write(w, w.values)
    skip = w.found()
    assert isinstance(skip, Skip), skip
    assert (skip.reason, skip.evidence, nodes.kind(skip.node)) == (reason, Evidence.DISPATCH, kind)
    assert skip.detail == skip.node.name


@pytest.mark.parametrize(
    "write",
    [
        lambda w, v: w.call(torch.softmax, w.call("float", w.call(torch.gt, scattered(w, v), 0)), -1),
        lambda w, v: w.call(torch.tanh, w.consumed(v)),
        lambda w, v: w.mul(w.column(v), w.call("unsqueeze", w.x, 1)),
        lambda w, v: w.call(torch.matmul, w.mul(w.column(v), w.given(TOKENS, 3, 2)), w.weight(2, 2)),
        lambda w, v: w.call(
            torch.matmul,
            w.call(torch.tanh, w.mul(w.column(v), w.call("unsqueeze", w.x, 1))),
            w.weight(HIDDEN, 2),
        ),
        lambda w, v: w.call(
            torch.matmul,
            w.mul(w.column(v), w.call("unsqueeze", w.call(torch.tanh, w.x), 1)),
            w.weight(HIDDEN, 2),
        ),
    ],
    ids=["a mask", "outputs bent", "scaled, no product", "scaled outputs", "scaled, then bent", "scaled inside"],
)
def test_what_may_follow(write):
    w = Layer()
    write(w, w.values)
    assert w.found() is w.values


# Whether something made of dispatched ids meets the scores of the same tokens, by what is done.
MEETINGS = {
    "masked scores": (lambda w: w.mul(w.scores, w.table()), True),
    "masked logits": (lambda w: w.call(torch.add, w.projection, w.call(torch.log, w.table())), True),
    "masked by a cast": (lambda w: w.mul(w.scores, w.call("double", w.call(torch.square, w.table()))), True),
    "masked in place": (
        lambda w: [
            m := w.call(torch.zeros_like, w.scores),
            w.use(UseKind.UNKNOWN, "scatter_", m, 1, w.ids, 1.0),
            w.mul(w.call("view", w.scores, -1, EXPERTS), m),
        ],
        True,
    ),
    "what sums duplicates": (lambda w: w.mul(w.scores, w.table(UseKind.GROUPED)), False),
    "what is no dispatch": (lambda w: w.mul(w.scores, w.table(UseKind.STATISTIC)), False),
    "means of scores": (lambda w: w.mul(w.call(torch.mean, w.scores, 0), w.call(torch.mean, w.table(), 0)), False),
    "other scores": (lambda w: w.mul(w.given(TOKENS, EXPERTS), w.table()), False),
    "behind the experts": (
        lambda w: w.mul(w.scores, w.call(torch.matmul, w.table(), w.weight(EXPERTS, EXPERTS))),
        False,
    ),
    "another table": (lambda w: w.mul(w.scores, w.call(torch.zeros_like, w.table())), True),
    "looked up scores": (
        lambda w: w.mul(
            w.use(UseKind.LOOK_UP, torch.gather, w.scores, 1, w.ids),
            w.call("float", w.use(UseKind.UNKNOWN, torch.eq, w.ids, 1)),
        ),
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEETINGS)
def test_scores_by_id(name):
    write, meets = MEETINGS[name]
    w = Layer()
    w.consumed(w.values)
    write(w)
    found = w.found()
    if meets:
        assert isinstance(found, Skip)
        assert (found.reason, found.evidence) == (SkipReason.SCORES_BY_ID, Evidence.DISPATCH)
        assert nodes.kind(found.node) in ("mul", "add")
        assert found.detail == found.node.name
    else:
        assert not isinstance(found, Skip) or found.reason is SkipReason.AMBIGUOUS_WEIGHTS


# Whether selected scores weigh something with more than a number per slot.
PRODUCTS = {
    "outputs": (lambda w: w.consumed(w.values), True),
    "outputs by bmm": (lambda w: w.call(torch.bmm, w.call("unsqueeze", w.values, 1), w.given(TOKENS, TOP_K, 2)), True),
    "scaled before": (lambda w: w.consumed(w.call(torch.exp, w.mul(w.values, 2))), True),
    "each other": (lambda w: w.mul(w.values, w.given(TOKENS, TOP_K)), False),
    "a weight": (lambda w: w.mul(w.column(w.values), w.weight(HIDDEN)), False),
    "a mask": (lambda w: w.mul(w.column(w.values), w.input(torch.ones(2).long())), False),
    "added": (lambda w: w.call(torch.add, w.column(w.values), w.given(TOKENS, TOP_K, 2)), False),
    "added, then multiplied": (
        lambda w: w.mul(w.call(torch.add, w.column(w.values), w.given(TOKENS, TOP_K, 2)), w.given(2)),
        False,
    ),
    "a number added before": (lambda w: w.consumed(w.call(torch.add, w.values, 1e-9)), True),
    "compared": (lambda w: w.consumed(w.call(torch.gt, w.values, 0.5)), False),
    "nothing": (lambda w: None, False),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_what_selected_scores_weigh(name):
    write, weighs = PRODUCTS[name]
    w = Layer()
    write(w)
    assert weigh_a_product(w.ids, [w.values], []) is weighs
    assert weigh_a_product(w.ids, [], []) is False
    assert weigh_a_product(w.ids, [], [Use(w.values, w.ids, UseKind.LOOK_UP)]) is weighs
    assert weigh_a_product(w.ids, [], [Use(w.values, w.ids, UseKind.UNKNOWN)]) is False
