"""Every form of selection is found by every tracer and re-routes as the oracle says; what is no ranking is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.passes import SkipReason, UseKind, find_gates
from sere_compile.passes.evidence.gate_scores import gate_scores
from sere_compile.passes.graph import nodes

from ..moe_modules import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    TRACERS,
    Block,
    Indexed,
    ScatterCombine,
    expected,
    from_export,
    one_gate,
    reroute,
    rows,
    run,
    similarity,
    weighted_sum,
)


def cut_sort(b, x):
    values, ids = b.scores(x).sort(dim=-1, descending=True)
    return ids[:, : b.top_k], values[:, : b.top_k]


def cut_argsort(b, x):
    scores = b.scores(x)
    ids = torch.argsort(scores, dim=-1, descending=True)[..., : b.top_k]
    return ids, scores.gather(-1, ids)


def negated_argsort(b, x):
    scores = b.scores(x)
    ids = (-scores).argsort(-1)[..., :TOP_K]
    return ids, scores.gather(-1, ids)


def one_more(b, x):
    """The K-th score is compared with the next one by some routers; ids and values are cut to K."""
    values, ids = b.scores(x).topk(b.top_k + 1)
    values = values.softmax(-1)
    return ids[:, : b.top_k], values.narrow(1, 0, b.top_k)


def steps(b, x):
    """The sparse mixer: the best, then the best of the others."""
    scores, ids, weights = b.scores(x), [], []
    rest = scores
    for _ in range(b.top_k):
        best, chosen = rest.max(dim=-1, keepdim=True)
        weights.append(rest.masked_fill(((best - scores) / scores.abs().clamp(min=best)) > 0.9, -math.inf).softmax(-1))
        weights[-1] = weights[-1].gather(-1, chosen)
        ids.append(chosen)
        rest = torch.scatter(rest, -1, chosen, -math.inf)
    return torch.cat(ids, -1), torch.cat(weights, -1)


def argmax_steps(b, x):
    """The same with argmax, masking by a one-hot, and stacking."""
    scores, ids = b.scores(x), []
    rest = scores
    for _ in range(b.top_k):
        ids.append(rest.argmax(-1))
        rest = rest.masked_fill(F.one_hot(ids[-1], b.num_experts).bool(), -math.inf)
    ids = torch.stack(ids, -1)
    return ids, scores.gather(-1, ids)


FORMS = {
    "sort": cut_sort,
    "argsort": cut_argsort,
    "top-k": one_more,
    "steps": steps,
    "steps by argmax": argmax_steps,
}


class Routes(Block):
    """A block whose routing is a function; mixed into a dispatch."""

    def __init__(self, function, columns=EXPERTS):
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(3)
        self.router = nn.Parameter(torch.randn(columns, HIDDEN, generator=generator))

    def route(self, x):
        return self.function(self, x)


class RoutedIndexed(Routes, Indexed):
    pass


class RoutedScatter(Routes, ScatterCombine):
    pass


def check(module, tracer, select_top_k=1):
    """Rewrite the only gate and compare with the sum over slots of new experts with old weights."""
    graph, matrix = TRACERS[tracer](module, rows()), similarity()
    done = reroute(graph, matrix, select_top_k)
    with torch.no_grad():
        want, before = expected(module, rows(), matrix, select_top_k), module(rows())
    torch.testing.assert_close(run(graph, rows()), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, want, atol=1e-3), "the case re-routes nothing"
    return done


@pytest.mark.parametrize("tracer", TRACERS)
def test_the_smallest_of_negated_scores_are_the_best(tracer):
    done = check(RoutedIndexed(negated_argsort), tracer)
    assert gate_scores(done.gate).choice is nodes.operand(nodes.operand(done.gate.selection))


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("module", [RoutedIndexed, RoutedScatter], ids=["indexed", "scattered"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, module, tracer):
    """Each form is found with its K and re-routed, whether duplicates are summed or merged."""
    done = check(module(FORMS[form]), tracer)
    assert done.gate.form == {"argsort": "sort", "steps by argmax": "steps"}.get(form, form)
    assert (done.gate.top_k, done.gate.num_experts, done.merged) == (TOP_K, EXPERTS, module is RoutedScatter)


WIDE = {
    "sliced": lambda b, x: F.linear(x, b.router)[:, :EXPERTS],
    "last columns": lambda b, x: F.linear(x, b.router)[..., 2:],
    "split": lambda b, x: F.linear(x, b.router).split([EXPERTS, 2], dim=-1)[0],
    "narrowed after softmax": lambda b, x: F.linear(x, b.router).softmax(-1).narrow(-1, 0, EXPERTS),
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("cut", WIDE)
def test_router_with_further_columns(cut, tracer):
    """Columns of a shared expert are cut off before the selection."""

    def route(b, x):
        values, ids = torch.topk(WIDE[cut](b, x), b.top_k)
        return ids, values

    done = check(RoutedIndexed(route, columns=EXPERTS + 2), tracer)
    assert nodes.shape(done.gate.router_weight) == (EXPERTS + 2, HIDDEN)


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("largest", [True, False])
def test_distances(largest, tracer):
    """Scores may be distances to a key for each expert; the nearest come first."""

    def route(b, x):
        distances = torch.cdist(x, b.router)
        values, ids = torch.topk(-distances if largest else distances, b.top_k, largest=largest)
        return ids, values.abs()

    assert check(RoutedIndexed(route), tracer).gate.router_weight.name.startswith(("p_", "l_", "router", "_param"))


class Padded(Indexed):
    """Padding rows get id -1 and weight 0; the experts are read at 0 for them."""

    def dispatch(self, x, ids, weights):
        ids = torch.where((x[:, :1] > 0), ids, -1)
        return super().dispatch(x, ids.clamp(min=0), weights * (ids >= 0))


class PaddedSort(Padded):
    """The same with a cut sort."""

    def route(self, x):
        ordered, order = torch.sort(self.scores(x), -1, descending=True)
        values, ids = ordered[..., : self.top_k], order[..., : self.top_k]
        return ids, values / values.sum(-1, keepdim=True)


class PaddedRows(Padded):
    """Weights are looked up by rows and ids, which is no dispatch."""

    def route(self, x):
        scores = self.scores(x)
        ids = scores.topk(TOP_K, dim=-1)[1]
        return ids, scores[torch.arange(len(x))[:, None], ids]


class PaddedView(Padded):
    """The mark is made on a view of the ids."""

    def route(self, x):
        ids, weights = super().route(x)
        return ids.flatten().view(-1, TOP_K), weights


@pytest.mark.parametrize("kind", [Padded, PaddedSort, PaddedRows, PaddedView])
@pytest.mark.parametrize("tracer", TRACERS)
def test_marked_padding_makes_no_primary(tracer, kind):
    """Ids are re-routed behind the mark, so that a padding row makes no expert primary and keeps -1."""
    from sere_compile.testing import reroute_oracle

    module, x, matrix = kind(), rows(), similarity()
    graph = TRACERS[tracer](module, x)
    done = reroute(graph, matrix)
    assert nodes.kind(done.gate.ids) == "where"
    with torch.no_grad():
        ids, weights = module.route(x)
        marked = torch.where(x[:, :1] > 0, ids, -1)
        new = reroute_oracle(marked, matrix, 1)
        assert not torch.equal(new, torch.where(marked < 0, -1, reroute_oracle(ids, matrix, 1))), (
            "padding changes nothing"
        )
        want = weighted_sum(module, x, new, weights)
    torch.testing.assert_close(run(graph, x), want, rtol=1e-5, atol=1e-5)


class SkipSlots(Indexed):
    """Two more columns than experts: ids E and E + 1 give the token itself."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.router = nn.Parameter(torch.randn(EXPERTS + 2, HIDDEN, generator=generator))

    def dispatch(self, x, ids, weights):
        skipped = ids >= EXPERTS
        y = super().dispatch(x, ids.masked_fill(skipped, 0), weights.masked_fill(skipped, 0.0))
        return y + (weights * skipped).sum(-1, keepdim=True) * x


