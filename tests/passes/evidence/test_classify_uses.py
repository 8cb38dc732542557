"""`classify_uses`: what each consumer of the ids does, and whether it reaches experts."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.passes import SkipReason, UseKind, find_gates
from sere_compile.passes.evidence.classify_uses import Leaving, classify_uses, load_sizes
from sere_compile.passes.evidence.selections import find_selections
from sere_compile.passes.graph import nodes

from ..graph.written import Written
from ..moe_modules import (
    DUPLICATE_UNSAFE,
    EXPERTS,
    HIDDEN,
    TOP_K,
    TRACERS,
    Block,
    Grouped,
    Indexed,
    Used,
    expected,
    from_dynamo,
    from_export,
    from_make_fx,
    one_gate,
    reroute,
    rows,
    run,
    similarity,
)

# name -> (function of (block, x, ids, scores), operation that consumes the ids, kind of use)
USES = {
    "gather of scores": (lambda b, x, ids, s: s.gather(1, ids), "gather", UseKind.LOOK_UP),
    "gather of raw logits": (lambda b, x, ids, s: F.linear(x, b.router).gather(-1, ids), "gather", UseKind.UNKNOWN),
    "per-expert scale": (lambda b, x, ids, s: b.scale[ids], "index", UseKind.LOOK_UP),
    "per-expert bias vectors": (lambda b, x, ids, s: b.expert_bias[ids], "index", UseKind.EXPERT_INDEX),
    "expert bias as embedding": (
        lambda b, x, ids, s: F.embedding(ids, b.expert_bias),
        "embedding",
        UseKind.EXPERT_INDEX,
    ),
    "load count": (
        lambda b, x, ids, s: torch.bincount(ids.flatten(), minlength=EXPERTS),
        "bincount",
        UseKind.STATISTIC,
    ),
    "histogram": (lambda b, x, ids, s: torch.histc(ids.float(), EXPERTS), "histc", UseKind.STATISTIC),
    "load that is a mean of one-hot rows": (
        lambda b, x, ids, s: F.one_hot(ids, EXPERTS).float().mean((0, 1)),
        "one_hot",
        UseKind.STATISTIC,
    ),
    "number of slots": (lambda b, x, ids, s: F.one_hot(ids, EXPERTS).sum(), "one_hot", UseKind.STATISTIC),
    "loss that balances load": (
        lambda b, x, ids, s: (torch.zeros_like(s).scatter(1, ids, 1.0).mean(0) * s.mean(0)).sum(),
        "scatter",
        UseKind.STATISTIC,
    ),
    "load kept in a buffer": (
        lambda b, x, ids, s: b.load.add_(F.one_hot(ids, EXPERTS).sum((0, 1))).sum(),
        "one_hot",
        UseKind.STATISTIC,
    ),
    "loss over slots and experts": (
        lambda b, x, ids, s: (F.one_hot(ids, EXPERTS).float().mean(0) * s.mean(0).unsqueeze(0)).sum() * EXPERTS,
        "one_hot",
        UseKind.STATISTIC,
    ),
    "loss of what a mask chooses": (
        lambda b, x, ids, s: torch.where((ids == 1).any(-1, keepdim=True), x.tanh(), 0.0).sum(),
        "eq",
        UseKind.UNKNOWN,
    ),
    "mask of all tokens": (lambda b, x, ids, s: F.one_hot(ids, EXPERTS).sum(1), "one_hot", UseKind.UNKNOWN),
    "loss of what a mask is multiplied by": (
        lambda b, x, ids, s: (F.one_hot(ids, EXPERTS).sum(1).float() @ b.expert_bias).mean(),
        "one_hot",
        UseKind.UNKNOWN,
    ),
    "returned": (lambda b, x, ids, s: ids, "output", UseKind.LEAVES),
    "returned as a view": (lambda b, x, ids, s: ids.view(-1), "output", UseKind.LEAVES),
    "transposed": (lambda b, x, ids, s: ids.T + 1, "transpose", UseKind.UNKNOWN),
    "indexes a computed table": (lambda b, x, ids, s: (b.scale * 2)[ids], "index", UseKind.UNKNOWN),
    "two indices": (lambda b, x, ids, s: b.expert_bias[ids, ids % HIDDEN], "index", UseKind.UNKNOWN),
    "gather of other tokens' scores": (lambda b, x, ids, s: s.gather(0, ids), "gather", UseKind.UNKNOWN),
    "rows of scores": (lambda b, x, ids, s: s[ids, torch.arange(TOP_K)], "index", UseKind.UNKNOWN),
    "load that keeps a row": (
        lambda b, x, ids, s: F.one_hot(ids, EXPERTS).float().mean((0, 1), keepdim=True),
        "one_hot",
        UseKind.UNKNOWN,
    ),
    "unsafe sort": (lambda b, x, ids, s: ids.flatten().sort()[0] + 1, "sort", UseKind.UNKNOWN),
}


class TestKinds:
    @pytest.mark.parametrize("tracer", ["dynamo", "export"])
    @pytest.mark.parametrize("name", USES)
    def test_further_uses(self, name, tracer):
        """A use next to an ordinary dispatch gets the kind of what it does."""
        function, operation, kind = USES[name]
        gate = one_gate(TRACERS[tracer](Used(function), rows()))
        found = {(nodes.kind(use.consumer), use.kind) for use in gate.uses}
        assert (operation, kind) in found, found

    def test_dispatches(self):
        """Looking up and counting are no dispatch; only two kinds are proven to sum duplicates."""
        assert {kind for kind in UseKind if not kind.dispatches} == {
            UseKind.LOOK_UP,
            UseKind.STATISTIC,
            UseKind.RANKING,
        }
        assert {kind for kind in UseKind if kind.sums_duplicates} == {UseKind.EXPERT_INDEX, UseKind.GROUPED}

    @pytest.mark.parametrize("tracer", TRACERS)
    @pytest.mark.parametrize("module", [Indexed, Grouped], ids=lambda module: module.__name__)
    def test_summing_dispatch(self, module, tracer):
        """Gathering expert weights by slot and grouping slots by expert are proven to sum."""
        gate = one_gate(TRACERS[tracer](module(), rows()))
        kind = UseKind.EXPERT_INDEX if module is Indexed else UseKind.GROUPED
        assert [use.kind for use in gate.dispatch_uses] == [kind]
        assert not gate.needs_merge
        assert gate.dispatch == kind.value

    @pytest.mark.parametrize("tracer", TRACERS)
    @pytest.mark.parametrize("module", DUPLICATE_UNSAFE, ids=lambda module: module.__name__)
    def test_unsafe_dispatch(self, module, tracer):
        """Every other dispatch needs merged duplicates."""
        gate = one_gate(TRACERS[tracer](module(), rows()))
        assert gate.needs_merge
        assert {use.kind for use in gate.dispatch_uses} == {UseKind.UNKNOWN}

    def test_sizes_are_no_use(self):
        """Reading the ids' size, type or device is none of the uses."""
        function = lambda b, x, ids, s: (torch.zeros_like(ids), x.new_zeros(ids.shape), s[:, :TOP_K].view_as(ids))  # noqa: E731
        for trace in TRACERS.values():
            assert [use.kind for use in one_gate(trace(Used(function), rows())).uses] == [UseKind.EXPERT_INDEX]

    def test_uses_know_what_they_read(self):
        """A use through views names the last view, which the consumer reads."""
        gate = one_gate(from_export(Used(lambda b, x, ids, s: b.scale[ids.reshape(-1).long()[None]]), rows()))
        [look_up] = [use for use in gate.uses if use.kind is UseKind.LOOK_UP]
        assert look_up.read is not gate.ids
        assert nodes.slot_source(look_up.read) is not None
        assert look_up.read in look_up.consumer.all_input_nodes
        [dispatch] = gate.dispatch_uses
        assert dispatch.read in dispatch.consumer.all_input_nodes

    def test_two_picks_of_the_ids(self):
        """Where a tracer kept `r[1]` and `r.indices` apart, the uses of both are known."""
        graph = from_export(Indexed(), rows())
        gate = one_gate(graph)
        with graph.graph.inserting_after(gate.ids):
            twin = graph.graph.node_copy(gate.ids)
        gate.uses[0].consumer.replace_input_with(gate.ids, twin)
        twin.append(graph.graph.call_method("sigmoid", (gate.ids,)))
        assert {use.read for use in one_gate(graph).uses} == {gate.ids, twin}


