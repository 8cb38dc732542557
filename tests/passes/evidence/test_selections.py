"""Every form of selection is found by every tracer and re-routes as the oracle says; what is no ranking is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.passes import Evidence, SkipReason, Use, UseKind, find_gates
from sere_compile.passes.evidence.gate_scores import gate_scores
from sere_compile.passes.evidence.selections import find_selections, with_marked_padding
from sere_compile.passes.graph import nodes

from ..graph.written import Written
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


@pytest.mark.parametrize("trace", ["dynamo", "export"])
def test_branch(trace):
    """A gate in a branch is refused for that: no checkpointing is to be switched off."""
    block = Indexed()

    def function(b, x):
        return torch.cond(x.sum() > -1e9, block, torch.sin, (x,))

    module = Function(function)
    module.block = block
    [skip] = find_gates(TRACERS[trace](module, rows())).skips
    assert skip.reason is SkipReason.NESTED
    assert "called by cond, a branch of torch.cond" in skip.detail
    assert "checkpoint" not in str(skip)


def selected(write, *sizes):
    """What is found in a graph that `write(written, scores)` writes."""
    written = Written()
    write(written, written.given(*(sizes or (4, EXPERTS))))
    return find_selections(written.graph)


def only(write, *sizes):
    [found] = selected(write, *sizes)
    return found


def best_ids(w, scores, *args, **kwargs):
    """A top-k whose ids are read."""
    ids = w.pick(w.call(torch.topk, scores, *args, **kwargs), 1)
    w.call(torch.neg, ids)
    return ids


class TestTopK:
    """Hand-written: which of its arguments say what."""

    def test_defaults(self):
        found = only(lambda w, s: best_ids(w, s, 3))
        assert (found.form, found.top_k, found.is_sorted, found.smallest) == ("top-k", 3, True, False)
        assert found.scores.op == "placeholder"
        assert nodes.kind(found.node) == "topk"
        assert (found.steps, found.unnarrowed, found.values) == ((), (), ())

    @pytest.mark.parametrize("sizes", [(8,), (4, 8), (2, 4, 8)])
    def test_the_last_dimension(self, sizes):
        for dim in (-1, len(sizes) - 1):
            assert only(lambda w, s, dim=dim: best_ids(w, s, 2, dim), *sizes).form == "top-k"
        assert only(lambda w, s: best_ids(w, s, 2), *sizes).form == "top-k"

    @pytest.mark.parametrize(("sizes", "dim"), [((4, 8), 0), ((4, 8), -2), ((2, 4, 8), 1), ((2, 4, 8), 0)])
    def test_another_dimension(self, sizes, dim):
        skip = only(lambda w, s: best_ids(w, s, 2, dim=dim), *sizes)
        assert (skip.reason, skip.detail) == (SkipReason.NOT_LAST_DIM, f"dim {dim} of {sizes}")
        assert nodes.kind(skip.node) == "topk"

    def test_largest_and_sorted(self):
        for args, kwargs in (((2, -1, False, False), {}), ((2,), {"largest": False, "sorted": False})):
            found = only(lambda w, s, a=args, k=kwargs: best_ids(w, s, *a, **k))
            assert (found.smallest, found.is_sorted) == (True, False)
        assert only(lambda w, s: best_ids(w, s, 2, -1, True, False)).smallest is False
        assert only(lambda w, s: best_ids(w, s, 2, -1, False, True)).is_sorted is True

    def test_ids_are_those_that_are_read(self):
        """Values are kept either way: a tracer may leave unread picks."""

        def write(w, scores):
            best = w.call(torch.topk, scores, 2)
            w.pick(best, 0)
            w.pick(best, 1)
            w.call(torch.neg, w.pick(best, 1))

        found = only(write)
        assert (len(found.ids), len(found.values)) == (1, 1)
        assert [user.target for user in found.ids[0].users] == [torch.neg]

    @pytest.mark.parametrize(
        "write",
        [
            lambda w, s: w.graph.call_function(torch.topk, (s, s)),
            lambda w, s: w.graph.call_function(torch.topk, (w.graph.placeholder("unknown"), 2)),
            lambda w, s: w.graph.call_function(torch.topk, (7, 2)),
            lambda w, s: w.graph.call_function(torch.topk, (w.input(torch.tensor(1.0)), 1)),
        ],
        ids=["k", "scores", "no node", "no dimension"],
    )
    def test_unknown_sizes(self, write):
        skip = only(write)
        assert skip.reason is SkipReason.SIZE_UNKNOWN
        assert skip.detail.startswith("scores ")
        assert ", k " in skip.detail

    def test_first_columns(self):
        """Cut once or twice alike, and looked up otherwise; whole ids stay unnarrowed."""

        def write(w, scores, ranges=((0, 2),), more=()):
            ids = best_ids(w, scores, 3) if "read" in more else w.pick(w.call(torch.topk, scores, 3), 1)
            for start, stop in ranges:
                w.call(torch.neg, w.pick(ids, (slice(None), slice(start, stop))))
            if "looked up" in more:
                w.call(torch.gather, scores, 1, ids)
            if "taken along" in more:
                w.call(torch.take_along_dim, scores, ids, 1)
            if "size" in more:
                w.call(torch.zeros_like, ids)

        for more in ((), ("looked up",), ("size",), ("taken along",)):
            found = only(lambda w, s, more=more: write(w, s, more=more))
            assert found.top_k == 2
            assert [nodes.kind(node) for node in found.unnarrowed] == ["item"]
        assert only(lambda w, s: write(w, s, ((0, 1),))).top_k == 1
        twice = only(lambda w, s: write(w, s, ((0, 2), (0, 2))))
        assert (twice.top_k, len(twice.ids)) == (2, 2)
        for ranges, more in ((((0, 2),), ("read",)), (((0, 2), (0, 1)), ()), (((1, 3),), ()), (((0, 3),), ())):
            found = only(lambda w, s, ranges=ranges, more=more: write(w, s, ranges, more))
            assert (found.top_k, found.unnarrowed) == (3, ())
            assert [nodes.kind(node) for node in found.ids] == ["item"]


class TestSorts:
    @staticmethod
    def cut(start, stop, descending=True, sort=torch.argsort, negate=False, read_values=False):
        def write(w, scores):
            scores = w.call(torch.neg, scores) if negate else scores
            made = w.call(sort, scores, -1, descending)
            ids = made if sort is torch.argsort else w.pick(made, 1)
            if sort is torch.sort:
                values = w.pick(made, 0)
                if read_values:
                    w.call(torch.exp, values)
            w.call(torch.neg, w.pick(ids, (slice(None), slice(start, stop))))

        return write

    @pytest.mark.parametrize("sort", [torch.argsort, torch.sort])
    def test_first_columns_of_a_descending_sort(self, sort):
        found = only(self.cut(0, 3, sort=sort))
        assert (found.form, found.top_k, found.smallest, found.is_sorted) == ("sort", 3, False, True)
        assert found.scores.op == "placeholder"
        assert [nodes.kind(node) for node in found.ids] == ["slice"]
        assert [nodes.kind(node) for node in found.unnarrowed] == ["argsort" if sort is torch.argsort else "item"]
        assert len(found.values) == (sort is torch.sort)

    def test_ids_that_nobody_reads_are_none(self):
        def write(w, scores):
            made = w.call(torch.sort, scores, -1, True)
            w.pick(made, 1)
            w.call(torch.neg, w.pick(w.pick(made, 1), (slice(None), slice(0, 3))))

        assert len(only(write).unnarrowed) == 1

    @pytest.mark.parametrize("sort", [torch.argsort, torch.sort])
    def test_first_columns_of_an_ascending_one_are_the_smallest(self, sort):
        found = only(self.cut(0, 3, descending=False, sort=sort))
        assert found.smallest
        assert found.scores.op == "placeholder"

    def test_of_negated_scores_they_are_the_best(self):
        """Where nobody reads the negated values."""
        found = only(self.cut(0, 3, descending=False, negate=True))
        assert (found.smallest, found.scores.op) == (False, "placeholder")
        found = only(self.cut(0, 3, descending=False, negate=True, sort=torch.sort))
        assert (found.smallest, found.scores.op) == (False, "placeholder")
        found = only(self.cut(0, 3, descending=False, negate=True, sort=torch.sort, read_values=True))
        assert (found.smallest, nodes.kind(found.scores)) == (True, "neg")
        found = only(self.cut(0, 3, negate=True))
        assert (found.smallest, nodes.kind(found.scores)) == (False, "neg")

    @pytest.mark.parametrize("start", [1, 5, 7])
    @pytest.mark.parametrize("sort", [torch.argsort, torch.sort])
    def test_last_columns_of_an_ascending_sort(self, sort, start):
        """Best last: told as what it is."""
        skip = only(self.cut(start, 8, descending=False, sort=sort))
        assert (skip.reason, skip.evidence) == (SkipReason.ASCENDING, Evidence.ROUTER)
        assert nodes.kind(skip.node) in ("sort", "argsort")

    def test_turned_round(self):
        def write(w, scores):
            order = w.call(torch.argsort, scores)
            w.call(torch.neg, w.pick(w.call(torch.flip, order, [-1]), (slice(None), slice(0, 2))))

        assert only(write).reason is SkipReason.ASCENDING

    @pytest.mark.parametrize(
        ("start", "stop", "descending"),
        [(0, 8, True), (0, 8, False), (1, 3, True), (1, 3, False), (5, 8, True), (0, 0, True)],
    )
    def test_other_columns_are_no_selection(self, start, stop, descending):
        """All of them, those in the middle, the last of a descending sort, none."""
        assert selected(self.cut(start, stop, descending)) == []

    def test_other_readers_of_the_order(self):
        def write(w, scores):
            order = w.call(torch.argsort, scores, -1, True)
            w.pick(order, (slice(None), slice(0, 2)))
            w.call(torch.neg, order)

        assert selected(write) == []

    def test_other_sorts(self):
        """Along another dimension, of whole numbers, or of what nothing is known of."""

        def along(dim):
            return lambda w, s: w.pick(w.call(torch.argsort, s, dim, True), (slice(None), slice(0, 2)))

        def whole(w, s):
            w.pick(w.call(torch.argsort, w.input(torch.arange(8).view(1, 8)), -1, True), (slice(None), slice(0, 2)))

        def unknown(w, s):
            w.graph.call_function(torch.argsort, (w.graph.placeholder("unknown"), -1, True))
            w.graph.call_function(torch.argsort, (3, -1, True))

        assert only(along(1)).top_k == 2
        assert selected(along(0)) == selected(whole) == selected(unknown) == []


class TestMaximum:
    @pytest.mark.parametrize("dim", [-1, 1])
    def test_argmax(self, dim):
        for keepdim in (True, False):
            found = only(lambda w, s, k=keepdim: w.call(torch.neg, w.call(torch.argmax, s, dim, k)))
            assert (found.form, found.top_k, found.values) == ("max", 1, ())
            assert found.ids == (found.node,)
            assert found.scores.op == "placeholder"

    def test_max_with_its_indices(self):
        def write(w, scores):
            best = w.call(torch.max, scores, -1)
            w.pick(best, 0)
            w.call(torch.neg, w.pick(best, 1))

        found = only(write)
        assert (found.form, found.top_k, len(found.ids), len(found.values)) == ("max", 1, 1, 1)
        assert found.node is not found.ids[0]

    @pytest.mark.parametrize(
        "write",
        [
            lambda w, s: w.call(torch.neg, w.call(torch.argmax, s, 0)),
            lambda w, s: w.call(torch.neg, w.call(torch.argmax, s)),
            lambda w, s: w.call(torch.argmax, s, -1),
            lambda w, s: w.call(torch.neg, w.pick(w.call(torch.max, s, -1), 0)),
            lambda w, s: w.pick(w.call(torch.max, s, -1), 1),
            lambda w, s: w.call(torch.neg, w.call(torch.max, s)),
            lambda w, s: w.call(torch.neg, w.call(torch.argmax, w.input(torch.arange(6).view(2, 3)), -1)),
            lambda w, s: w.graph.call_function(torch.argmax, (w.graph.placeholder("unknown"), -1)),
            lambda w, s: w.graph.call_function(torch.argmax, (3, -1)),
        ],
        ids=["rows", "of all", "unread", "values", "unread indices", "one", "whole numbers", "unknown", "no node"],
    )
    def test_no_selection(self, write):
        assert selected(write) == []


class TestSteps:
    """One expert at a time, its scores masked for the next."""

    @staticmethod
    def step(w, scores, keepdim=True):
        chosen = w.call(torch.argmax, scores, -1, keepdim)
        return chosen, w.call(torch.scatter, scores, 1, chosen if keepdim else w.call(torch.unsqueeze, chosen, -1), -9)

    def three(self, w, scores):
        chosen = []
        for _ in range(3):
            ids, scores = self.step(w, scores)
            chosen.append(ids)
        return chosen

    def test_joined_in_order(self):
        def write(w, scores):
            w.call(torch.neg, w.call(torch.cat, self.three(w, scores), -1))

        found = only(write)
        assert (found.form, found.top_k, found.values) == ("steps", 3, ())
        assert [nodes.kind(node) for node in found.ids] == ["cat"]
        assert [nodes.kind(node) for node in found.steps] == ["argmax"] * 3
        assert found.node is found.steps[0]
        assert found.scores.op == "placeholder"

    def test_by_dimension(self):
        """Concatenated along the last one, or stacked there; along another one they are no ids of a token."""

        def along(join, dim, keepdim):
            def write(w, scores):
                first, rest = self.step(w, scores, keepdim)
                second, _ = self.step(w, rest, keepdim)
                w.call(torch.neg, w.call(join, [first, second], *([] if dim is None else [dim])))

            return write

        for join, dim, keepdim in ((torch.cat, 1, True), (torch.stack, -1, False), (torch.stack, 1, False)):
            assert only(along(join, dim, keepdim)).form == "steps"
        for join, dim, keepdim in ((torch.cat, 0, True), (torch.stack, 0, False), (torch.cat, None, True)):
            assert {found.reason for found in selected(along(join, dim, keepdim))} == {SkipReason.STEPS}

    def test_in_another_order(self):
        def write(w, scores):
            first, second, third = self.three(w, scores)
            w.call(torch.neg, w.call(torch.cat, [first, third, second], -1))

        skip = only(write)
        assert (skip.reason, skip.evidence) == (SkipReason.STEPS, Evidence.IDS)
        assert skip.detail == "argmax_1 does not follow argmax_2"
        assert nodes.kind(skip.node) == "cat"

    def test_apart(self):
        """Both are refused, each names both."""

        def write(w, scores):
            for chosen in self.three(w, scores)[:2]:
                w.call(torch.neg, chosen)

        found = selected(write)
        assert [skip.reason for skip in found[:2]] == [SkipReason.STEPS] * 2
        assert [skip.detail for skip in found[:2]] == ["argmax, argmax_1"] * 2
        assert [skip.evidence for skip in found[:2]] == [Evidence.DISPATCH] * 2
        assert [skip.node.name for skip in found[:2]] == ["argmax", "argmax_1"]

    @pytest.mark.parametrize("views", [0, 2])
    def test_apart_with_a_capacity(self, views):
        """Tokens that find their expert full are dropped: that is the reason, seen through views of the ids."""

        def write(w, scores):
            first, rest = self.step(w, scores)
            second, _ = self.step(w, rest)
            for number, ids in enumerate((first, second)):
                for _ in range(views):
                    ids = w.call("view", ids, -1)
                if number == 0:
                    place = w.call(torch.cumsum, w.call(F.one_hot, ids, EXPERTS), 0)
                    w.call(torch.lt, place, 3)
                w.call(torch.neg, ids)

        assert [skip.reason for skip in selected(write)] == [SkipReason.CAPACITY, SkipReason.STEPS]

    def test_what_does_not_follow_stays(self):
        """Two best experts of scores that have nothing to do with each other, and further selections."""

        def write(w, scores):
            other = w.given(4, EXPERTS)
            for one in (scores, other):
                w.call(torch.neg, w.call(torch.argmax, one, -1))
            best_ids(w, scores, 3)

        assert [found.form for found in selected(write)] == ["max", "max", "top-k"]

    def test_the_same_step_twice_is_none(self):
        def write(w, scores):
            first, _ = self.step(w, scores)
            w.call(torch.neg, w.call(torch.cat, [first, first], -1))
            w.call(torch.neg, w.call(torch.argmax, w.call(torch.exp, w.given(4, EXPERTS)), -1))

        assert [found.form for found in selected(write)] == ["max", "max"]

    @pytest.mark.parametrize(
        "joined",
        [
            lambda w, first, second: [first, second, w.input(torch.zeros(4, 1, dtype=torch.int64))],
            lambda w, first, second: [first, w.call(torch.abs, second)],
            lambda w, first, second: [first, w.call("view_as", w.input(torch.zeros(1, 4)), second)],
            lambda w, first, second: [first],
        ],
        ids=["further numbers", "other numbers", "the shape alone", "one alone"],
    )
    def test_joined_with_what_no_step_chose(self, joined):
        """Numbers that are no step's ids; a later tensor that joins the steps counts all the same."""

        def write(w, scores, properly=False):
            first, rest = self.step(w, scores)
            second, _ = self.step(w, rest)
            w.call(torch.neg, w.call(torch.cat, joined(w, first, second), -1))
            if properly:
                w.call(torch.neg, w.call(torch.cat, [first, second], -1))

        assert [found.reason for found in selected(write)] == [SkipReason.STEPS] * 2
        assert [found.form for found in selected(lambda w, s: write(w, s, properly=True))] == ["steps"]

    def test_more_than_one_expert_at_a_time_is_no_step(self):
        def write(w, scores):
            first = best_ids(w, scores, 2)
            second = best_ids(w, w.call(torch.scatter, scores, 1, first, -9), 2)
            w.call(torch.neg, w.call(torch.cat, [first, second], -1))

        assert [found.form for found in selected(write)] == ["top-k"] * 2

    def test_others_keep_their_place_beside_steps(self):
        def write(w, scores):
            best_ids(w, scores, 3)
            w.call(torch.neg, w.call(torch.cat, self.three(w, scores), -1))
            best_ids(w, scores, 2)

        assert [(found.form, found.top_k) for found in selected(write)] == [("top-k", 3), ("steps", 3), ("top-k", 2)]

    def test_scores_of_another_layer_do_not_follow(self):
        """A projection in between ends the search: the ids of one layer shape the hidden states of the next."""

        def write(w, scores):
            first, rest = self.step(w, scores)
            w.call(torch.neg, w.call(torch.argmax, w.call(torch.matmul, rest, w.weight(EXPERTS, EXPERTS)), -1))
            w.call(torch.neg, first)

        assert [found.form for found in selected(write)] == ["max", "max"]

    def test_scores_that_are_masked_in_place_follow(self):
        def write(w, scores):
            rest = w.call(torch.clone, scores)
            first = w.call(torch.argmax, scores, -1, True)
            w.call("scatter_", rest, 1, first, -9.0)
            second = w.call(torch.argmax, w.call(torch.exp, rest), -1, True)
            w.call("scatter_", rest, 1, second, -9.0)
            w.call(torch.neg, w.call(torch.cat, [first, second], -1))

        assert only(write).form == "steps"