@pytest.mark.parametrize("tracer", TRACERS)
def test_slots_without_computation(tracer):
    """Ids that name no expert keep their slot and are no targets; the matrix has a row for each expert only."""
    from sere_compile.testing import reroute_oracle

    module, x, matrix = SkipSlots(), rows(), similarity()
    graph = TRACERS[tracer](module, x)
    gate = one_gate(graph)
    assert gate.num_experts == EXPERTS
    kept = {nodes.kind(use.consumer) for use in gate.uses if use.kind is UseKind.LOOK_UP}
    assert "ge" in kept
    reroute(graph, matrix, gate=gate)
    with torch.no_grad():
        ids, weights = module.route(x)
        new = reroute_oracle(ids, matrix, 1)
        assert (ids >= EXPERTS).any()
        want = weighted_sum(module, x, new, weights) + (weights * (new >= EXPERTS)).sum(-1, keepdim=True) * x
    torch.testing.assert_close(run(graph, x), want, rtol=1e-5, atol=1e-5)


class Function(Block):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.table = nn.Buffer(torch.randint(0, EXPERTS, (50, TOP_K)))

    def forward(self, x):
        return self.function(self, x)


def only_reason(function, trace=from_export):
    found = find_gates(trace(Function(function), rows()))
    assert found.gates == ()
    return {skip.reason for skip in found.skips}