LOOK_UPS = {
    "gather": lambda scores, ids: scores.gather(1, ids),
    "take_along_dim": lambda scores, ids: scores.take_along_dim(ids, 1),
    "rows and ids": lambda scores, ids: scores[torch.arange(scores.shape[0])[:, None], ids],
    "through a cast": lambda scores, ids: scores.double().gather(-1, ids.view(ids.shape)).float(),
}


@pytest.mark.parametrize("tracer", ["dynamo", "export"])
@pytest.mark.parametrize("name", LOOK_UPS)
def test_look_ups(name, tracer):
    """Every spelling of a look-up in the scores keeps the original ids."""

    class Looked(Indexed):
        def route(self, x):
            scores = self.scores(x)
            ids = torch.topk(scores + 1, self.top_k)[1]
            return ids, LOOK_UPS[name](scores, ids)

    gate = one_gate(TRACERS[tracer](Looked(), rows()))
    assert [use.kind for use in gate.uses if not use.kind.dispatches] == [UseKind.LOOK_UP]
    assert [use.kind for use in gate.dispatch_uses] == [UseKind.EXPERT_INDEX]


def sorted_outside(b, x):
    """DeepSeek's reference: rows sorted in the graph, split by their counts outside of it."""
    values, ids = b.scores(x).topk(TOP_K)
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
    return x[ids.flatten().argsort() // TOP_K], counts, values


class Outside(Block):
    def forward(self, x):
        return sorted_outside(self, x)


@pytest.mark.parametrize("tracer", ["dynamo", "export"])
class TestCountsThatLeave:
    """Rows and counts that leave a graph together belong together: both follow the new ids."""

    def test_beside_a_dispatch_that_leaves(self, tracer):
        """Counts of the old ids would split rows in the order of the new ones at wrong places."""
        found = find_gates(TRACERS[tracer](Outside(), rows()), lambda weight, columns: columns)
        [gate] = found.gates
        assert {nodes.kind(use.consumer): use.kind.dispatches for use in gate.uses} == {
            "bincount": True,
            "argsort": True,
        }

    def test_beside_experts_in_the_graph(self, tracer):
        """There they are a statistic."""
        gate = one_gate(TRACERS[tracer](Used(lambda b, x, ids, s: torch.bincount(ids.flatten())), rows()))
        assert UseKind.STATISTIC in {use.kind for use in gate.uses}


@torch.library.custom_op("sere_tests::opaque_experts", mutates_args=())
def opaque_experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """An operator that no pass looks into; of two equal slots it keeps the last."""
    combine = x.new_zeros(x.shape[0], experts.shape[0]).scatter(1, ids, weights)
    return torch.einsum("te,eth->th", combine, torch.tanh(torch.einsum("th,ehg->etg", x, experts)))


@opaque_experts.register_fake
def _(x, ids, weights, experts):
    return torch.empty_like(x)


class Opaque(Block):
    def dispatch(self, x, ids, weights):
        return torch.ops.sere_tests.opaque_experts(x, ids, weights, self.experts)


@pytest.mark.parametrize("tracer", TRACERS)
class TestOpaqueOperator:
    def test_merged(self, tracer):
        """A custom operator on the ids may do anything to duplicates: slots are merged, and the sum is right."""
        module, matrix = Opaque(), similarity()
        graph = TRACERS[tracer](module, rows())
        assert reroute(graph, matrix).merged
        with torch.no_grad():
            want = expected(module, rows(), matrix, 1)
        torch.testing.assert_close(run(graph, rows()), want, rtol=1e-5, atol=1e-5)

    def test_the_other_way_is_wrong(self, tracer):
        """Treated as one that sums, the operator loses slots."""
        module, matrix = Opaque(), similarity()
        graph = TRACERS[tracer](module, rows())
        gate = one_gate(graph)
        uses = tuple(dataclasses.replace(use, kind=UseKind.GROUPED) for use in gate.uses)
        reroute(graph, matrix, gate=dataclasses.replace(gate, uses=uses))
        with torch.no_grad():
            want = expected(module, rows(), matrix, 1)
        assert not torch.allclose(run(graph, rows()), want, atol=1e-3)


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("module", DUPLICATE_UNSAFE, ids=lambda module: module.__name__)
def test_unsafe_dispatch_the_other_way_is_wrong(module, tracer):
    """Re-routed as one that sums duplicates, every dispatch that does not gives another result than SERE defines."""
    block, matrix = module(), similarity()
    graph = TRACERS[tracer](block, rows())
    gate = one_gate(graph)
    uses = tuple(dataclasses.replace(use, kind=UseKind.GROUPED) for use in gate.uses)
    reroute(graph, matrix, gate=dataclasses.replace(gate, uses=uses))
    with torch.no_grad():
        want = expected(block, rows(), matrix, 1)
    assert not torch.allclose(run(graph, rows()), want, atol=1e-3)


class SplitByCounts(Block):
    """As JetMoE: rows sorted by expert are split by counts of a [T, E] table, where a duplicate counts once."""

    def dispatch(self, x, ids, weights):
        sizes = torch.zeros(x.shape[0], self.num_experts).scatter(1, ids, 1).long().sum(0).tolist()
        order = ids.flatten().sort(0)[1]
        token = order.div(self.top_k, rounding_mode="trunc")
        parts = x[token].split(sizes, dim=0)
        y = torch.cat([torch.tanh(part @ self.experts[number]) for number, part in enumerate(parts)])
        return torch.zeros_like(x).index_add(0, token, y * weights.flatten()[order, None])


class TestSplitByCounts:
    """Counts of a table become the sizes of a split: experts are seen behind them, however many there are."""

    @pytest.mark.parametrize("experts", [EXPERTS, 64])
    def test_merged(self, experts):
        block, matrix = SplitByCounts(experts), similarity(experts)
        graph = from_export(block, rows())
        assert reroute(graph, matrix).merged
        with torch.no_grad():
            want = expected(block, rows(), matrix, 1)
            assert not torch.allclose(block(rows()), want, atol=1e-2), "the case re-routes nothing"
        torch.testing.assert_close(run(graph, rows()), want, rtol=1e-5, atol=1e-5)

    def test_the_other_way_raises(self):
        """Not merged, the counts no longer sum to the rows."""
        graph = from_export(SplitByCounts(), rows())
        gate = one_gate(graph)
        uses = tuple(dataclasses.replace(use, kind=UseKind.GROUPED) for use in gate.uses)
        reroute(graph, gate=dataclasses.replace(gate, uses=uses))
        with pytest.raises(RuntimeError):
            run(graph, rows())


class Alone(Block):
    """No experts: ids that are only returned, or only looked up."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        scores = self.scores(x)
        ids = scores.topk(TOP_K)[1]
        return self.function(scores, ids)


@pytest.mark.parametrize(
    "function",
    [
        lambda s, ids: ids,
        lambda s, ids: torch.where((ids == 1).any(-1, keepdim=True), s, 0.0),
        lambda s, ids: F.one_hot(ids, EXPERTS).sum(1).float() @ s.T,
    ],
    ids=["returned", "masked", "multiplied"],
)
def test_a_dispatch_that_reaches_no_experts_is_no_evidence(function):
    """Neither that it dispatches nor that something reaches experts is enough: it has to be the same use."""
    graph = from_make_fx(Alone(function), rows())
    assert find_gates(graph).gates == ()
    [skip] = find_gates(graph).skips
    assert skip.reason is SkipReason.NO_DISPATCH


class CountedRouter(nn.Module):
    """A router whose ids leave, and that counts them in a buffer."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.register_buffer("load", torch.zeros(EXPERTS, dtype=torch.int64))

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        self.load.add_(F.one_hot(ids, EXPERTS).sum((0, 1)))
        return weights, ids


def test_counts_for_a_buffer_beside_ids_that_leave():
    """They stay what the router chose; what leaves is the dispatch."""
    graph = from_dynamo(CountedRouter(), rows())
    [gate] = find_gates(graph, lambda router, columns: columns).gates
    found = {(nodes.kind(use.consumer), use.kind) for use in gate.uses}
    assert found == {("one_hot", UseKind.STATISTIC), ("output", UseKind.LEAVES)}


WIDTH = 5


class Classified(Written):
    """A router by hand whose ids have readers, and what is made of each."""

    def __init__(self, experts=True):
        super().__init__()
        self.x = self.given(8, WIDTH)
        self.stack = self.weight(EXPERTS, WIDTH, WIDTH)
        self.scale, self.vectors = self.weight(EXPERTS), self.weight(EXPERTS, WIDTH)
        self.matrices = self.weight(EXPERTS + 1, 2, 2)
        self.loads = self.input(torch.zeros(EXPERTS))
        self.projection = self.call(F.linear, self.x, self.weight(EXPERTS, WIDTH))
        self.scores = self.call(torch.softmax, self.projection, -1)
        best = self.call(torch.topk, self.scores, TOP_K)
        self.values, self.ids = self.pick(best, 0), self.pick(best, 1)
        if experts:
            rows = self.call("view", self.x, 8, 1, 1, WIDTH)
            self.dispatch = self.call(torch.matmul, rows, self.pick(self.stack, self.ids))

    def flat(self):
        """[T * K]."""
        return self.call("view", self.ids, -1)

    def mask(self):
        """[T, K, E]."""
        return self.call(F.one_hot, self.ids, EXPERTS)

    def table(self):
        """[T, E]."""
        return self.call(torch.scatter, self.call(torch.zeros_like, self.scores), 1, self.ids, 1.0)

    def uses(self, *results, columns=EXPERTS, experts=EXPERTS, **changes):
        """All uses, with the graph's results."""
        self.give(self.values, *results)
        [selection] = find_selections(self.graph)
        selection = dataclasses.replace(selection, **changes)
        return classify_uses(selection, self.projection, experts, columns, Leaving(self.graph))

    def kinds(self, *results, **options):
        """Kinds by the operation that consumes the ids, without the dispatch to experts."""
        found = [use for use in self.uses(*results, **options).all if use.consumer.args[0] is not self.stack]
        return {nodes.kind(use.consumer): use.kind for use in found}


# What is done with the ids beside a dispatch: the operation, and the kind of its use.
BESIDE = {
    "a look-up": (lambda w: w.call(torch.gather, w.scores, 1, w.ids), "gather", UseKind.LOOK_UP),
    "a look-up from behind": (lambda w: w.call(torch.gather, w.scores, -1, w.ids), "gather", UseKind.LOOK_UP),
    "a look-up along": (lambda w: w.call(torch.take_along_dim, w.scores, w.ids, 1), "take_along_dim", UseKind.LOOK_UP),
    "a look-up by rows": (
        lambda w: w.pick(w.scores, (w.input(torch.arange(8).view(8, 1)), w.ids)),
        "index",
        UseKind.LOOK_UP,
    ),
    "rows by ids": (lambda w: w.pick(w.scores, (w.ids, w.input(torch.zeros(8, 1).long()))), "index", UseKind.UNKNOWN),
    "a look-up in raw logits": (lambda w: w.call(torch.gather, w.projection, 1, w.ids), "gather", UseKind.LOOK_UP),
    "a look-up of another tensor": (
        lambda w: w.call(torch.gather, w.call(torch.exp, w.given(8, EXPERTS)), 1, w.ids),
        "gather",
        UseKind.UNKNOWN,
    ),
    "a look-up over tokens": (lambda w: w.call(torch.gather, w.scores, 0, w.ids), "gather", UseKind.UNKNOWN),
    "ids that are looked up": (
        lambda w: w.call(torch.gather, w.ids, 1, w.input(torch.zeros(8, 1).long())),
        "gather",
        UseKind.UNKNOWN,
    ),
    "a number per expert": (lambda w: w.pick(w.scale, w.ids), "index", UseKind.LOOK_UP),
    "a number per expert that scales outputs": (
        lambda w: w.mul(w.column(w.pick(w.scale, w.ids)), w.given(8, TOP_K, 2)),
        "index",
        UseKind.EXPERT_INDEX,
    ),
    "a vector per expert": (lambda w: w.pick(w.vectors, w.ids), "index", UseKind.EXPERT_INDEX),
    "an embedding": (lambda w: w.call(F.embedding, w.ids, w.vectors), "embedding", UseKind.EXPERT_INDEX),
    "a table that is computed": (lambda w: w.pick(w.call(torch.exp, w.scale), w.ids), "index", UseKind.UNKNOWN),
    "two indices": (lambda w: w.pick(w.weight(EXPERTS, EXPERTS), (w.ids, w.ids)), "index", UseKind.UNKNOWN),
    "a comparison with E": (lambda w: w.call(torch.ge, w.ids, EXPERTS), "ge", UseKind.LOOK_UP),
    "a comparison": (lambda w: w.call(torch.ge, w.ids, 3), "ge", UseKind.UNKNOWN),
    "an unsafe sort": (
        lambda w: w.call(torch.add, w.pick(w.call(torch.sort, w.flat()), 1), 1),
        "sort",
        UseKind.UNKNOWN,
    ),
    "a safe sort": (
        lambda w: w.pick(w.given(24, 2), w.call(torch.argsort, w.flat())),
        "argsort",
        UseKind.GROUPED,
    ),
    "a count": (lambda w: w.call(torch.bincount, w.flat()), "bincount", UseKind.STATISTIC),
    "a count that reaches experts": (
        lambda w: w.mul(w.call("view", w.call(torch.bincount, w.flat(), minlength=8), 8, 1, 1), w.stack),
        "bincount",
        UseKind.GROUPED,
    ),
    "a load": (lambda w: w.call(torch.sum, w.mask(), (0, 1)), "one_hot", UseKind.STATISTIC),
    "a load of tokens": (lambda w: w.call(torch.sum, w.call("float", w.mask()), 0), "one_hot", UseKind.STATISTIC),
    "a load by name": (lambda w: w.call(torch.mean, w.table(), dim=0), "scatter", UseKind.STATISTIC),
    "a load in all": (lambda w: w.call(torch.sum, w.table()), "scatter", UseKind.STATISTIC),
    "a load of no dimensions": (lambda w: w.call(torch.sum, w.table(), []), "scatter", UseKind.STATISTIC),
    "a load of a mean by token": (
        lambda w: w.call(torch.mean, w.call("float", w.call(torch.sum, w.mask(), 1)), 0),
        "one_hot",
        UseKind.STATISTIC,
    ),
    "a load that keeps its rows": (lambda w: w.call(torch.sum, w.table(), 0, True), "scatter", UseKind.UNKNOWN),
    "a load that meets tokens": (lambda w: w.mul(w.call("sum", w.table(), 0), w.scores), "scatter", UseKind.UNKNOWN),
    "a load that meets a load": (
        lambda w: w.mul(w.call(torch.sum, w.table(), 0), w.call(torch.mean, w.scores, 0)),
        "scatter",
        UseKind.STATISTIC,
    ),
    "a mask": (lambda w: w.mask(), "one_hot", UseKind.UNKNOWN),
    "a mask that meets tokens": (lambda w: w.call(torch.sum, w.mul(w.table(), w.scores)), "scatter", UseKind.UNKNOWN),
    "a mask that is bent": (lambda w: w.call(torch.sum, w.call(torch.exp, w.table())), "scatter", UseKind.UNKNOWN),
    "a mask that is clamped": (
        lambda w: w.call(torch.sum, w.call(torch.clamp, w.table(), 0), 0),
        "scatter",
        UseKind.STATISTIC,
    ),
    "ids": (lambda w: w.ids, "output", UseKind.LEAVES),
    "a sum of ids": (lambda w: w.call(torch.sum, w.ids), "sum", UseKind.UNKNOWN),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_beside_experts(name):
    write, operation, kind = BESIDE[name]
    w = Classified()
    assert w.kinds(write(w), w.dispatch)[operation] is kind


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (lambda w: w.call(torch.bincount, w.flat()), UseKind.LEAVES),
        (lambda w: w.call(torch.sum, w.call(torch.bincount, w.flat())), UseKind.LEAVES),
        (lambda w: w.call(torch.mean, w.call(torch.histc, w.call("float", w.ids), EXPERTS)), UseKind.STATISTIC),
        (lambda w: w.call("add_", w.loads, w.call(torch.histc, w.call("float", w.ids), EXPERTS)), UseKind.STATISTIC),
        (lambda w: w.call("neg", w.call(torch.histc, w.call("float", w.ids), EXPERTS)), UseKind.LEAVES),
        (lambda w: w.call(torch.argsort, w.flat()), UseKind.LEAVES),
    ],
    ids=["counts", "a whole number", "a loss", "a buffer", "other numbers", "an order"],
)
def test_in_a_graph_without_experts(write, kind):
    """What leaves beside ids that leave may split rows outside; a loss and a buffer split nothing."""
    w = Classified(experts=False)
    found = w.uses(write(w), w.ids)
    kinds = {nodes.kind(use.consumer): use.kind for use in found.all}
    assert kinds.pop("output") is UseKind.LEAVES
    assert list(kinds.values()) == [kind]
    assert not found.reach