# Masks that are computed each in its own way: of (written, what is real).
OTHERWISE = {
    "by another operation": (lambda w, real: w.call("lt", real, 1), lambda w, real: w.call("le", real, 1)),
    "by a function": (lambda w, real: w.call("neg", w.one), lambda w, real: w.call(torch.neg, w.one)),
    "with another number": (lambda w, real: w.call("lt", real, 1), lambda w, real: w.call("lt", real, 0)),
    "with a number of another type": (
        lambda w, real: w.call("lt", real, 1),
        lambda w, real: w.call("lt", real, 1.0),
    ),
    "of another input": (
        lambda w, real: w.call("lt", w.given(4, 1), 1),
        lambda w, real: w.call("lt", w.given(4, 1), 1),
    ),
    "of a number": (lambda w, real: w.call("lt", w.one, w.one), lambda w, real: w.call("lt", w.one, 1)),
    "with more arguments": (lambda w, real: w.call("any", real), lambda w, real: w.call("any", real, 1, True)),
    "with other names": (
        lambda w, real: w.call("any", real),
        lambda w, real: w.call("any", real, dim=1, keepdim=True),
    ),
    "with another option": (
        lambda w, real: w.call("any", real, dim=0, keepdim=True),
        lambda w, real: w.call("any", real, dim=1, keepdim=True),
    ),
    "and changed": (
        lambda w, real: w.call("lt", real, 1),
        lambda w, real: w.call("logical_not_", w.call("lt", real, 1)).args[0],
    ),
}


