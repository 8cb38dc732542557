"""`verify_rewrite`: right rewrites pass for every dispatch and tracer, seeded wrong ones are caught."""

import dataclasses

import pytest
import torch
from torch import nn

from sere_compile.passes import (
    Evidence,
    Proof,
    RoutingSettings,
    Skip,
    SkipReason,
    UseKind,
    find_gates,
    reroute_dispatch,
    verify_rewrite,
)
from sere_compile.passes.graph import nodes

from .evidence.test_selections import FORMS, RoutedIndexed, RoutedScatter, SkipSlots
from .moe_modules import (
    DUPLICATE_UNSAFE,
    SUMS_DUPLICATES,
    TRACERS,
    BiasCorrected,
    Indexed,
    MaskPicks,
    ScatterCombine,
    SlotTable,
    add_matrix,
    expected,
    from_dynamo,
    from_make_fx,
    one_gate,
    rows,
    run,
    similarity,
)


def weights_of(graph):
    """What the graph's inputs and attributes hold."""
    captured = getattr(graph, "captured_inputs", ())
    placeholders = dict(zip(graph.graph.find_nodes(op="placeholder"), captured, strict=False))
    return lambda node: placeholders.get(node) if node.op == "placeholder" else getattr(graph, str(node.target), None)


def verified(graph, gate=None):
    return verify_rewrite(gate or one_gate(graph), weights_of(graph))


class NormalisedInPlace(Indexed):
    """`values /= values.sum()`, as the routers of transformers do: the chosen values must not change between runs."""

    def route(self, x):
        values, ids = torch.topk(self.scores(x), self.top_k)
        values /= values.sum(-1, keepdim=True)
        return ids, values


@pytest.mark.parametrize("tracer", TRACERS)
class TestRight:
    @pytest.mark.parametrize(
        "module",
        [m for m in SUMS_DUPLICATES + DUPLICATE_UNSAFE if m.__name__ != "IndexPut"]
        + [BiasCorrected, SkipSlots, NormalisedInPlace],
        ids=lambda m: m.__name__,
    )
    def test_dispatches(self, module, tracer):
        """Every dispatch of the tests is proven, and the graph is left as it was."""
        graph = TRACERS[tracer](module(), rows())
        before = str(graph.graph)
        proof = verified(graph)
        assert isinstance(proof, Proof), proof
        assert proof.merged is (module in DUPLICATE_UNSAFE)
        assert proof.experts
        assert str(graph.graph) == before

    @pytest.mark.parametrize("module", [RoutedIndexed, RoutedScatter])
    @pytest.mark.parametrize("form", FORMS)
    def test_forms(self, form, module, tracer):
        """So is every form of selection."""
        proof = verified(TRACERS[tracer](module(FORMS[form]), rows()))
        assert isinstance(proof, Proof), proof


@pytest.mark.parametrize("tracer", TRACERS)
def test_weights_that_a_mask_picks_move_in_their_table(tracer):
    """The reader of the scores gets a table with each slot's score at its new expert; others read the scores."""
    module, x = MaskPicks(), rows()
    graph = TRACERS[tracer](module, x)
    gate = one_gate(graph)
    proof = verified(graph, gate)
    [(reader, table)] = proof.tables
    assert (nodes.kind(reader), nodes.kind(table)) == ("mul", "softmax")
    assert not proof.merged
    matrix = similarity()
    for select in (1, 2, 3):
        graph = TRACERS[tracer](module, x)
        proof = verified(graph)
        inputs = proof.gate, add_matrix(graph, matrix), RoutingSettings(select)
        done = reroute_dispatch(*inputs, merged=proof.merged, readers=(), tables=proof.tables)
        assert not isinstance(done, Skip)
        graph.recompile()
        torch.testing.assert_close(run(graph, x), expected(module, x, matrix, select), rtol=1e-5, atol=1e-5)
        assert select < 3 or torch.equal(run(graph, x), module(x))


def with_kinds(gate, change):
    return dataclasses.replace(gate, uses=tuple(change(use) for use in gate.uses))