def test_a_look_up_of_batched_scores():
    """By all of its places; the ids have to be those of the experts."""
    for last, kind in ((True, UseKind.LOOK_UP), (False, UseKind.UNKNOWN)):
        w = Classified(experts=False)
        w.x = w.given(2, 4, WIDTH)
        w.projection = w.call(F.linear, w.x, w.weight(EXPERTS, WIDTH))
        w.scores = w.call(torch.softmax, w.projection, -1)
        w.ids = w.pick(w.call(torch.topk, w.scores, TOP_K), 1)
        rows, columns = (w.input(torch.zeros(2, 4, 1).long()) for _ in range(2))
        w.pick(w.scores, (rows, columns, w.ids) if last else (rows, w.call("clamp", w.ids, 0, 0), columns))
        w.give(w.call(torch.neg, w.values))
        selection = find_selections(w.graph)[-1]
        uses = classify_uses(selection, w.projection, EXPERTS, EXPERTS, Leaving(w.graph))
        assert [use.kind for use in uses.all] == [kind]


def test_a_number_per_expert_is_no_expert():
    """Counts beside it may still split rows outside."""
    w = Classified(experts=False)
    kinds = w.kinds(w.pick(w.scale, w.ids), w.call(torch.bincount, w.flat()), w.ids)
    assert (kinds["index"], kinds["bincount"]) == (UseKind.LOOK_UP, UseKind.LEAVES)


