"""The graph of a block with its gate, in each of its versions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.compiler import dynamo
from sere_compile.compiler.outside.made_up_choices import Draw, made_up_order
from sere_compile.compiler.outside.trial_graphs import TrialGraphs, _gates_of
from sere_compile.experts.trial_block import TrialBlock
from sere_compile.passes import find_gates

from ...passes.graph.written import Written
from .blocks import EXPERTS, HIDDEN, TOP_K, Counting, Experts, Plain, rows
from .trials import VERSIONS, verdicts


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


class TestGraphsOfATrial:
    """The graph with the gate, in each of its versions, on choices that are made up."""

    class Written:
        """A graph that ends behind the router: `more` gives what else leaves it, of `w, ids, weights`."""

        def __init__(self, more=lambda w, ids, weights: [], top_k=TOP_K, form="top_k"):
            plain, w = Plain(Experts()), Written()
            self.block = TrialBlock(plain, plain.gate.weight, plain, EXPERTS, EXPERTS)
            x, weight = w.given(5, HIDDEN), w.input(self.block.weight)
            self.logits = w.call(F.linear, x, weight)
            scores = w.call(torch.softmax, self.logits, -1)
            weights, ids = getattr(self, form)(w, scores, top_k)
            w.give(weights, ids, *more(w, ids, weights))
            self.graph = torch.fx.GraphModule(nn.Module(), w.graph)
            self.inputs = [node.meta["example_value"] for node in (x, weight)]
            self.graphs = TrialGraphs(self.block)
            self.run = self.graphs.compile(self.graph, self.inputs)

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

        def __call__(self, version, seed=4, scores="own"):
            """What leaves in a version."""
            self.graphs.version, self.graphs.draw = version, Draw(seed, scores)
            self.graphs.ids.clear()
            self.graphs.weights.clear()
            return self.run(*self.inputs)

    def test_a_similarity_of_experts_as_any_other(self):
        """The same in each trial."""
        first, second = (self.Written().graphs.matrix for _ in range(2))
        assert torch.equal(first, second)
        assert first.shape == (EXPERTS, EXPERTS)
        assert len(first.unique()) == EXPERTS**2

    def test_versions(self):
        """Each is told what was chosen, and gives what re-routing makes of it."""
        one = self.Written()
        assert set(one.graphs.versions) == {"original", "plain", "merged"}
        assert set(one.graphs.refused) == set(VERSIONS) - {"plain", "merged"}
        assert all("all of it leaves in one way" in why for why in one.graphs.refused.values())
        assert len(one.graphs.found) == 1
        order = made_up_order((5,), EXPERTS, 4)[:, :TOP_K]
        weights, ids = one("original")
        assert torch.equal(ids, order)
        plain = one("plain")
        assert torch.equal(plain[1], torch.ops.sere.reroute(ids, one.graphs.matrix, 1))
        assert torch.equal(plain[0], weights)
        merged = one("merged")
        new_ids, new_weights = torch.ops.sere.reroute_merged(ids, weights, one.graphs.matrix, 1)
        assert torch.equal(merged[1], new_ids)
        torch.testing.assert_close(merged[0], new_weights)
        for version in ("original", "plain", "merged"):
            one(version)
            assert (len(one.graphs.ids), len(one.graphs.weights)) == (1, 1)
            assert torch.equal(one.graphs.ids[0], order)
            assert torch.equal(one.graphs.weights[0], weights)
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
        assert {"plain, ids alone", "merged, ids alone"} <= set(one.graphs.versions)
        assert set(one.graphs.refused) == {"plain, ids kept", "merged, ids kept"}
        _, own, doubled = one("original")
        _, ids, of_own = one("plain, ids alone")
        assert torch.equal(doubled, 2 * own)
        assert torch.equal(of_own, doubled)
        assert torch.equal(ids, torch.ops.sere.reroute(own, one.graphs.matrix, 1))
        _, ids, of_new = one("plain")
        assert torch.equal(of_new, 2 * ids)

    @pytest.mark.parametrize("form", ["sort", "steps", "top_k"])
    def test_ways_to_select(self, form):
        """Each gives the choice that is made up, and what re-routing makes of it."""
        one = self.Written(form=form)
        assert set(one.graphs.versions) >= {"original", "plain", "merged"}
        assert one.graphs.found[0].form == {"top_k": "top-k"}.get(form, form)
        for seed in (3, 4):
            order = made_up_order((5,), EXPERTS, seed)[:, :TOP_K]
            weights, ids = one("original", seed)
            assert torch.equal(ids, order)
            assert (weights.diff(dim=-1) < 0).all()
            assert torch.equal(one("plain", seed)[1], torch.ops.sere.reroute(order, one.graphs.matrix, 1))
            assert torch.equal(one.graphs.ids[0], order)

    def test_weights_that_are_not_known(self):
        """Nothing is told of them."""
        one = self.Written()
        one.graph.graph.output_node().args = ((list(one.graph.graph.nodes)[-2],),)
        one.graph.graph.eliminate_dead_code()
        one.graphs.found.clear()
        one.run = one.graphs.compile(one.graph, one.inputs)
        assert one.graphs.found[0].weights is None
        assert torch.equal(one("plain")[0], torch.ops.sere.reroute(one.graphs.ids[0], one.graphs.matrix, 1))
        assert one.graphs.weights == []

    def test_one_choice_without_its_dimension(self):
        one = self.Written(form="max")
        _, ids = one("original", 1)
        assert torch.equal(ids, made_up_order((5,), EXPERTS, 1)[:, 0])

    def test_scores_are_put_in_behind_the_router(self):
        """Where they are asked for: what is read of them besides the choice shows it."""
        one = self.Written(lambda w, ids, weights: [w.call(torch.gather, list(w.graph.nodes)[3], 1, ids)])
        own = one("original")[2]
        torch.testing.assert_close(one("original", scores="equal")[2], torch.full((5, TOP_K), 1 / EXPERTS))
        assert not torch.allclose(own, torch.full((5, TOP_K), 1 / EXPERTS))

    def test_a_graph_without_the_router(self):
        """Runs as it is, also where it has another gate."""
        one = self.Written()
        inputs = [one.inputs[0], nn.Parameter(torch.randn(EXPERTS, HIDDEN))]
        one.graphs.found.clear()
        run = one.graphs.compile(one.graph, inputs)
        assert one.graphs.found == []
        weights, ids = run(*inputs)
        want = F.linear(*inputs).softmax(-1).topk(TOP_K)
        assert torch.equal(ids, want.indices)
        torch.testing.assert_close(weights, want.values)


class TestGatesOfARouter:
    def graph(self, *, attribute=False, columns=EXPERTS):
        """A graph with the block's router, and a gate of another whose experts it holds itself."""
        plain, w = Plain(Experts()), Written()
        block = TrialBlock(plain, plain.gate.weight, plain, EXPERTS, EXPERTS)
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
        [gate] = _gates_of(dynamo.copy_graph(graph), inputs, block)
        assert (gate.ids.name, gate.num_experts) == (ids.name, EXPERTS)

    def test_experts_may_be_fewer_than_columns(self):
        """As where the last column is no expert's."""
        graph, inputs, block, _ = self.graph()
        for experts, found in ((EXPERTS - 1, EXPERTS - 1), (EXPERTS + 1, EXPERTS)):
            block.num_experts = experts
            [gate] = _gates_of(dynamo.copy_graph(graph), inputs, block)
            assert gate.num_experts == found