@pytest.mark.parametrize("tracer", TRACERS)
class TestWrong:
    @pytest.mark.parametrize(
        "module", [m for m in DUPLICATE_UNSAFE if m.__name__ != "IndexPut"], ids=lambda m: m.__name__
    )
    def test_duplicates_that_are_not_summed(self, module, tracer):
        """A wrong rule that takes every dispatch for one that sums: the lost slot is missed, and merging is proven."""
        graph = TRACERS[tracer](module(), rows())
        gate = one_gate(graph)
        wrong = with_kinds(
            gate, lambda use: dataclasses.replace(use, kind=UseKind.GROUPED) if use.kind.dispatches else use
        )
        assert not wrong.needs_merge
        assert verified(graph, wrong).merged
        # With no weights to merge nothing is left.
        refusal = verified(graph, dataclasses.replace(wrong, weights=None))
        if module is SlotTable:  # its weights stand in a table, in which they can move
            assert refusal.tables
            assert not refusal.merged
            return
        assert refusal.reason is SkipReason.UNVERIFIED
        assert "with new ids and S = 1" in refusal.detail

    def test_look_up_with_new_ids(self, tracer):
        """A wrong rule that lets the weights follow the new ids."""
        graph = TRACERS[tracer](BiasCorrected(), rows())
        wrong = with_kinds(one_gate(graph), lambda use: dataclasses.replace(use, kind=UseKind.EXPERT_INDEX))
        assert verified(graph, wrong).reason is SkipReason.UNVERIFIED

    def test_dispatch_with_old_ids(self, tracer):
        """A wrong rule that takes one of two dispatches for a statistic: what it reads is an expert's."""

        class Twice(Indexed):
            def dispatch(self, x, ids, weights):
                return super().dispatch(x, ids, weights) + super().dispatch(2 * x, ids.clone(), weights)

        graph = TRACERS[tracer](Twice(), rows())
        gate = one_gate(graph)
        assert len(gate.dispatch_uses) == 2
        last = gate.dispatch_uses[-1]
        wrong = with_kinds(gate, lambda use: dataclasses.replace(use, kind=UseKind.STATISTIC) if use == last else use)
        proof = verified(graph, wrong)
        assert len(proof.gate.dispatch_uses) == 2  # the table is the experts': the rule is put right

    def test_what_cannot_be_run(self, tracer):
        """An operation that does not take made-up values is no proof: the detail has its message."""
        graph = TRACERS[tracer](ScatterCombine(), rows())
        gate = one_gate(graph)
        scores = nodes.operand(gate.selection)
        scores.args = (*scores.args[:1], 7)  # softmax along a dimension that is not there
        refusal = verify_rewrite(gate)
        assert refusal.reason is SkipReason.UNVERIFIED
        assert "could not be run" in refusal.detail


class Leaving(BiasCorrected):
    """A router whose ids and weights leave the graph, with a mask of the ids beside them."""

    def dispatch(self, x, ids, weights):
        return ids, weights, nn.functional.one_hot(ids, self.num_experts).permute(2, 1, 0)


@pytest.mark.parametrize("tracer", TRACERS)
class TestOutside:
    """Ids that leave the graph: what receives them has to be run, which is the caller's part."""

    def leaving(self, tracer):
        graph = TRACERS[tracer](Leaving(), rows())
        [gate] = find_gates(graph, lambda weight, experts: True).gates
        assert gate.dispatch == "leaves the graph"
        return gate

    def test_without_that_it_is_refused(self, tracer):
        refusal = verify_rewrite(self.leaving(tracer))
        assert refusal.reason is SkipReason.UNVERIFIED
        assert refusal.detail == "its ids leave the graph, and the code that receives them was not run"

    def test_what_running_it_shows_is_taken(self, tracer):
        gate = self.leaving(tracer)
        shown = Proof(gate, True, None, frozenset(), "it was run")
        assert verify_rewrite(gate, outside=lambda asked: shown if asked is gate else None) is shown


def test_one_example_at_a_time_is_refused():
    """Inside `vmap` a token is a batch of its own."""
    graph = from_dynamo(torch.vmap(Indexed()), rows()[:, None])
    refusal = verified(graph)
    assert (refusal.reason, refusal.evidence) == (SkipReason.ONE_TOKEN, Evidence.EXPERTS)


class Unweighted(Indexed):
    """Experts behind a mask, summed without weights."""

    def dispatch(self, x, ids, weights):
        mask = torch.zeros(len(x), self.num_experts).scatter(1, ids, 1.0)
        return torch.einsum("te,th,ehd->td", mask, x, self.experts)


def test_without_weights_the_refusal_says_why_there_are_none():
    """And what the trial showed."""
    gate = one_gate(from_make_fx(Unweighted(), rows()))
    with_weights = dataclasses.replace(gate, weights=gate.ids, weights_skip=None)
    assert verified(gate.selection.graph.owning_module, with_weights).evidence is Evidence.EXPERTS
    refusal = verified(gate.selection.graph.owning_module, gate)
    assert refusal.reason is gate.weights_skip.reason
    assert refusal.evidence is Evidence.EXPERTS
    assert "; " in refusal.detail


@pytest.mark.parametrize("weighing", [False, True])
def test_merging_is_what_is_proven_of_weights_that_will_change(weighing):
    """Where plain ids would do as well; what was proven of the one is no proof of the other."""
    graph = from_make_fx(Indexed(), rows())
    gate = one_gate(graph)
    for wanted in (weighing, not weighing):
        proof = verify_rewrite(gate, weights_of(graph), weighing=wanted)
        assert isinstance(proof, Proof), proof
        assert proof.merged is wanted