class TestWhatIsSaidOfAll:
    def test_experts_behind_a_dispatch(self):
        w = Classified()
        assert w.uses(w.dispatch).reach
        w = Classified()
        assert not w.uses(w.dispatch, experts=EXPERTS + 1, columns=EXPERTS + 1).reach
        w = Classified(experts=False)
        assert not w.uses(w.pick(w.vectors, w.ids)).reach
        w = Classified(experts=False)
        weights = w.pick(w.matrices, w.ids)
        assert not w.uses(w.call(torch.matmul, w.given(2, 2), weights)).reach
        w = Classified(experts=False)
        assert not w.uses(w.call(torch.add, w.pick(w.stack, w.ids), 1)).reach

    def test_numbers_that_comparisons_name(self):
        w = Classified()
        limits = [w.call(torch.lt, w.ids, 6), w.call(torch.clamp, w.ids, 0, 4)]
        found = w.uses(*limits, w.dispatch)
        assert found.compared_with == {6}
        assert found.entangled is None

    def test_a_loop_over_experts(self):
        """It reaches them where all have a number and a layer, of as many scores as there are experts."""
        for columns, reach in ((EXPERTS, True), (EXPERTS + 1, False)):
            w = Classified(experts=False)
            outputs = [
                w.mul(
                    w.call("any", w.call(torch.eq, w.ids, number), -1, True),
                    w.call(F.linear, w.x, w.weight(WIDTH, WIDTH)),
                )
                for number in range(EXPERTS)
            ]
            assert w.uses(*outputs, columns=columns).reach is reach

    def test_sizes_of_a_load(self):
        w = Classified()
        w.give(w.dispatch)
        [selection] = find_selections(w.graph)
        assert load_sizes(selection) == {1, EXPERTS, EXPERTS * TOP_K}


