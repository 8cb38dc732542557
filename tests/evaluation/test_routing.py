"""A rule in a model: what it is told, and what becomes of its answer."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from sere_compile import EvaluationError
from sere_compile.evaluation import routing
from sere_compile.evaluation.routing import RoutedModel, merge_slots
from sere_compile.passes import Skip, SkipReason

from ..passes.moe_modules import (
    EXPERTS,
    HIDDEN,
    TOKENS,
    TOP_K,
    BiasCorrected,
    Indexed,
    ScatterCombine,
    rows,
    weighted_sum,
)
from .decisions import E, K


def test_merged_slots_give_the_same_sum_without_repeats():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (50, K), generator=generator)
    weights = torch.rand(50, K, generator=generator)
    new_ids, new_weights = merge_slots(ids, weights, E)
    sums = [torch.zeros(50, E).scatter_add_(1, i, w) for i, w in ((ids, weights), (new_ids, new_weights))]
    torch.testing.assert_close(sums[0], sums[1])
    assert all(len(set(row)) == K for row in new_ids.tolist())


def test_merged_slots_by_hand():
    """The sum stands in the first slot of an expert; the freed ones name the lowest experts that are free."""
    ids = torch.tensor([[3, 3, 1], [0, 2, 0], [4, 4, 4], [2, 1, 0]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 0.25, 0.125], [1.0, 2.0, 4.0], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
    new_ids, new_weights = merge_slots(ids, weights, 5)
    assert new_ids.tolist() == [[3, 0, 1], [0, 2, 1], [4, 0, 1], [2, 1, 0]]
    assert new_weights.tolist() == [[0.75, 0.0, 0.125], [5.0, 2.0, 0.0], [3.0, 0.0, 0.0], [1.0, 2.0, 3.0]]
    assert new_ids.dtype == torch.int32
    many, _ = routing.merge_slots(torch.full((1, 30), 7), torch.ones(1, 30), 2000)
    assert many.tolist() == [[7, *(e for e in range(30) if e != 7)]]


@pytest.mark.parametrize("block", [Indexed, ScatterCombine, BiasCorrected], ids=lambda b: b.__name__)
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_rule_is_told_what_the_gate_decided(block):
    """And what it answers is what the experts get, where it names one twice as well."""
    module = block()
    module.ranked = True
    x, calls = rows(), []

    def decide(call):
        calls.append(call)
        return call.ids[:, :1].expand(-1, TOP_K), call.weights * 2

    routed = RoutedModel(module)
    with torch.no_grad():
        scores, (ids, weights) = module.scores(x), module.route(x)
        torch.testing.assert_close(routed(x), module(x))
        routed.decide = decide
        got = routed(x)
        torch.testing.assert_close(got, weighted_sum(module, x, ids[:, :1].expand(-1, TOP_K), weights * 2))
    [call] = calls
    assert call.name == "router"
    assert call.router_weight is module.router
    assert torch.equal(call.hidden, x)
    torch.testing.assert_close(call.scores, scores)
    assert torch.equal(call.ids, ids)
    torch.testing.assert_close(call.weights, weights)
    if block is BiasCorrected:
        torch.testing.assert_close(call.choice, scores + module.bias)
    else:
        assert call.choice is None or torch.equal(call.choice.argsort(-1), scores.argsort(-1))


class Raw(Indexed):
    """Selects by logits, and makes weights of the selected ones."""

    def scores(self, x):
        return nn.functional.linear(x, self.router)

    def route(self, x):
        values, ids = torch.topk(self.scores(x), self.top_k, dim=-1)
        return ids, values.softmax(-1)


@pytest.mark.usefixtures("fresh_dynamo")
def test_scores_are_probabilities_whatever_the_model_selects_by():
    module, calls = Raw(), []
    routed = RoutedModel(module)
    routed.decide = lambda call: calls.append(call) or (call.ids, call.weights)
    routed(rows().view(2, TOKENS // 2, HIDDEN)[0])
    [call] = calls
    torch.testing.assert_close(call.scores.sum(-1), torch.ones(TOKENS // 2))
    assert call.scores.shape == (TOKENS // 2, EXPERTS)


@pytest.mark.usefixtures("fresh_dynamo")
def test_gates_that_cannot_ask():
    """None at all, or one whose ids leave without weights."""
    with pytest.raises(EvaluationError, match="no MoE gate ran in a graph of this model"):
        RoutedModel(nn.Linear(3, 3))(torch.zeros(1, 3))


class TestInsert:
    """Which gates a rule can decide for, by hand."""

    @pytest.mark.parametrize("skip", [None, Skip(SkipReason.SCORES_BY_ID, None)])
    @pytest.mark.parametrize(("weights", "scores"), [(None, "scores"), ("weights", None), (None, None)])
    def test_refused(self, weights, scores, skip, monkeypatch):
        """Without weights, or without scores: with the reason that the gate has, else that there are no weights."""
        node = torch.fx.Graph().placeholder("topk")
        node.meta["stack_trace"] = '  File "/a/model.py", line 12, in forward'
        gate = types.SimpleNamespace(weights=weights, weights_skip=skip, selection=node, ids=node)
        monkeypatch.setattr(routing, "gate_scores", lambda gate: scores)
        routed = routing.RoutedModel(torch.nn.Linear(1, 1))
        reason = (skip or Skip(SkipReason.NO_WEIGHTS, node)).reason.value
        with pytest.raises(EvaluationError, match=r"the gate at model\.py:12 cannot be re-routed: ") as raised:
            routed._insert(gate)
        assert reason in str(raised.value)

    @pytest.mark.parametrize("refused", [False, True])
    def test_what_stands_in_the_graph(self, refused, monkeypatch):
        """New ids and weights are told as the old ones are; a dispatch that cannot take them is an error."""
        graph = torch.fx.Graph()
        names = ("ids", "weights", "worth", "choice", "hidden", "router")
        ids, weights, worth, choice, hidden, router = (graph.placeholder(name) for name in names)
        for node in (ids, weights):
            node.meta["val"] = node.name
        gate = types.SimpleNamespace(
            weights=weights, ids=ids, selection=ids, needs_merge=True, router_input=hidden, router_weight=router
        )
        scores = types.SimpleNamespace(choice=choice, worth=worth, probabilities=True)
        monkeypatch.setattr(routing, "gate_scores", lambda gate: scores)
        asked = []

        def redirect(gate, ask, *, with_weights):
            asked.append((*ask(), with_weights))
            return Skip(SkipReason.SCORES_BY_ID, ids) if refused else asked

        monkeypatch.setattr(routing, "redirect_dispatch", redirect)
        routed = routing.RoutedModel(torch.nn.Linear(1, 1))
        if refused:
            with pytest.raises(EvaluationError, match="cannot be re-routed"):
                routed._insert(gate)
        else:
            routed._insert(gate)
        [(new_ids, new_weights, with_weights)] = asked
        assert (new_ids.meta["val"], new_weights.meta["val"], with_weights) == ("ids", "weights", True)
        assert (new_ids.args[1], new_weights.args[1]) == (0, 1)
        assert new_ids.args[0] is new_weights.args[0]
        assert new_ids.args[0].args == (ids, weights, worth, choice, hidden, router)

    def test_slots_are_merged_over_all_experts(self):
        """Of which there are more than tokens."""
        weight = torch.nn.Parameter(torch.rand(5, 4))
        routed = routing.RoutedModel(torch.nn.Linear(1, 1))
        routed.decide = lambda call: (torch.full_like(call.ids, 4), call.weights)
        ids, weights = torch.tensor([[0, 3], [1, 2]]), torch.tensor([[0.5, 0.25], [0.5, 0.125]])
        merged = routing._Call(routed, probabilities=True, merge=True)
        new_ids, new_weights = merged(ids, weights, torch.rand(2, 5), None, torch.rand(2, 4), weight)
        expected = routing.merge_slots(torch.full_like(ids, 4), weights, 5)
        assert torch.equal(new_ids, expected[0])
        assert torch.equal(new_weights, expected[1])
        assert new_weights.amax(1).tolist() == [0.75, 0.625]

    @pytest.mark.parametrize("merge", [False, True])
    @pytest.mark.parametrize("probabilities", [False, True])
    def test_a_gate_asks(self, merge, probabilities):
        """Tokens in one row each, probabilities in fp32; the answer in the gate's own shape and types."""
        weight = torch.nn.Parameter(torch.rand(5, 4))
        holder = torch.nn.Module()
        holder.router = weight
        routed, seen = routing.RoutedModel(holder), []
        routed.decide = lambda call: seen.append(call) or (torch.zeros_like(call.ids), call.weights.double())
        ids, weights = torch.tensor([[[0, 3], [1, 2], [4, 0]]], dtype=torch.int32), torch.rand(1, 3, 2).half()
        scores, hidden = torch.rand(1, 3, 5).half(), torch.rand(1, 3, 4)
        for choice in (None, torch.rand(1, 3, 5).half()):
            seen.clear()
            new_ids, new_weights = routing._Call(routed, probabilities, merge)(
                ids, weights, scores, choice, hidden, weight
            )
            [call] = seen
            assert (call.name, call.router_weight) == ("router", weight)
            assert [x.shape for x in (call.hidden, call.scores, call.ids, call.weights)] == [
                (3, 4),
                (3, 5),
                (3, 2),
                (3, 2),
            ]
            want = scores[0].float()
            torch.testing.assert_close(call.scores, want if probabilities else want.softmax(-1))
            assert call.choice is None if choice is None else torch.equal(call.choice, choice[0].float())
            assert (new_ids.shape, new_ids.dtype, new_weights.dtype) == (ids.shape, torch.int32, torch.float16)
            assert (new_ids == 0).all() == (not merge)
            assert new_ids[..., 0].tolist() == [[0, 0, 0]]
        other = routing._Call(routed, True, False)(ids, weights, scores, None, hidden, torch.ones(1))
        assert seen[-1].name == "?"
        assert len(other) == 2


def test_slots_that_are_merged_name_others():
    """The lowest experts that a token does not name, at weight 0; sums stand in the first slot."""
    ids = torch.tensor([[2, 2, 0, 2], [1, 0, 3, 4]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 0.25, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    new_ids, new = routing.merge_slots(ids, weights, 6)
    assert new_ids.tolist() == [[2, 1, 0, 3], [1, 0, 3, 4]]
    assert new.tolist() == [[2.75, 0, 1, 0], [1, 2, 3, 4]]
    assert new_ids.dtype == torch.int32
