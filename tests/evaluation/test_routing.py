"""A rule in a model: what it is told, and what becomes of its answer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sere_compile import EvaluationError
from sere_compile.evaluation.routing import RoutedModel, merge_slots

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