@pytest.mark.parametrize(
    ("name", "stored", "kind", "reach"),
    [
        ("mxfp_dynamic_matmul_batched", EXPERTS, UseKind.EXPERT_INDEX, True),
        ("mxfp_dynamic_matmul_batched", EXPERTS + 1, UseKind.EXPERT_INDEX, False),
        ("of_whatever_matmul_batched", EXPERTS, UseKind.UNKNOWN, True),
    ],
)
def test_a_product_by_ids(name, stored, kind, reach):
    """It reads one matrix of each expert; other tables are none of theirs, and other operators may do anything."""
    with torch.library._scoped_library("_finegrained_fp8_c0ffee2", "DEF") as library:
        library.define(f"{name}(Tensor A, Tensor B, Tensor Bs, Tensor expert_ids) -> Tensor")
        library.impl(name, lambda a, b, scales, ids: a.clone(), "CompositeExplicitAutograd")
        w = Classified(experts=False)
        product = getattr(torch.ops._finegrained_fp8_c0ffee2, name).default
        made = w.call(product, w.x, w.weight(stored, WIDTH, WIDTH), w.weight(stored), w.flat())
        found = w.uses(made)
        assert [use.kind for use in found.all] == [kind]
        assert bool(found.reach) is reach


@pytest.mark.parametrize(("stored", "reach"), [(EXPERTS, True), (EXPERTS + 1, False)])
def test_our_own_experts(stored, reach):
    w = Classified(experts=False)
    stacks = w.weight(stored, 2 * WIDTH, WIDTH), w.weight(stored, WIDTH, WIDTH)
    weights = w.input(torch.zeros(8, TOP_K))
    made = w.call(torch.ops.sere.expert_mlp.default, w.x, w.ids, weights, *stacks)
    found = w.uses(made)
    assert [use.kind for use in found.all] == [UseKind.EXPERT_INDEX]
    assert bool(found.reach) is reach


