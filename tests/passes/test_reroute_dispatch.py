"""`reroute_dispatch`: numbers equal the definition of SERE, and the graph keeps everything else."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.passes.shape_prop import ShapeProp

from sere_compile.passes import Evidence, RoutingSettings, Skip, SkipReason, UseKind, find_gates, reroute_dispatch
from sere_compile.passes.graph import nodes
from sere_compile.testing import reroute_oracle

from .moe_modules import (
    DUPLICATE_UNSAFE,
    EXPERTS,
    HIDDEN,
    SUMS_DUPLICATES,
    TOP_K,
    TRACERS,
    BiasCorrected,
    Block,
    ExpertLoop,
    Grouped,
    Indexed,
    ScatterCombine,
    add_matrix,
    expected,
    from_dynamo,
    from_export,
    one_gate,
    projection,
    reroute,
    rows,
    run,
    similarity,
    weighted_sum,
)

BLOCKS = (*SUMS_DUPLICATES, *DUPLICATE_UNSAFE)


def refused(module, trace=from_export):
    """The refusal of the only gate; the graph stays as it was."""
    graph = trace(module, rows())
    gate = one_gate(graph)
    matrix = add_matrix(graph, similarity())
    before = str(graph.graph)
    skip = reroute_dispatch(gate, matrix, RoutingSettings(1))
    assert isinstance(skip, Skip)
    assert str(graph.graph) == before
    return skip, gate


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
class TestNumbers:
    @pytest.mark.parametrize("select_top_k", [1, 2])
    def test_equals_the_definition(self, block, tracer, select_top_k):
        """The output is the sum over slots of w_k * expert_{new id_k}, whatever the dispatch."""
        module, x = block(), rows()
        graph = TRACERS[tracer](module, x)
        done = reroute(graph, select_top_k=select_top_k)
        assert done.merged == (block in DUPLICATE_UNSAFE)
        torch.testing.assert_close(run(graph, x), expected(module, x, similarity(), select_top_k), rtol=1e-5, atol=1e-5)

    def test_projection_scales_what_moved(self, block, tracer):
        """With coefficients the weight of a slot that goes from u to v is w * a[u, v], merged or not."""
        module, x, coefficients = block(), rows(), projection()
        graph = TRACERS[tracer](module, x)
        reroute(graph, coefficients=coefficients)
        answer = expected(module, x, similarity(), 1, coefficients)
        torch.testing.assert_close(run(graph, x), answer, rtol=1e-5, atol=1e-5)
        plain = expected(module, x, similarity(), 1)
        assert not torch.allclose(plain, answer, atol=1e-3), "the coefficients change nothing"

    def test_projection_onto_itself_changes_no_bit(self, block, tracer):
        """Where every expert stays, operator and coefficients leave the original bits."""
        module, x = block(), rows()
        graph = TRACERS[tracer](module, x)
        before = run(graph, x)
        reroute(graph, select_top_k=TOP_K, coefficients=projection())
        assert torch.equal(run(graph, x), before)

    def test_s_equal_k_changes_no_bit(self, block, tracer):
        """With S = K the rewritten graph, operator included, gives the original bits."""
        module, x = block(), rows()
        graph = TRACERS[tracer](module, x)
        before = run(graph, x)
        reroute(graph, select_top_k=TOP_K)
        assert torch.equal(run(graph, x), before)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_which_dispatch_needs_merging(block):
    """Re-routed ids without merging are right for the proven kinds and wrong for each of the others."""
    module, x = block(), rows()
    ids, weights = module.route(x)
    new_ids = reroute_oracle(ids, similarity(), 1)
    assert any(len(set(token)) < TOP_K for token in new_ids.tolist()), "the case has no duplicates"
    plain = module.dispatch(x, new_ids, weights)
    right = torch.allclose(plain, weighted_sum(module, x, new_ids, weights), rtol=1e-3, atol=1e-3)
    assert right == (block in SUMS_DUPLICATES)
    torch.testing.assert_close(module(x), weighted_sum(module, x, ids, weights), rtol=1e-5, atol=1e-5)


class TestLookUps:
    @pytest.mark.parametrize("tracer", TRACERS)
    def test_bias_corrected_selection(self, tracer):
        """Ranks are those of the biased, sorted selection; weights are the unbiased scores of the original ids."""
        module, x = BiasCorrected(), rows()
        graph = TRACERS[tracer](module, x)
        reroute(graph)
        torch.testing.assert_close(run(graph, x), expected(module, x, similarity(), 1), rtol=1e-5, atol=1e-5)

    def test_looking_up_by_new_ids_would_change_the_weights(self):
        """The opposite treatment is a different model, by far."""
        module, x = BiasCorrected(), rows()
        module.ranked = True
        ids, _ = module.route(x)
        new_ids = reroute_oracle(ids, similarity(), 1)
        wrong = module.look_up(module.scores(x), new_ids)
        wrong = weighted_sum(module, x, new_ids, wrong / wrong.sum(-1, keepdim=True))
        assert (wrong - expected(module, x, similarity(), 1)).abs().max() > 0.1

    @pytest.mark.parametrize("tracer", TRACERS)
    def test_shared_view(self, tracer):
        """A look-up and two dispatches through one view: it is copied for the dispatches, once."""

        class Shared(Block):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.rand(EXPERTS))
                self.shift = nn.Parameter(torch.rand(EXPERTS, HIDDEN))

            def route(self, x):
                values, ids = torch.topk(self.scores(x), self.top_k)
                flat = ids.reshape(-1)
                return ids, values * self.scale[flat].view(-1, self.top_k)

            def forward(self, x):
                values, ids = torch.topk(self.scores(x), self.top_k)
                flat = ids.reshape(-1)
                weights = values.reshape(-1) * self.scale[flat]
                y = torch.tanh(torch.bmm(x.repeat_interleave(self.top_k, 0)[:, None], self.experts[flat]))
                y = (y.squeeze(1) + self.shift[flat]) * weights[:, None]
                return y.view(-1, self.top_k, HIDDEN).sum(1)

            def expert(self, number, x):
                return super().expert(number, x) + self.shift[number]

        module, x = Shared(), rows()
        graph = TRACERS[tracer](module, x)
        done = reroute(graph)
        torch.testing.assert_close(run(graph, x), expected(module, x, similarity(), 1), rtol=1e-5, atol=1e-5)
        assert [nodes.kind(user) for user in done.new_ids.users] == ["view"]
        assert sorted(use.kind.name for use in done.gate.uses) == ["EXPERT_INDEX", "EXPERT_INDEX", "LOOK_UP"]
        assert sum(nodes.kind(node) == "sere.reroute" for node in graph.graph.nodes) == 1

    def test_statistics_keep_the_original_ids(self):
        """A load count is of what the router chose."""

        class Counted(Indexed):
            def forward(self, x):
                ids, weights = self.route(x)
                return self.dispatch(x, ids, weights), torch.bincount(ids.flatten(), minlength=EXPERTS)

        module, x = Counted(), rows()
        graph = from_export(module, x)
        reroute(graph)
        output, load = run(graph, x)
        assert torch.equal(load, module(x)[1])
        assert not torch.allclose(output, module(x)[0])


class TestSorted:
    @pytest.mark.parametrize("tracer", TRACERS)
    @pytest.mark.parametrize("arguments", [{"sorted": False}, {"dim": -1, "largest": True, "sorted": False}])
    def test_unsorted_selection_is_sorted(self, tracer, arguments):
        """Re-routing needs ranks: an unsorted selection is asked for order."""

        class Unsorted(Indexed):
            def route(self, x):
                options = {**arguments, "sorted": getattr(self, "ranked", None) or False}
                values, ids = torch.topk(self.scores(x), self.top_k, **options)
                return ids, values

        module, x = Unsorted(), rows()
        graph = TRACERS[tracer](module, x)
        done = reroute(graph)
        assert not done.gate.is_sorted
        assert nodes.argument(done.gate.selection, 4, "sorted", True) is True
        torch.testing.assert_close(run(graph, x), expected(module, x, similarity(), 1), rtol=1e-5, atol=1e-5)


class InPlaceWeights(ScatterCombine):
    """Normalises in place before the dispatch."""

    def route(self, x):
        values, ids = torch.topk(self.scores(x), self.top_k)
        values /= values.sum(-1, keepdim=True)
        return ids, values


class MaskFirst(ScatterCombine):
    """Makes a mask of the ids before the weights are normalised."""

    in_place = False

    def forward(self, x):
        values, ids = torch.topk(self.scores(x), self.top_k)
        mask = F.one_hot(ids, self.num_experts).sum(1)
        if self.in_place:
            values /= values.sum(-1, keepdim=True)
        else:
            values = values / values.sum(-1, keepdim=True)
        combine = torch.zeros(x.shape[0], self.num_experts).scatter(1, ids, values)
        return torch.einsum("te,eth->th", combine, self.all_experts(mask.T[..., None] * x))


class MaskFirstInPlace(MaskFirst):
    in_place = True


@pytest.mark.parametrize("tracer", TRACERS)
class TestOrder:
    def test_in_place_normalisation_before_the_dispatch(self, tracer):
        """The merged weights are the normalised ones."""
        module, x = InPlaceWeights(), rows()
        graph = TRACERS[tracer](module, x)
        assert reroute(graph).merged
        torch.testing.assert_close(run(graph, x), expected(module, x, similarity(), 1), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("block", [MaskFirst, MaskFirstInPlace], ids=lambda block: block.__name__)
    def test_weights_made_after_the_dispatch_began(self, tracer, block):
        """What makes the weights moves in front of the first use of the ids, where nothing is in the way."""
        module, x = block(), rows()
        graph = TRACERS[tracer](module, x)
        assert reroute(graph).merged
        torch.testing.assert_close(run(graph, x), expected(module, x, similarity(), 1), rtol=1e-5, atol=1e-5)


class TestRefusals:
    def test_weights_made_from_the_dispatch(self):
        """Weights that depend on a dispatch of the ids cannot be merged before it."""

        class EverySecond(ScatterCombine):
            def route(self, x):
                values, ids = torch.topk(self.scores(x), self.top_k)
                place = F.one_hot(ids, self.num_experts).flatten(0, 1).cumsum(0).view(-1, self.top_k, self.num_experts)
                kept = (place * F.one_hot(ids, self.num_experts)).sum(-1) % 2 == 0
                return ids, values * kept

        skip, _ = refused(EverySecond(), from_dynamo)
        assert skip.reason is SkipReason.WEIGHTS_LATE
        assert skip.detail.startswith("one_hot at test_reroute_dispatch.py:")

    def test_write_between_dispatch_and_weights(self):
        """The weights' part does not move across a write to what it reads."""

        class Crossed(ScatterCombine):
            def forward(self, x):
                values, ids = torch.topk(self.scores(x), self.top_k)
                bound = torch.ones_like(values)
                mask = F.one_hot(ids, self.num_experts).sum(1)
                bound.mul_(0.5)
                combine = torch.zeros(x.shape[0], self.num_experts).scatter(1, ids, values.minimum(bound))
                return torch.einsum("te,eth->th", combine, self.all_experts(mask.T[..., None] * x))

        skip, _ = refused(Crossed(), from_dynamo)
        assert (skip.reason, nodes.kind(skip.node)) == (SkipReason.WEIGHTS_LATE, "mul")
        assert skip.evidence is Evidence.EXPERTS
        # In ATen the write's result is what the weights are made of, so that both move together.
        module, x = Crossed(), rows()
        graph = from_export(module, x)
        before = run(graph, x)
        reroute(graph, select_top_k=TOP_K)
        assert torch.equal(run(graph, x), before)

    @pytest.mark.parametrize("trace", [from_dynamo, from_export])
    def test_ids_changed_after_the_dispatch_began(self, trace):
        """Ids that are written to after their first dispatch: the new ids would miss it."""

        class Mutated(Indexed):
            def forward(self, x):
                values, ids = torch.topk(self.scores(x), self.top_k)
                first = self.dispatch(x, ids, values)
                ids.view(-1).remainder_(4)
                return first + self.dispatch(x, ids, values)

        skip, _ = refused(Mutated(), trace)
        assert (skip.reason, nodes.kind(skip.node)) == (SkipReason.MUTATED, "remainder")
        assert "at test_reroute_dispatch.py:" in skip.detail

    @pytest.mark.parametrize("trace", [from_dynamo, from_export])
    def test_weights_changed_after_the_dispatch_began(self, trace):
        """The same for weights where they are merged."""

        class Mutated(ScatterCombine):
            def forward(self, x):
                values, ids = torch.topk(self.scores(x), self.top_k)
                first = self.dispatch(x, ids, values)
                values.view(-1).mul_(2)
                return first + self.dispatch(x, ids, values)

        skip, _ = refused(Mutated(), trace)
        assert (skip.reason, nodes.kind(skip.node)) == (SkipReason.MUTATED, "mul")

    def test_weights_changed_where_ids_alone_are_new(self):
        """A dispatch that sums duplicates does not care."""

        class Mutated(Indexed):
            def forward(self, x):
                values, ids = torch.topk(self.scores(x), self.top_k)
                first = self.dispatch(x, ids, values)
                values.mul_(2)
                return first + self.dispatch(x, ids, values)

        module, x = Mutated(), rows()
        graph = from_export(module, x)
        reroute(graph)
        ids, _ = Indexed.route(module, x)
        values = torch.topk(module.scores(x), TOP_K)[0]
        wanted = weighted_sum(module, x, reroute_oracle(ids, similarity(), 1), 3 * values)
        torch.testing.assert_close(run(graph, x), wanted, rtol=1e-5, atol=1e-5)

    def test_weights_are_needed_but_unknown(self):
        """`reroute_dispatch` hands on why the weights could not be told."""

        class Unweighted(ScatterCombine):
            def route(self, x):
                ids = torch.topk(self.scores(x), self.top_k)[1]
                return ids, torch.full(ids.shape, 0.5)

        skip, gate = refused(Unweighted())
        assert skip is gate.weights_skip
        assert skip.reason is SkipReason.NO_WEIGHTS

    @pytest.mark.parametrize("known", [True, False])
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"merged": True}, SkipReason.NO_WEIGHTS),
            ({"projection": True}, SkipReason.NO_SCALE),
            ({"projection": True, "merged": False}, SkipReason.NO_SCALE),
        ],
        ids=["merged", "scaled and merged", "scaled"],
    )
    def test_the_detail_is_why_weights_are_unknown(self, options, reason, known):
        """Else the place of the ids; nothing of the graph changes."""
        graph = from_export(Indexed(), rows())
        gate, matrix = one_gate(graph), add_matrix(graph, similarity())
        skip = Skip(SkipReason.NO_WEIGHTS, gate.ids, "for once") if known else None
        gate = dataclasses.replace(gate, weights=None, weights_skip=skip)
        before = str(graph.graph)
        options = {**options, "projection": matrix if "projection" in options else None}
        found = reroute_dispatch(gate, matrix, RoutingSettings(1), **options)
        assert (found.reason, found.node) == (reason, gate.ids)
        told = str(skip) if reason is SkipReason.NO_SCALE else "for once"
        assert found.detail == (told if known else nodes.place(gate.ids))
        assert str(graph.graph) == before

    @pytest.mark.parametrize(("budget", "merged"), [(5, True), (5, False), (0, True), (0, False)])
    def test_merged_slots_have_no_budget(self, budget, merged):
        graph = from_export(Indexed(), rows())
        gate, matrix = one_gate(graph), add_matrix(graph, similarity())
        found = reroute_dispatch(gate, matrix, RoutingSettings(1, max_active=budget), merged=merged)
        assert isinstance(found, Skip) is (merged and budget > 0)
        budgets = [dict(node.kwargs) for node in graph.graph.nodes if node.target is torch.ops.sere.reroute.default]
        assert budgets == ([] if merged else [{"max_active": budget} if budget else {}])
        if isinstance(found, Skip):
            assert (found.reason, found.evidence) == (SkipReason.BUDGET, Evidence.EXPERTS)
            assert found.detail == "max_active is 5"

    def test_scores_masked_by_ids(self):
        """`probs * mask` is refused although something like weights is there."""

        class Masked(ExpertLoop):
            def forward(self, x):
                scores = self.scores(x)
                values, ids = torch.topk(scores, self.top_k)
                mask = torch.zeros_like(scores).scatter(1, ids, 1.0)
                gates = scores * mask / values.sum(-1, keepdim=True)
                return sum(gates[:, e : e + 1] * self.expert(e, x) for e in range(EXPERTS))

        skip, _ = refused(Masked())
        assert skip.reason is SkipReason.SCORES_BY_ID


