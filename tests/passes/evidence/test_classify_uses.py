"""`classify_uses`: what each consumer of the ids does, and whether it reaches experts."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.passes import SkipReason, UseKind, find_gates
from sere_compile.passes.graph import nodes

from ..moe_modules import (
    DUPLICATE_UNSAFE,
    EXPERTS,
    HIDDEN,
    TOP_K,
    TRACERS,
    Block,
    ColumnLoop,
    ExpertLoop,
    Grouped,
    Indexed,
    expected,
    from_dynamo,
    from_export,
    one_gate,
    reroute,
    rows,
    run,
    similarity,
)


class Used(Indexed):
    """`Indexed` whose ids also go through a function of (block, x, ids, scores); its result is returned as well."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.rand(EXPERTS))
        self.other = nn.Parameter(torch.rand(EXPERTS))
        self.expert_bias = nn.Parameter(torch.rand(EXPERTS, HIDDEN))
        self.register_buffer("load", torch.zeros(EXPERTS, dtype=torch.int64))
        self.register_buffer("packed", torch.randint(-9, 9, (EXPERTS, HIDDEN, 4), dtype=torch.int8))
        self.register_buffer("zero", torch.randint(-9, 9, (EXPERTS,), dtype=torch.int8))

    def forward(self, x):
        scores = self.scores(x)
        values, ids = torch.topk(scores, self.top_k, dim=-1)
        return self.dispatch(x, ids, values), self.function(self, x, ids, scores)


def kinds(module, trace=from_export):
    """{kind of operation: kind of use} over all uses of the only gate's ids."""
    return {nodes.kind(use.consumer): use.kind for use in one_gate(trace(module, rows())).uses}


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
    "unsafe sort": (lambda b, x, ids, s: ids.flatten().sort()[0] + 1, "sort", UseKind.UNKNOWN),
}