class TestBeforeIdsAreComplete:
    """Readers of whole ids where a dispatch reads their first columns."""

    def narrowed(self, read):
        w = Classified(experts=False)
        best = w.call(torch.topk, w.scores, TOP_K + 1)
        whole = w.pick(best, 1)
        ids = w.pick(whole, (slice(None), slice(0, TOP_K)))
        extra = read(w, whole)
        y = w.call(torch.matmul, w.call("view", w.x, 8, 1, 1, WIDTH), w.pick(w.stack, ids))
        w.give(y, *([] if extra is None else [extra]))
        selection = next(s for s in find_selections(w.graph) if (s.top_k == TOP_K and s.unnarrowed) or s.top_k > TOP_K)
        selection = dataclasses.replace(selection, ids=(ids,), unnarrowed=(whole,))
        return classify_uses(selection, w.projection, EXPERTS, EXPERTS, Leaving(w.graph))

    def test_nobody_reads_them(self):
        found = self.narrowed(lambda w, whole: None)
        assert [use.kind for use in found.all] == [UseKind.EXPERT_INDEX]
        assert found.entangled is None

    def test_a_look_up(self):
        found = self.narrowed(lambda w, whole: w.call(torch.gather, w.scores, 1, whole))
        assert [use.kind for use in found.all] == [UseKind.EXPERT_INDEX, UseKind.LOOK_UP]
        assert found.entangled is None

    def test_a_mask_of_scores(self):
        """It ranks, and what is selected from it is another selection's."""

        def masked(w, whole):
            rest = w.call(torch.scatter, w.scores, 1, whole, -1.0)
            return w.pick(w.call(torch.topk, w.call(torch.exp, rest), 2), 0)

        found = self.narrowed(masked)
        assert [use.kind for use in found.all] == [UseKind.EXPERT_INDEX, UseKind.RANKING]
        assert found.entangled is None

    @pytest.mark.parametrize(
        "read",
        [
            lambda w, whole: w.pick(w.stack, whole),
            lambda w, whole: w.call(torch.sum, w.call(torch.scatter, w.scores, 1, whole, -1.0), 1),
            lambda w, whole: w.call(torch.add, whole, 1),
        ],
        ids=["experts", "a sum of masked scores", "numbers"],
    )
    def test_a_dispatch_by_them(self, read):
        found = self.narrowed(read)
        assert found.entangled is not None
        assert found.entangled in [use.consumer for use in found.all if use.kind is UseKind.RANKING]