class TestMarkedPadding:
    """`with_marked_padding`: the ids that the dispatch reads, once padding has a number of no expert."""

    @staticmethod
    def marked(mark, kind=UseKind.EXPERT_INDEX, twice=False):
        w = Written()
        ids = best_ids(w, w.given(4, EXPERTS), 3)
        real = w.input(torch.ones(4, 1, dtype=torch.bool))
        read = mark(w, ids, real)
        [found] = find_selections(w.graph)
        uses = [Use(w.call(torch.neg, read), read, kind)]
        if twice:
            uses.append(Use(w.call(torch.neg, ids), ids, kind))
        return found, with_marked_padding(found, uses)

    @pytest.mark.parametrize(
        "mark",
        [
            lambda w, ids, real: w.call(torch.where, real, ids, -1),
            lambda w, ids, real: w.call(torch.where, real, ids, EXPERTS),
            lambda w, ids, real: w.call("masked_fill", ids, real, -1),
            lambda w, ids, real: w.call("masked_fill", ids, real, EXPERTS + 1),
            lambda w, ids, real: w.call("masked_fill", w.call("view", w.call("view", ids, -1), 4, 3), real, -2),
            lambda w, ids, real: w.call("view", w.call("clamp", w.call(torch.where, real, ids, -1), 0), -1),
            lambda w, ids, real: w.call(torch.where, real, ids, 0),
            lambda w, ids, real: w.call("masked_fill", ids, real, EXPERTS - 1),
        ],
        ids=[
            "where", "E", "masked", "above E", "of a view", "seen through a clamp and a view", "first expert",
            "last expert",
        ],
    )  # fmt: skip
    def test_ids_behind_the_mark(self, mark):
        before, found = self.marked(mark)
        assert nodes.kind(found.ids[0]) in ("where", "masked_fill")
        assert found.unnarrowed == before.ids
        assert found.top_k == 3

    @pytest.mark.parametrize(
        "mark",
        [
            lambda w, ids, real: ids,
            lambda w, ids, real: w.call(torch.where, w.call(torch.ge, ids, EXPERTS - 1), ids, 0),
            lambda w, ids, real: w.call(torch.where, real, -1, ids),
            lambda w, ids, real: w.call("masked_fill", ids, w.call("view", w.call(torch.lt, ids, 0), 4, 3), 0),
            lambda w, ids, real: w.call("masked_fill_", w.call("clone", ids), real, -1),
            lambda w, ids, real: w.call(torch.where, w.input(torch.ones(1, 4, 1) > 0), ids, -1),
            lambda w, ids, real: w.call(torch.where, w.call("view", real, 4), w.pick(ids, (slice(None), 0)), -1),
            lambda w, ids, real: w.call("masked_fill", w.call(torch.neg, ids), real, -1),
        ],
        ids=[
            "no mark", "where some are", "other branch", "masked where some are", "in place", "broadcast",
            "one column", "of other numbers",
        ],
    )  # fmt: skip
    def test_no_mark(self, mark):
        assert self.marked(mark)[1] is None

    def test_every_dispatch_has_to_read_the_mark(self):
        assert self.marked(lambda w, ids, real: w.call(torch.where, real, ids, -1), twice=True)[1] is None
        found = self.marked(lambda w, ids, real: w.call(torch.where, real, ids, -1), kind=UseKind.LOOK_UP)[1]
        assert found is None

    @staticmethod
    def marked_twice(first, second):
        """Two sets of experts read the ids, each masked; of the ids and a mask."""
        w = Written()
        ids = best_ids(w, w.given(4, EXPERTS), 3)
        real = w.input(torch.ones(4, 1, dtype=torch.bool))
        reads = [mark(w, ids, real) for mark in (first, second)]
        [found] = find_selections(w.graph)
        uses = [Use(w.call(torch.neg, read), read, UseKind.EXPERT_INDEX) for read in reads]
        return with_marked_padding(found, uses), reads

    @pytest.mark.parametrize("number", [-1, 0])
    def test_equal_masks_count_as_one(self, number):
        def mark(w, ids, real):
            return w.call("masked_fill", ids, w.call("logical_not", real), number)

        found, reads = self.marked_twice(mark, mark)
        assert found.ids == tuple(reads)

    @pytest.mark.parametrize(
        "other",
        [
            lambda w, ids, real: w.call("masked_fill", ids, w.call("logical_not", real), -2),
            lambda w, ids, real: w.call("masked_fill", ids, real, -1),
            lambda w, ids, real: w.call("masked_fill", ids, w.call("lt", w.call(torch.rand, 4, 1), 0.5), -1),
            lambda w, ids, real: ids,
        ],
        ids=["other number", "contrary", "at random", "none"],
    )
    def test_other_masks_do_not(self, other):
        def mark(w, ids, real):
            return w.call("masked_fill", ids, w.call("logical_not", real), -1)

        assert self.marked_twice(mark, other)[0] is None
        assert self.marked_twice(other, mark)[0] is None

    def test_masks_at_random_are_never_equal(self):
        def mark(w, ids, real):
            return w.call("masked_fill", ids, w.call("lt", w.call(torch.rand, 4, 1), 0.5), -1)

        assert self.marked_twice(mark, mark)[0] is None

    def test_the_first_mark_counts(self):
        def mark(w, ids, real):
            return w.call("masked_fill", w.call(torch.where, real, ids, -1), real, -2)

        assert nodes.kind(self.marked(mark)[1].ids[0]) == "where"

    @pytest.mark.parametrize(("number", "last"), [(0, "where"), (EXPERTS, "masked_fill")])
    def test_the_last_expert_sent_to_counts_where_nothing_is_marked(self, number, last):
        def mark(w, ids, real):
            return w.call(torch.where, real, w.call("masked_fill", ids, real, number), 1)

        assert nodes.kind(self.marked(mark)[1].ids[0]) == last

    @pytest.mark.parametrize(("steps", "equal"), [(11, True), (12, False)])
    def test_masks_are_compared_within_some_steps(self, steps, equal):
        """What is behind these is not looked at."""

        def mark(w, ids, real):
            for _ in range(steps):
                real = w.call("logical_not", real)
            return w.call("masked_fill", ids, real, -1)

        assert (self.marked_twice(mark, mark)[0] is not None) is equal

    @pytest.mark.parametrize("name", OTHERWISE)
    def test_masks_that_are_computed_otherwise(self, name):
        def marking(make):
            def mark(w, ids, real):
                w.one = w.one if hasattr(w, "one") else w.input(torch.ones(4, 1))
                return w.call("masked_fill", ids, w.call("logical_not", make(w, real)), -1)

            return mark

        first, second = map(marking, OTHERWISE[name])
        assert self.marked_twice(first, second)[0] is None
        assert self.marked_twice(second, first)[0] is None
        assert (self.marked_twice(first, first)[0] is None) is (name == "of another input")

    def test_attributes_that_are_read_anew_are_equal(self):
        def mark(w, ids, real):
            held = w.graph.get_attr("padding")
            held.meta["example_value"] = torch.ones(4, 1) > 0
            return w.call("masked_fill", ids, held, -1)

        assert self.marked_twice(mark, mark)[0] is not None
