"""`find_gates`: what is a gate, what is none, and the reason that each refusal gives."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

from sere_compile.passes import Evidence, RoutingSettings, SkipReason, UseKind, find_gates, reroute_dispatch
from sere_compile.passes.graph import nodes

from .graph.written import Written
from .moe_modules import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    TRACERS,
    BiasCorrected,
    Block,
    Grouped,
    Indexed,
    add_matrix,
    from_dynamo,
    from_export,
    one_gate,
    reroute,
    rows,
    similarity,
)


class Routed(Indexed):
    """`Indexed` with its own way to (ids, weights), given as a function of (block, x)."""

    def __init__(self, function, **sizes):
        super().__init__(**sizes)
        self.function = function
        self.other = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.bias = nn.Parameter(torch.randn(EXPERTS))

    def route(self, x):
        return self.function(self, x)


class Function(Block):
    """Any function of (block, x) over the block's weights."""

    def __init__(self, function, **sizes):
        super().__init__(**sizes)
        self.function = function
        self.labels = nn.Embedding(EXPERTS, HIDDEN)

    def forward(self, x):
        return self.function(self, x)


def pick(scores, **options):
    values, ids = torch.topk(scores, TOP_K, **options)
    return ids, values


def one_skip(module, trace=from_export, **options):
    """The only selection of a module that has no gate, and its graph."""
    graph = trace(module, rows(), **options)
    found = find_gates(graph)
    assert found.gates == ()
    assert len(found.skips) == 1
    return found.skips[0], graph


SCORINGS = {
    "raw logits": lambda b, x: pick(F.linear(x, b.router)),
    "softmax": lambda b, x: pick(F.linear(x, b.router).softmax(-1)),
    "sigmoid": lambda b, x: pick(F.linear(x, b.router).sigmoid()),
    "softplus + sqrt": lambda b, x: pick(F.softplus(F.linear(x, b.router)).sqrt()),
    "log_softmax": lambda b, x: pick(F.log_softmax(F.linear(x, b.router), -1)),
    "tanh": lambda b, x: pick(torch.tanh(F.linear(x, b.router)) * 30),
    "relu": lambda b, x: pick(F.relu(F.linear(x, b.router))),
    "layer_norm + softmax": lambda b, x: pick(F.layer_norm(F.linear(x, b.router), (EXPERTS,)).softmax(-1)),
}
PROJECTIONS = {
    "linear with bias": lambda b, x: F.linear(x, b.router, b.bias),
    "matmul with T": lambda b, x: x @ b.router.T,
    "matmul with t()": lambda b, x: torch.mm(x, b.router.t()),
    "in float32": lambda b, x: F.linear(x.float(), b.router.float()),
    "einsum": lambda b, x: torch.einsum("th,eh->te", x, b.router),
    "addmm": lambda b, x: torch.addmm(b.bias, x, b.router.t()),
    "cosine": lambda b, x: F.linear(F.normalize(x, dim=-1), F.normalize(b.router, dim=-1)),
    "scaled weight": lambda b, x: F.linear(x, b.router * 0.5),
}