# name -> (the same, kind of the uses that look numbers up)
SCALES = {
    "returned": (lambda b, x, ids, s: b.scale[ids], UseKind.LOOK_UP),
    "of routing weights": (
        lambda b, x, ids, s: ((s.gather(1, ids) * b.scale[ids]).unsqueeze(-1) * b.expert_bias[ids]).sum(1),
        UseKind.LOOK_UP,
    ),
    "of rows of routing weights": (
        lambda b, x, ids, s: b.scale[ids.flatten()].unsqueeze(-1) * s.gather(1, ids).reshape(-1, 1),
        UseKind.LOOK_UP,
    ),
    "of outputs": (
        lambda b, x, ids, s: b.expert_bias[ids.flatten()] * b.scale[ids.flatten()][:, None],
        UseKind.EXPERT_INDEX,
    ),
    "of outputs, with a constant and another": (
        lambda b, x, ids, s: b.expert_bias[ids] * (b.scale[ids] * 2 * b.other[ids]).unsqueeze(-1),
        UseKind.EXPERT_INDEX,
    ),
    "a zero point": (
        lambda b, x, ids, s: (b.packed[ids.flatten()] - b.zero[ids.flatten()].view(-1, 1, 1)).float().sum(),
        UseKind.EXPERT_INDEX,
    ),
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

    @pytest.mark.parametrize("tracer", ["dynamo", "export"])
    @pytest.mark.parametrize("name", SCALES)
    def test_a_number_an_expert(self, name, tracer):
        """It goes with the expert where it meets the expert's weights or outputs, with the original ids elsewhere."""
        function, kind = SCALES[name]
        gate = one_gate(TRACERS[tracer](Used(function), rows()))
        tables = [use.kind for use in gate.uses if len(nodes.shape(nodes.operand(use.consumer))) == 1]
        assert tables
        assert set(tables) == {kind}

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
        for use in gate.uses:
            assert use.read in use.consumer.all_input_nodes

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


class Sorted(Block):
    """Slots in the order of their experts; `combine` says how rows get back to their tokens."""

    def __init__(self, combine):
        super().__init__()
        self.combine = combine

    def dispatch(self, x, ids, weights):
        flat, order = torch.sort(ids.view(-1))
        y = torch.bmm(torch.tanh(x[order // self.top_k])[:, None], self.experts[flat]).squeeze(1)
        return self.combine(self, x, order, y * weights.view(-1)[order][:, None])


def inverse_by_write(b, x, order, y):
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return y[inverse].view(-1, TOP_K, HIDDEN).sum(1)


SAFE = {
    "index_add by token": lambda b, x, order, y: torch.zeros_like(x).index_add(0, order // TOP_K, y),
    "index_put accumulating": lambda b, x, order, y: torch.zeros_like(x).index_put((order // TOP_K,), y, True),
    "inverse by argsort": lambda b, x, order, y: y[order.argsort()].view(-1, TOP_K, HIDDEN).sum(1),
    "inverse by write": inverse_by_write,
    "write by slot": lambda b, x, order, y: torch.zeros_like(y).index_copy(0, order, y).view(-1, TOP_K, HIDDEN).sum(1),
    "scatter_add": lambda b, x, order, y: torch.zeros_like(x).scatter_add(
        0, (order // TOP_K)[:, None].expand(-1, HIDDEN), y
    ),
}
UNSAFE = {
    "write by token": lambda b, x, order, y: torch.zeros_like(x).index_put((order // TOP_K,), y),
    "scatter by token": lambda b, x, order, y: torch.zeros_like(x).scatter(
        0, (order // TOP_K)[:, None].expand(-1, HIDDEN), y
    ),
    "compared tokens": lambda b, x, order, y: ((order // TOP_K)[:, None] == torch.arange(x.shape[0])).float().T @ y,
    "inverse used for more": lambda b, x, order, y: y[order.argsort() % 5],
    "order as data": lambda b, x, order, y: x + (order * 1.0).sum(),
}


class Sentinels(Sorted):
    """What is not a number of an expert is told by `compare`, and clamped, in place or not."""

    def __init__(self, compare, in_place):
        super().__init__(SAFE["inverse by write"])
        self.compare, self.in_place = compare, in_place

    def dispatch(self, x, ids, weights):
        flat, order = torch.sort(ids.view(-1))
        sentinel = self.compare(flat)[:, None]
        flat = flat.clamp_(max=EXPERTS - 1) if self.in_place else flat.clamp(max=EXPERTS - 1)
        y = torch.bmm(torch.tanh(x[order // self.top_k])[:, None], self.experts[flat]).squeeze(1)
        return self.combine(self, x, order, (y * weights.view(-1)[order][:, None]).masked_fill(sentinel, 0.0))


@pytest.mark.parametrize("tracer", ["dynamo", "export"])
class TestSortedSlots:
    @pytest.mark.parametrize("in_place", [True, False])
    def test_sentinels(self, in_place, tracer):
        """Rows of no expert, as transformers 5.17 masks them, are told by what no expert's number answers otherwise."""
        gate = one_gate(TRACERS[tracer](Sentinels(lambda flat: flat >= EXPERTS, in_place), rows()))
        assert {use.kind for use in gate.uses} == {UseKind.GROUPED}
        gate = one_gate(TRACERS[tracer](Sentinels(lambda flat: flat >= EXPERTS - 1, in_place), rows()))
        assert {use.kind for use in gate.uses} == {UseKind.UNKNOWN}

    @pytest.mark.parametrize("name", SAFE)
    def test_safe(self, name, tracer):
        """Ways to bring sorted rows back that treat each slot on its own."""
        gate = one_gate(TRACERS[tracer](Sorted(SAFE[name]), rows()))
        assert {use.kind for use in gate.uses} == {UseKind.GROUPED}

    @pytest.mark.parametrize("name", UNSAFE)
    def test_unsafe(self, name, tracer):
        """What could depend on two slots at once is not taken for safe."""
        gate = one_gate(TRACERS[tracer](Sorted(UNSAFE[name]), rows()))
        assert {use.kind for use in gate.uses} == {UseKind.UNKNOWN}


class HalfLoop(ExpertLoop):
    """Asks for seven of eight experts."""

    def dispatch(self, x, ids, weights):
        y = torch.zeros_like(x)
        for number in range(self.num_experts - 1):
            y = y + (weights * (ids == number)).sum(-1, keepdim=True) * self.expert(number, x)
        return y


class OneHotLoop(ExpertLoop):
    """The one-hot mask that Hugging Face's old expert loops made, a row for each expert."""

    def dispatch(self, x, ids, weights):
        mask = F.one_hot(ids, self.num_experts).permute(2, 0, 1)
        y = torch.zeros_like(x)
        for number in range(self.num_experts):
            y = y + (weights * mask[number]).sum(-1, keepdim=True) * self.expert(number, x)
        return y


class TestExpertModules:
    """Experts that are modules of their own leave no stacked weight in the graph."""

    @pytest.mark.parametrize("tracer", TRACERS)
    @pytest.mark.parametrize("module", [ExpertLoop, ColumnLoop], ids=lambda module: module.__name__)
    def test_every_number_asked_for(self, module, tracer):
        """Comparing with, or taking the column of, each number 0 .. E-1 is evidence of experts."""
        assert one_gate(TRACERS[tracer](module(), rows())).num_experts == EXPERTS

    @pytest.mark.parametrize("trace", [from_dynamo, from_export])
    def test_one_hot_rows(self, trace):
        """So are the rows of a one-hot mask."""
        assert one_gate(trace(OneHotLoop(), rows())).needs_merge

    @pytest.mark.parametrize("tracer", TRACERS)
    def test_some_numbers_asked_for(self, tracer):
        """Seven of eight numbers are none."""
        [skip] = find_gates(TRACERS[tracer](HalfLoop(), rows())).skips
        assert skip.reason is SkipReason.NO_DISPATCH
        assert skip.detail == "ids are used by eq: leaves the graph"


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