class TestGraph:
    @pytest.mark.parametrize("tracer", TRACERS)
    @pytest.mark.parametrize("block", [Indexed, ScatterCombine], ids=lambda block: block.__name__)
    def test_new_nodes_have_metadata(self, block, tracer):
        """New nodes carry the value, the stack trace and the module stack of what they stand for."""
        graph = TRACERS[tracer](block(), rows())
        before = set(graph.graph.nodes)
        done = reroute(graph)
        ids = done.gate.ids
        key = "example_value" if tracer == "dynamo" else "val"
        fresh = [n for n in graph.graph.nodes if n not in before and n.op != "get_attr"]
        for node in fresh:
            assert key in node.meta
            for name in ("stack_trace", "nn_module_stack"):
                assert (name in node.meta) == (name in ids.meta)
        assert done.new_ids.meta[key].shape == ids.meta[key].shape
        assert done.new_ids.meta[key].dtype == torch.int64
        if done.merged:
            [_, weights] = done.new_ids.args[0].users
            assert weights.meta[key].dtype == torch.float32

    def test_shapes_of_a_symbolic_trace(self):
        """Where only ShapeProp's metadata is there, new nodes have that."""
        graph = symbolic_trace(Indexed())
        ShapeProp(graph).propagate(rows())
        done = reroute(graph)
        assert nodes.shape(done.new_ids) == (10, TOP_K)
        assert find_gates(graph).skips[0].reason is SkipReason.REWRITTEN
        module = Indexed()
        torch.testing.assert_close(graph(rows()), expected(module, rows(), similarity(), 1), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("trace", [from_dynamo, from_export])
    def test_only_unused_views_are_removed(self, trace):
        """Operations without users that write in place survive; the views that nobody reads any more do not."""

        class Cached(Indexed):
            def __init__(self):
                super().__init__()
                self.register_buffer("cache", torch.zeros(10, HIDDEN))

            def forward(self, x):
                self.cache.copy_(x)
                ids, weights = self.route(x)
                y = torch.bmm(torch.tanh(x).repeat_interleave(TOP_K, 0)[:, None], self.experts[ids.reshape(-1)])
                out = torch.zeros_like(x)
                out.add_((y.squeeze(1) * weights.reshape(-1, 1)).view(-1, TOP_K, HIDDEN).sum(1))
                return out

        graph = trace(Cached(), rows())
        before = {node: node.format_node() for node in graph.graph.nodes}
        done = reroute(graph)
        removed = [text for node, text in before.items() if node not in set(graph.graph.nodes)]
        assert len(removed) == 1
        assert "reshape" in removed[0]
        assert sum(nodes.kind(n) == "copy" for n in graph.graph.nodes) == 1
        assert sum(nodes.kind(n) == "add" and bool(nodes.writes(n)) for n in graph.graph.nodes) == 1
        assert [use.read in set(graph.graph.nodes) for use in done.gate.uses] == [False]

    @pytest.mark.parametrize("tracer", TRACERS)
    def test_several_dispatches_share_one_operator(self, tracer):
        """Two gathers and a sort of the ids read one re-routed tensor."""

        class Two(Grouped):
            def dispatch(self, x, ids, weights):
                return super().dispatch(x, ids, weights) + Indexed.dispatch(self, x, ids, weights)

        module, x = Two(), rows()
        graph = TRACERS[tracer](module, x)
        done = reroute(graph)
        assert sorted(use.kind.name for use in done.gate.dispatch_uses) == ["EXPERT_INDEX", "GROUPED"]
        assert sum(nodes.kind(node).startswith("sere.") for node in graph.graph.nodes) == 1
        torch.testing.assert_close(run(graph, x), 2 * expected(module, x, similarity(), 1), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("tracer", TRACERS)
    def test_merged_ids_and_weights_come_from_one_operator(self, tracer):
        """No consumer of the weights is left with the old ones, and none of the ids."""
        graph = TRACERS[tracer](ScatterCombine(), rows())
        done = reroute(graph)
        merged = done.new_ids.args[0]
        assert nodes.kind(merged) == "sere.reroute_merged"
        assert set(done.gate.ids.users) == {merged}
        assert set(done.gate.weights.users) == {merged}
        [scatter] = done.new_ids.users
        assert [nodes.operand(node) for node in scatter.all_input_nodes[1:]] == [merged, merged]

    def test_both_picks_of_the_ids(self):
        """Where the graph has two nodes for the ids, the dispatches of both are re-routed."""

        module, x = Grouped(), rows()
        graph = from_export(module, x)
        gate = one_gate(graph)
        with graph.graph.inserting_after(gate.ids):
            twin = graph.graph.node_copy(gate.ids)
        gate.ids.replace_all_uses_with(twin, delete_user_cb=lambda user: user is not twin)
        twin.append(graph.graph.node_copy(gate.ids))
        reroute(graph)
        torch.testing.assert_close(run(graph, x), expected(module, x, similarity(), 1), rtol=1e-5, atol=1e-5)

    def test_transposed_ids_are_re_routed(self):
        """Dynamo writes `ids.T` as an attribute; its consumers see the new ids too."""

        class Transposed(ExpertLoop):
            def dispatch(self, x, ids, weights):
                columns, y = ids.T, torch.zeros_like(x)
                for number in range(self.num_experts):
                    y = y + (weights.T * (columns == number)).sum(0)[:, None] * self.expert(number, x)
                return y + 0 * self.layers[0](x) * (ids == 0).sum()

        module, x = Transposed(), rows()
        graph = from_dynamo(module, x)
        found = find_gates(graph, lambda weight, experts: True)
        gate = found.gates[0] if found.gates else None
        assert gate is not None, found.skips
        assert "transpose" in {nodes.kind(use.consumer) for use in gate.dispatch_uses}

    def test_settings_are_the_operators_arguments(self):
        """S, rho and the minimum reach the operator in its order."""
        graph = from_export(Indexed(), rows())
        gate = one_gate(graph)
        matrix = add_matrix(graph, similarity())
        done = reroute_dispatch(gate, matrix, RoutingSettings(2, threshold=0.25, min_active=5))
        assert done.new_ids.args == (gate.ids, matrix, 2, 0.25, 5)

    def test_ids_that_leave_the_graph_are_merged(self):
        """Code that no graph shows gets distinct experts, and the weights that go with them."""

        class Router(Block):
            def forward(self, x):
                ids, weights = self.route(x)
                return x * 2, weights, ids

        module, x = Router(), rows()
        graph = from_dynamo(module, x)
        gate = find_gates(graph, lambda weight, experts: True).gates[0]
        assert {use.kind for use in gate.uses} == {UseKind.LEAVES}
        assert reroute(graph, gate=gate).merged
        _, weights, ids = run(graph)
        assert all(len(set(token)) == TOP_K for token in ids.tolist())
        full = Indexed()
        torch.testing.assert_close(
            weighted_sum(full, x, ids, weights), expected(full, x, similarity(), 1), rtol=1e-5, atol=1e-5
        )

    def test_dynamic_batch(self):
        """One rewritten program serves every batch size."""
        module = Grouped()
        graph = from_export(module, rows(), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
        reroute(graph)
        for tokens in (2, 7, 33):
            x = rows(tokens, seed=tokens)
            torch.testing.assert_close(run(graph, x), expected(module, x, similarity(), 1), rtol=1e-5, atol=1e-5)