class TestGates:
    @pytest.mark.parametrize("tracer", TRACERS)
    @pytest.mark.parametrize("scoring", SCORINGS)
    def test_scoring_is_named(self, scoring, tracer):
        """The report names the functions between projection and selection, in their order."""
        gate = one_gate(TRACERS[tracer](Routed(SCORINGS[scoring]), rows()))
        assert gate.scoring == scoring
        assert (gate.num_experts, gate.top_k, gate.is_sorted) == (EXPERTS, TOP_K, True)

    @pytest.mark.parametrize("tracer", TRACERS)
    @pytest.mark.parametrize("projection", PROJECTIONS)
    def test_projections(self, projection, tracer):
        """Every way to write the projection leads to the router's weight."""
        function = PROJECTIONS[projection]
        gate = one_gate(TRACERS[tracer](Routed(lambda b, x: pick(function(b, x))), rows()))
        assert nodes.shape(gate.router_weight) == (EXPERTS, HIDDEN)
        assert nodes.is_model_state(gate.router_weight)

    @pytest.mark.parametrize("tracer", TRACERS)
    def test_bias_corrected_selection(self, tracer):
        """Scores may be biased, masked and selected unsorted; the router is still the projection's weight."""
        gate = one_gate(TRACERS[tracer](BiasCorrected(), rows()))
        assert (gate.scoring, gate.is_sorted, gate.values) == ("sigmoid", False, None)
        assert nodes.shape(gate.router_weight) == (EXPERTS, HIDDEN)

    def test_group_limited_selection(self):
        """DeepSeek-V3: only the last of three selections is the gate, the group selections say why not."""

        def function(b, x, groups=4):
            scores = F.linear(x, b.router).sigmoid()
            group_scores = (scores + b.bias).view(-1, groups, EXPERTS // groups).topk(2, dim=-1)[0].sum(-1)
            group_ids = group_scores.topk(2, dim=-1, sorted=False)[1]
            mask = torch.zeros_like(group_scores).scatter(1, group_ids, 1.0)
            mask = mask[..., None].expand(-1, groups, EXPERTS // groups).reshape(-1, EXPERTS)
            ids = (scores + b.bias).masked_fill(mask == 0, -math.inf).topk(TOP_K, sorted=False)[1]
            return ids, scores.gather(1, ids)

        found = find_gates(from_export(Routed(function), rows()))
        assert len(found.gates) == 1
        assert [skip.reason for skip in found.skips] == [SkipReason.ROUTER_SIZE, SkipReason.NO_ROUTER]

    def test_single_group(self):
        """With one group the group selection runs over all experts too; nobody reads its ids."""

        def function(b, x):
            scores = F.linear(x, b.router).sigmoid()
            best = scores.view(-1, 1, EXPERTS).topk(2, dim=-1)[0].sum(-1)
            ids, values = pick(scores * (best > 0))
            return ids, values

        found = find_gates(from_export(Routed(function), rows()))
        assert len(found.gates) == 1
        assert [skip.reason for skip in found.skips] == [SkipReason.NO_IDS]

    def test_two_gates_in_graph_order(self):
        """Each layer's gate is found with its own weight."""

        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = Indexed(), Indexed()

            def forward(self, x):
                return self.second(x + self.first(x))

        found = find_gates(from_export(Two(), rows()))
        assert [str(gate.router_weight.target) for gate in found.gates] == ["first.router", "second.router"]

    def test_symbolic_trace_with_recorded_shapes(self):
        """A symbolically traced graph works once ShapeProp has recorded shapes."""
        graph = symbolic_trace(Routed(SCORINGS["softmax"]))
        assert find_gates(graph).skips[0].reason is SkipReason.SIZE_UNKNOWN
        ShapeProp(graph).propagate(rows())
        assert one_gate(graph).num_experts == EXPERTS

    def test_ids_that_leave_need_evidence_from_outside(self):
        """Ids that are returned are a gate's only if the caller knows experts outside the graph."""
        module = Function(lambda b, x: torch.topk(b.scores(x), TOP_K))
        asked = []

        def experts_outside(weight, num_experts):
            asked.append((nodes.shape(weight), num_experts))
            return True

        graph = from_dynamo(module, rows())
        assert find_gates(graph).skips[0].reason is SkipReason.NO_DISPATCH
        found = find_gates(graph, experts_outside)
        assert len(found.gates) == 1
        assert found.gates[0].dispatch == "leaves the graph"
        assert asked == [((EXPERTS, HIDDEN), EXPERTS)]

    @pytest.mark.parametrize("tracer", TRACERS)
    def test_finding_twice_re_routes_once(self, tracer):
        """A gate that is rewritten is reported as such and not found again."""
        graph = TRACERS[tracer](Indexed(), rows())
        done = reroute(graph)
        found = find_gates(graph)
        assert found.gates == ()
        assert [(skip.reason, skip.node) for skip in found.skips] == [(SkipReason.REWRITTEN, done.gate.selection)]
        assert found.skips[0].detail == f"by {done.new_ids.name}"
        assert found.skips[0].evidence is Evidence.REWRITING

    def test_finding_twice_with_merged_slots(self):
        """The same where ids and weights were changed together."""
        from .moe_modules import ScatterCombine

        graph = from_export(ScatterCombine(), rows())
        assert reroute(graph).merged
        assert [skip.reason for skip in find_gates(graph).skips] == [SkipReason.REWRITTEN]

    def test_finding_changes_nothing(self):
        """The search only reads."""
        graph = from_export(BiasCorrected(), rows())
        before = str(graph.graph)
        find_gates(graph)
        assert str(graph.graph) == before


class TestReasons:
    """One test for each `SkipReason` that `find_gates` gives: kind, node, detail."""

    def test_not_last_dim(self):
        """Expert choice: the experts select tokens."""
        skip, _ = one_skip(Function(lambda b, x: torch.topk(b.scores(x), 2, dim=0)))
        assert (skip.reason, nodes.kind(skip.node), skip.detail) == (
            SkipReason.NOT_LAST_DIM,
            "topk",
            "dim 0 of (10, 8)",
        )

    def test_smallest(self):
        """The k smallest distances are no gate."""
        skip, _ = one_skip(Routed(lambda b, x: pick(b.scores(x), largest=False)))
        assert (skip.reason, nodes.kind(skip.node)) == (SkipReason.SMALLEST, "topk")
        assert skip.detail.startswith("topk at moe_modules.py:")

    def test_smallest_of_what_no_weight_projected(self):
        """It is said before that no router was found."""
        skip, _ = one_skip(Function(lambda b, x: torch.topk(x.cumsum(1), 2, largest=False)[1]))
        assert (skip.reason, nodes.kind(skip.node)) == (SkipReason.SMALLEST, "topk")

    def test_size_unknown(self):
        """A selection from a varying number of scores."""
        width = torch.export.Dim("width", min=4)
        module = Function(lambda b, x: torch.topk(x, 3)[1])
        skip, _ = one_skip(module, dynamic_shapes=({1: width},))
        assert (skip.reason, nodes.kind(skip.node)) == (SkipReason.SIZE_UNKNOWN, "topk")
        assert skip.detail.endswith("k 3")

    def test_no_router(self):
        """Scores that no weight projected; the detail names where the search stopped."""
        skip, _ = one_skip(Routed(lambda b, x: pick(torch.cumsum(x @ x[:EXPERTS].T, -1))))
        assert (skip.reason, skip.detail) == (SkipReason.NO_ROUTER, "stopped at cumsum, a cumsum")

    def test_no_router_activations(self):
        """A product of two activations, as in sparse attention, is no projection."""
        skip, _ = one_skip(Routed(lambda b, x: pick((x * 2) @ (x[:EXPERTS] + 1).T)))
        assert skip.reason is SkipReason.NO_ROUTER
        assert skip.detail.endswith("a matmul")

    def test_ambiguous_router(self):
        """Scores summed from two routers; both weights are named."""
        skip, _ = one_skip(Routed(lambda b, x: pick(F.linear(x, b.router) + F.linear(x, b.other))))
        assert skip.reason is SkipReason.AMBIGUOUS_ROUTER
        assert skip.detail in ("other, router", "router, other")

    def test_router_size(self):
        """A selection inside each group of the scores: its indices are no numbers of experts."""
        skip, _ = one_skip(Function(lambda b, x: pick(F.linear(x, b.router).view(-1, 2, 4))))
        assert (skip.reason, skip.detail) == (SkipReason.ROUTER_SIZE, "8 columns, 4 scores")
        assert nodes.kind(skip.node) == "linear"

    def test_no_ids(self):
        """Only the values are used."""
        skip, _ = one_skip(Function(lambda b, x: torch.topk(b.scores(x), TOP_K)[0].sum(-1)))
        assert (skip.reason, nodes.kind(skip.node)) == (SkipReason.NO_IDS, "topk")

    def test_no_dispatch(self):
        """The detail says what the ids were used for instead."""
        skip, _ = one_skip(Function(lambda b, x: b.labels(torch.topk(b.scores(x), 1)[1])))
        assert (skip.reason, nodes.kind(skip.node)) == (SkipReason.NO_DISPATCH, "topk")
        assert skip.detail.startswith("embedding reads ")
        assert skip.detail.endswith(f"which holds no matrix for each of the {EXPERTS} scores")

    @pytest.mark.parametrize(
        "choose",
        [lambda order: order.flip(-1)[:, :TOP_K], lambda order: order[:, -TOP_K:]],
        ids=["flipped", "last columns"],
    )
    def test_ascending(self, choose):
        """The best scores, worst of them first: ranks would be the wrong way round."""

        def function(b, x):
            values, order = torch.sort(b.scores(x), -1)
            return choose(order), choose(values)

        skip, _ = one_skip(Routed(function))
        assert (skip.reason, nodes.kind(skip.node)) == (SkipReason.ASCENDING, "sort")

    def test_reselected(self):
        """A second top-k over the first one's values: merging weights would change its choice."""

        def function(b, x):
            values, ids = torch.topk(b.scores(x), TOP_K + 2)
            best, places = torch.topk(values, TOP_K)
            return ids.gather(1, places), best

        found = find_gates(from_export(Routed(function), rows()))
        [gate] = found.gates
        refused = reroute_dispatch(
            gate, add_matrix(gate.selection.graph.owning_module, similarity()), RoutingSettings(1)
        )
        assert refused.reason is SkipReason.RESELECTED
        assert refused.detail.startswith("topk")

    def test_steps(self):
        """The first choice sends tokens before the second is made: what reads it is named, and experts were seen."""

        def function(b, x):
            scores = b.scores(x)
            first = scores.argmax(-1, keepdim=True)
            second = scores.scatter(-1, first, -math.inf).argmax(-1, keepdim=True)
            ids = torch.cat([first, second], -1)
            both = torch.tanh(x[:, None, None, :] @ b.experts[ids]) * scores.gather(-1, ids)[..., None, None]
            return both.sum(1) + torch.tanh(x[:, None, None, :] @ b.experts[first]).sum(1)

        skip, _ = one_skip(Function(function))
        assert (skip.reason, nodes.kind(skip.node), skip.evidence) == (SkipReason.STEPS, "argmax", Evidence.EXPERTS)
        assert skip.detail.endswith(" reads an incomplete choice")

    def test_fixed_sizes(self):
        """`counts.tolist()` under make_fx is what the counts were in the traced call; the split is named."""

        class Split(Grouped):
            def dispatch(self, x, ids, weights):
                order = ids.reshape(-1).argsort(stable=True)
                counts = torch.zeros(len(x), EXPERTS).scatter(1, ids, 1.0).long().sum(0).tolist()
                parts = x[order // TOP_K].split(counts)
                y = torch.cat([part @ self.experts[number] for number, part in enumerate(parts)])
                return torch.zeros_like(x).index_add(0, order // TOP_K, y * weights.reshape(-1)[order][:, None])

        with torch.no_grad():
            [skip] = find_gates(make_fx(Split())(rows())).skips
        assert skip.reason is SkipReason.FIXED_SIZES
        assert skip.detail.startswith("split_with_sizes")
        # The same rows split where the graph itself says.
        assert one_gate(make_fx(Grouped())(rows())).dispatch == "grouped by expert"

    def test_text(self):
        """A refusal prints its reason and detail."""
        skip, _ = one_skip(Function(lambda b, x: pick(F.linear(x, b.router).view(-1, 2, 4))))
        assert str(skip) == (
            "its projection has more columns than there are scores to select from (8 columns, 4 scores)"
        )

    @pytest.mark.parametrize("trace", [from_dynamo, from_export])
    def test_place(self, trace):
        """The node at fault leads to the user's line."""
        skip, _ = one_skip(Function(lambda b, x: torch.topk(b.scores(x), TOP_K)[0].sum(-1)), trace)
        assert nodes.source_line(skip.node).startswith("test_find_gates.py:")


class TestNearestMiss:
    def test_ranking(self):
        """The refusal that answered most questions with yes comes first, wherever it stands."""

        def function(b, x):
            scores = b.scores(x)
            return (
                torch.topk(x, 2)[1],
                torch.topk(scores, 2, dim=0)[1],
                torch.topk(scores, 2)[1],
                torch.topk(scores, 2)[0],
            )

        found = find_gates(from_export(Function(function), rows()))
        expected = [Evidence.SELECTION, Evidence.NONE, Evidence.IDS, Evidence.ROUTER]
        assert [skip.evidence for skip in found.skips] == expected
        assert found.nearest_miss.reason is SkipReason.NO_DISPATCH
        assert found.nearest_miss is found.skips[2]

    def test_nothing_at_all(self):
        """A graph without any selection has no nearest miss."""
        found = find_gates(from_export(Function(lambda b, x: x + 1), rows()))
        assert (found.gates, found.skips, found.nearest_miss) == ((), (), None)


# Selections that look like a gate from one side.
NEGATIVES = {
    "vocabulary sampling": lambda b, x: torch.topk(F.linear(x, b.router), TOP_K),
    "sampled token": lambda b, x: (lambda v, i: i.gather(1, v.softmax(-1).argmax(-1, keepdim=True)))(
        *torch.topk(F.linear(x, b.router), TOP_K)
    ),
    "label embedding": lambda b, x: b.labels(b.scores(x).topk(1)[1]).sum(1),
    "label row": lambda b, x: b.labels.weight[b.scores(x).topk(1)[1]],
    "auxiliary loss": lambda b, x: (
        torch.histc(b.scores(x).topk(TOP_K)[1].float(), EXPERTS, 0, EXPERTS - 1) @ b.scores(x).mean(0)
    ),
    "expert choice": lambda b, x: torch.bmm(x[b.scores(x).topk(4, dim=0)[1].T], b.experts),
    "expert choice, transposed": lambda b, x: torch.bmm(x[b.scores(x).T.topk(4, dim=-1)[1]], b.experts),
    "kth smallest": lambda b, x: torch.where(b.scores(x) < b.scores(x).topk(2, largest=False)[0][:, 1:], 0.0, 1.0),
    "threshold": lambda b, x: torch.where(b.scores(x) < b.scores(x).topk(2)[0][:, 1:], 0.0, 1.0),
    "codebook": lambda b, x: b.labels(torch.cdist(x, b.labels.weight).argmin(-1)),
    "dense experts": lambda b, x: torch.einsum(
        "te,eth->th",
        torch.zeros(x.shape[0], EXPERTS).scatter(1, *b.route(x)),
        b.all_experts(x.expand(EXPERTS, -1, -1)),
    ),
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("name", NEGATIVES)
def test_negatives(name, tracer):
    """What only looks like a gate is none, under every tracer, and every top-k has a reason."""
    graph = TRACERS[tracer](Function(NEGATIVES[name]), rows())
    found = find_gates(graph)
    assert found.gates == ()
    assert len(found.skips) == sum(nodes.kind(node) == "topk" for node in graph.graph.nodes)


def test_hand_made_graph_without_shapes():
    """A graph without recorded shapes is refused with that reason instead of an error."""
    graph = Graph()
    scores = graph.placeholder("scores")
    graph.output(graph.call_function(torch.topk, (scores, 2)))
    [skip] = find_gates(GraphModule(nn.Module(), graph)).skips
    assert (skip.reason, skip.detail) == (SkipReason.SIZE_UNKNOWN, "scores None, k 2")


class HashRouted(nn.Module):
    """Experts that a table chooses by the number of the token's word; `hidden` is what its rows meet."""

    def __init__(self, dispatches):
        super().__init__()
        self.dispatches = dispatches
        self.register_buffer("table", torch.randint(0, EXPERTS, (11, 2)))
        self.experts = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN))

    def forward(self, x, words):
        ids = self.table[words]
        if not self.dispatches:
            return x, ids + 1
        return torch.einsum("th,tkhd->td", x, self.experts[ids]), ids


@pytest.mark.parametrize("dispatches", [True, False])
def test_hash_routing_is_named(dispatches):
    """Where the ids meet experts; a table of numbers that nothing is looked up by is none."""
    graph = make_fx(HashRouted(dispatches))(rows(), torch.arange(len(rows())) % 11)
    reasons = [(skip.reason, skip.evidence) for skip in find_gates(graph).skips]
    assert reasons == ([(SkipReason.HASH, Evidence.DISPATCH)] if dispatches else [])


def test_the_largest_number_of_experts_that_fits():
    """With more columns than experts: of the numbers that ids are compared with the largest that reaches experts."""
    w = Written()
    x = w.given(4, 6)
    scores = w.call(torch.softmax, w.call(torch.nn.functional.linear, x, w.weight(10, 6)), -1)
    values, ids = w.top_k(scores, 2)
    for limit in (4, 8):
        w.call(torch.ge, ids, limit)
    rows = w.call("view", x, 4, 1, 1, 6)
    clamped = w.call(torch.clamp, ids, 0, 7)
    outputs = [w.call(torch.matmul, rows, w.pick(w.weight(8, 6, 6), clamped))]
    outputs.append(w.call(torch.matmul, rows, w.pick(w.weight(4, 6, 6), w.call(torch.clamp, ids, 0, 3))))
    weighed = [w.mul(w.call("squeeze", y, 2), w.column(values)) for y in outputs]
    w.give(*weighed)
    found = find_gates(torch.fx.GraphModule(torch.nn.Module(), w.graph))
    assert [gate.num_experts for gate in found.gates] == [8], found.skips


@pytest.mark.parametrize("counted", [7, 8])
def test_columns_that_are_all_counted_are_all_experts(counted):
    """Their loads meet a matrix with as many rows as one of the numbers; then their ids leave, to experts elsewhere."""
    w = Model()
    _, ids = w.top_k(w.scores(), 2)
    hits = [w.call(torch.sum, w.call(torch.eq, ids, number)) for number in range(counted)]
    loads = w.call(torch.matmul, w.call("view", w.call("float", hits[0]), 1, 1), w.weight(2, 1, 6))
    found = w.find(loads, ids, outside=lambda weight, experts: True)
    assert [gate.num_experts for gate in found.gates] == [8 if counted == 8 else 2]


class Model(Written):
    """Six features of four tokens, and what a router and experts make of them."""

    def __init__(self):
        super().__init__()
        self.x = self.given(4, 6)

    def scores(self, columns=8, of=None):
        return self.call(torch.softmax, self.call(F.linear, of or self.x, self.weight(columns, 6)), -1)

    def outputs(self, ids, experts=8):
        """What chosen experts give, [4, K, 6]."""
        rows = self.call("view", self.x, 4, 1, 1, 6)
        return self.call("squeeze", self.call(torch.matmul, rows, self.pick(self.weight(experts, 6, 6), ids)), 2)

    def layer(self, columns=8):
        """An ordinary layer: its values, its ids and what it gives."""
        values, ids = self.top_k(self.scores(columns), 2)
        return values, ids, self.call(torch.sum, self.mul(self.outputs(ids, columns), self.column(values)), 1)

    def find(self, *results, outside=lambda weight, experts: 0, **modules):
        """What is found once the graph gives these results."""
        self.give(*results)
        root = nn.Module()
        for name, module in modules.items():
            root.add_module(name, module)
        return find_gates(GraphModule(root, self.graph), outside)


def reasons(found):
    return [skip.reason for skip in found.skips]


class TestByHand:
    def test_an_ordinary_gate(self):
        w = Model()
        values, ids, y = w.layer()
        found = w.find(y)
        [gate] = found.gates
        assert found.skips == ()
        assert (gate.ids, gate.all_ids, gate.values, gate.weights) == (ids, (ids,), values, values)
        assert (gate.num_experts, gate.top_k, gate.form, gate.scoring) == (8, 2, "top-k", "softmax")
        assert (gate.router_input, nodes.shape(gate.router_weight), gate.is_sorted) == (w.x, (8, 6), True)
        assert [use.kind for use in gate.uses] == [UseKind.EXPERT_INDEX]
        assert gate.weights_skip is None
        assert gate.selection is ids.args[0]

    def test_values_that_nobody_reads_are_none(self):
        w = Model()
        scores = w.scores()
        _, ids = w.top_k(scores, 2)
        weights = w.call(torch.gather, scores, 1, ids)
        [gate] = w.find(w.call(torch.sum, w.mul(w.outputs(ids), w.column(weights)), 1)).gates
        assert gate.values is None
        assert gate.weights is weights

    @pytest.mark.parametrize("dispatched", [True, False])
    def test_product_keys(self, dispatched):
        """Both halves and their product say so, also a half that by itself were a gate; no other selection does."""
        w = Model()
        _, _, other = w.layer()
        unread = w.pick(w.call(torch.topk, w.scores(), 2), 0)
        (left, ids), (right, _) = w.top_k(w.scores(), 2), w.top_k(w.scores(), 2)
        sums = w.call(torch.add, w.column(left), w.call(torch.unsqueeze, right, -2))
        best = w.top_k(w.call("view", sums, 4, 4), 2)[1]
        half = w.call(torch.sum, w.mul(w.outputs(ids), w.column(left)), 1) if dispatched else ids
        found = w.find(other, unread, half, best)
        assert len(found.gates) == 1
        assert sorted(reasons(found), key=str) == [SkipReason.NO_IDS] + [SkipReason.PRODUCT_KEYS] * 3
        keys = [skip for skip in found.skips if skip.reason is SkipReason.PRODUCT_KEYS]
        assert {left.args[0], right.args[0]} < {skip.node for skip in keys}
        assert {skip.detail for skip in keys if skip.node is left.args[0]} == {left.args[0].name}
        assert found.gates[0].selection is not left.args[0]

    def test_maxima(self):
        """One of what no weight projected is no selection; one whose choice sends nothing anywhere is told."""
        w = Model()
        plain = w.call(torch.argmax, w.call(torch.exp, w.x), -1)
        chosen = w.call(torch.argmax, w.scores(), -1)
        found = w.find(w.call(torch.neg, plain), w.call(torch.neg, chosen))
        assert [(skip.node, skip.reason) for skip in found.skips] == [(chosen, SkipReason.NO_DISPATCH)]
        w = Model()
        best = w.pick(w.call(torch.topk, w.call(torch.exp, w.x), 2), 1)
        assert reasons(w.find(w.call(torch.neg, best))) == [SkipReason.NO_ROUTER]

    @pytest.mark.parametrize("k", [1, 2])
    def test_what_no_score_weighs(self, k):
        """Several experts are fetched then, and not weighed; the only expert need not be."""
        w = Model()
        _, ids = w.top_k(w.scores(), k)
        found = w.find(w.call(torch.sum, w.outputs(ids), 1))
        assert len(found.gates) == (k == 1)
        assert [(skip.reason, skip.evidence) for skip in found.skips] == (
            [(SkipReason.NOTHING_WEIGHED, Evidence.DISPATCH)] if k == 2 else []
        )

    def test_the_smallest_distances_are_a_gate(self):
        for project, found_one in ((lambda w: w.call(torch.cdist, w.x, w.weight(8, 6)), True), (Model.scores, False)):
            w = Model()
            best = w.call(torch.topk, project(w), 2, -1, False)
            values, ids = w.pick(best, 0), w.pick(best, 1)
            found = w.find(w.call(torch.sum, w.mul(w.outputs(ids), w.column(values)), 1))
            assert len(found.gates) == found_one
            assert reasons(found) == ([] if found_one else [SkipReason.SMALLEST])

    @pytest.mark.parametrize(("limit", "experts"), [(7, 7), (2, 2), (8, None), (1, None), (9, None)])
    def test_more_columns_than_experts(self, limit, experts):
        """A number that the ids are compared with, between one and as many as there are columns."""
        w = Model()
        values, ids = w.top_k(w.scores(8), 2)
        real = w.call(torch.lt, ids, limit)
        outputs = w.outputs(w.call(torch.clamp, ids, 0, limit - 1), limit)
        found = w.find(w.call(torch.sum, w.mul(w.mul(outputs, w.column(values)), w.column(real)), 1))
        if limit == 8:
            experts = 8
        assert [gate.num_experts for gate in found.gates] == ([] if experts is None else [experts])

    @pytest.mark.parametrize(("told", "experts"), [(True, 8), (5, 5), (0, None), (False, None)])
    def test_experts_outside_the_graph(self, told, experts):
        w = Model()
        values, ids = w.top_k(w.scores(), 2)
        found = w.find(values, ids, outside=lambda weight, columns: told)
        assert [gate.num_experts for gate in found.gates] == ([] if experts is None else [experts])
        assert reasons(found) == ([SkipReason.NO_DISPATCH] if experts is None else [])
        if experts is None:
            assert (found.skips[0].detail, found.skips[0].evidence) == (
                "the graph returns them",
                Evidence.IDS,
            )

    def test_ids_that_stay_need_experts_inside(self):
        """What is outside is not asked then."""
        w = Model()
        values, ids = w.top_k(w.scores(), 2)
        held = w.call(torch.sum, w.mul(w.pick(w.weight(8), ids), values), 1)
        found = w.find(held, outside=lambda weight, columns: pytest.fail("asked"))
        assert reasons(found) == [SkipReason.NO_DISPATCH]

    def test_experts_that_compute_everything(self):
        w = Model()
        _, ids = w.top_k(w.scores(), 2)
        every = w.call(torch.matmul, w.x, w.weight(8, 6, 6))
        table = w.call("float", w.call(torch.sum, w.call(F.one_hot, ids, 8), 1))
        [skip] = w.find(w.call(torch.einsum, "te,eth->th", table, every)).skips
        assert (skip.reason, skip.node, skip.evidence) == (SkipReason.DENSE, ids.args[0], Evidence.EXPERTS)
        assert skip.detail == every.name

    @pytest.mark.parametrize("experts", [True, False])
    def test_dropped_tokens(self, experts):
        """Whether experts were seen is part of the refusal."""
        w = Model()
        values, ids = w.top_k(w.scores(), 2)
        mask = w.call(F.one_hot, ids, 8)
        kept = w.mul(mask, w.call(torch.le, w.call(torch.cumsum, mask, 0), 2))
        table = w.call("float", w.call(torch.sum, kept, 1))
        results = [w.call(torch.sum, w.mul(w.outputs(ids), w.column(values)), 1)] if experts else []
        found = w.find(table, *results)
        evidence = Evidence.EXPERTS if experts else Evidence.DISPATCH
        assert [(skip.reason, skip.evidence) for skip in found.skips] == [(SkipReason.CAPACITY, evidence)]

    @pytest.mark.parametrize(
        ("look_up", "named"),
        [
            (lambda w, table, words: w.pick(table(5, 2), words), True),
            (lambda w, table, words: w.call(F.embedding, words, table(5, 2)), True),
            (lambda w, table, words: w.pick(w.call("view", table(10), 5, 2), words), True),
            (lambda w, table, words: w.call("long", w.pick(w.weight(5, 2), words)), False),
            (lambda w, table, words: w.pick(table(5), words), False),
            (lambda w, table, words: w.pick(w.call(torch.abs, table(5, 2)), words), False),
            (lambda w, table, words: w.pick(w.input(torch.ones(5, 2).long()), words), False),
            (lambda w, table, words: w.mul(table(4, 2), 1), False),
            (lambda w, table, words: w.call(torch.gather, table(5, 2), 0, w.call("view", words, 2, 2)), False),
        ],
        ids=["index", "embedding", "a view", "scores", "a row", "made", "an input", "times one", "gathered"],
    )
    def test_hash_routing(self, look_up, named):
        """Whole numbers of a table of the model's that a token's word looks up."""
        w = Model()
        words = w.input(torch.zeros(4, dtype=torch.int64))

        def table(*sizes):
            return w.input(nn.Parameter(torch.ones(sizes, dtype=torch.int64), requires_grad=False))

        ids = look_up(w, table, words)
        found = w.find(w.call(torch.matmul, w.x, w.pick(w.weight(8, 6, 6), ids)))
        assert [(skip.reason, skip.node, skip.evidence) for skip in found.skips] == (
            [(SkipReason.HASH, ids, Evidence.DISPATCH)] if named else []
        )

    def test_a_table_s_numbers_have_to_choose_experts(self):
        """A gather is no choice of an expert, and two dimensions are no stack."""
        for write in (
            lambda w, ids: w.call(torch.gather, w.weight(8, 6, 6), 0, ids),
            lambda w, ids: w.pick(w.weight(8, 6), ids),
        ):
            w = Model()
            table = w.input(nn.Parameter(torch.ones((5, 2), dtype=torch.int64), requires_grad=False))
            ids = w.pick(table, w.input(torch.zeros((4, 1), dtype=torch.int64)))
            assert w.find(write(w, ids)).skips == ()

    def test_nested_graphs(self):
        """A gate there is refused, with who calls it; the others keep their reasons."""
        inner = Model()
        best = inner.pick(inner.call(torch.topk, inner.scores(), 2), 0)
        _, ids, y = inner.layer()
        inner.give(best, y)
        module = GraphModule(nn.Module(), inner.graph)
        for name, called in (("inner", True), ("inner", False)):
            w = Model()
            body = w.graph.get_attr(name)
            node = w.graph.call_function(torch.utils.checkpoint.checkpoint, (body, w.x)) if called else w.x
            found = w.find(node, **{name: module})
            assert reasons(found) == [SkipReason.NESTED, SkipReason.NO_IDS]
            nested = found.skips[0]
            assert (nested.node, nested.evidence) == (ids.args[0], Evidence.EXPERTS)
            assert nested.detail.startswith(f"called by {node.name if called else body.name}, ")