def steps_apart(b, x):
    """GShard's second choice: both are one-hot, never one tensor of ids."""
    logits = F.linear(x, b.router)
    first = F.one_hot(logits.argmax(-1), EXPERTS)
    second = F.one_hot(logits.masked_fill(first.bool(), -math.inf).argmax(-1), EXPERTS)
    return torch.einsum("te,eth->th", (first + second).to(x.dtype), b.all_experts(x.expand(EXPERTS, -1, -1)))


def unordered(b, x):
    """Ids whose order is not that of choosing."""
    first = b.scores(x).argmax(-1, keepdim=True)
    second = b.scores(x).scatter(1, first, -1.0).argmax(-1, keepdim=True)
    return torch.bmm(x[:, None], b.experts[torch.cat([second, first], -1)].sum(1))


def capacity(b, x):
    """Each expert takes four tokens, the others are dropped."""
    values, ids = b.scores(x).topk(2)
    mask = F.one_hot(ids, EXPERTS)
    kept = mask * (mask.cumsum(0) <= 4)
    combine = (kept * values[..., None]).sum(1)
    return torch.einsum("te,eth->th", combine, b.all_experts(x.expand(EXPERTS, -1, -1)))


def sorted_capacity(b, x):
    """The same with slots numbered in sorted order, from each expert's first row."""
    values, ids = b.scores(x).topk(2)
    experts, order = ids.flatten().sort(stable=True)
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
    place = torch.arange(experts.shape[0]) - (counts.cumsum(0) - counts)[experts]
    out = (x[order // 2][:, None] @ b.experts[experts])[:, 0]
    out = out * (values.flatten()[order] * (place < 4)).unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, order // 2, out)


def product_keys(b, x):
    left, right = (F.linear(x, b.router).topk(2), F.linear(x.flip(-1), b.router).topk(2))
    pairs = (left[0][:, :, None] + right[0][:, None, :]).flatten(1)
    chosen = pairs.topk(2)[1]
    ids = left[1].gather(1, chosen // 2) * EXPERTS + right[1].gather(1, chosen % 2)
    return b.experts[ids % EXPERTS].sum((1, 2))


def hashed(b, x):
    ids = b.table[torch.arange(x.shape[0])]
    return (x[:, None, None] @ b.experts[ids]).sum((1, 2))


@pytest.mark.parametrize("tracer", ["dynamo", "export"])
class TestRefusals:
    @pytest.mark.parametrize(
        ("function", "reasons"),
        [
            (steps_apart, {SkipReason.STEPS}),
            (unordered, {SkipReason.STEPS}),
            (capacity, {SkipReason.CAPACITY}),
            (sorted_capacity, {SkipReason.CAPACITY}),
            (hashed, {SkipReason.HASH}),
        ],
        ids=lambda value: getattr(value, "__name__", ""),
    )
    def test_reason(self, function, reasons, tracer):
        """What re-routing would break is named by what it is."""
        assert only_reason(function, TRACERS[tracer]) == reasons

    def test_product_keys(self, tracer):
        """All three selections of a product of keys say so."""
        assert only_reason(product_keys, TRACERS[tracer]) == {SkipReason.PRODUCT_KEYS}

    def test_ascending_sort(self, tracer):
        """The first columns of an ascending sort are the worst."""
        assert only_reason(lambda b, x: b.experts[b.scores(x).sort(-1)[1][:, :2]], TRACERS[tracer]) == {
            SkipReason.SMALLEST
        }

    def test_ordinary_maximum(self, tracer):
        """An argmax over projected scores is told like a top-k; one over anything else is one of many, and is not."""
        assert only_reason(lambda b, x: F.linear(x, b.router).argmax(-1), TRACERS[tracer]) == {SkipReason.NO_DISPATCH}
        assert only_reason(lambda b, x: x.max(-1)[1] + x.relu().argmax(-1), TRACERS[tracer]) == set()

    def test_whole_ids_and_a_part(self, tracer):
        """A part of the ids beside the whole: the whole is dispatched."""

        def function(b, x):
            ids, weights = Block.route(b, x)
            return Indexed.dispatch(b, x, ids, weights), ids[:, :1] + 1

        assert one_gate(TRACERS[tracer](Function(function), rows())).top_k == TOP_K


@pytest.mark.parametrize("trace", ["dynamo", "export"])
def test_nested_graph(trace):
    """A gate in a checkpointed region is reported with its reason."""
    block = Indexed()

    def function(b, x):
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)

    module = Function(function)
    module.block = block
    with torch.enable_grad():
        graph = TRACERS[trace](module, rows())
    skips = find_gates(graph).skips
    if any(nodes.kind(node) == "topk" for node in graph.graph.nodes):
        pytest.skip("the tracer inlines checkpoints")
    assert [skip.reason for skip in skips] == [SkipReason.NESTED]
    assert "gradient_checkpointing_disable()" in str(skips[0])
    assert nodes.source_line(skips[0].node).startswith("moe_modules.py:")
