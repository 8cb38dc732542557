"""`routing_chain`: the nodes between logits and dispatch, what they may compute, and why they stay as they are."""

import dataclasses

import pytest
import torch

from sere_compile.ops.route.reference import Scoring
from sere_compile.passes import Skip, SkipReason
from sere_compile.passes.evidence.routing_chain import RoutingChain, find_chain, possible_routings
from sere_compile.passes.graph import nodes

from ..test_fuse_experts import E, H, K, T, trace
from ..test_fuse_router import Routed, TwoProjections, biased, clipped, grouped, renormalised, scores_read


def gate_of(route):
    """The gate of a layer that routes so."""
    layer = route if isinstance(route, torch.nn.Module) else Routed(route)
    return trace(layer, torch.randn(T, H))[2]


def routings(route):
    """What the operations of a route may compute."""
    gate = gate_of(route)
    chain = find_chain(gate)
    assert isinstance(chain, RoutingChain), chain
    return chain, list(possible_routings(gate, chain))


def test_a_plain_router():
    """The chain runs from the projection to the weights; whether they are normalised is left open."""
    chain, found = routings(renormalised)
    assert nodes.kind(chain.logits) == "linear"
    assert chain.logits not in chain.inside
    assert {"softmax", "topk", "sum", "div"} <= {nodes.kind(node) for node in chain.inside}
    assert list(chain.inside) == sorted(chain.inside)
    assert {routing.scoring.renormalize for routing in found} == {False, True}
    assert {(routing.scoring.top_k, routing.scoring.scoring) for routing in found} == {(K, "softmax")}
    assert all(routing.bias is None and not routing.scoring.is_grouped for routing in found)


def test_a_selection_bias():
    """A vector [E] among the graph inputs is the bias of every candidate."""
    chain, found = routings(biased)
    [bias] = [node for node in chain.inputs if nodes.is_tensor(node)]
    assert nodes.shape(bias) == (E,)
    assert {routing.bias for routing in found} == {bias}


def test_limits_to_groups():
    """The other selection of the chain says how many groups there are, and how many are open."""
    _, found = routings(grouped)
    assert {(routing.scoring.num_groups, routing.scoring.top_groups) for routing in found} == {(4, 2)}
    assert {routing.scoring.group_score for routing in found} == {"max", "top2"}
    assert all(isinstance(routing.scoring, Scoring) for routing in found)


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        (lambda: gate_of(clipped), SkipReason.OWN_OPERATIONS),
        (lambda: gate_of(scores_read), SkipReason.READ_ELSEWHERE),
        (lambda: gate_of(TwoProjections(None)), SkipReason.TWO_PROJECTIONS),
        (lambda: dataclasses.replace(gate_of(renormalised), form="sort"), SkipReason.NOT_TOP_K),
        (lambda: dataclasses.replace(gate_of(renormalised), weights=None), SkipReason.WEIGHTS_UNKNOWN),
        (lambda: dataclasses.replace(gate_of(renormalised), num_experts=E - 1), SkipReason.SHAPES),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_refusals(gate, reason):
    """What a chain cannot be replaced for, each with its own reason and a node."""
    found = find_chain(gate())
    assert isinstance(found, Skip), found
    assert found.reason is reason
    assert isinstance(found.node, torch.fx.Node)


def scorings(route):
    return [routing.scoring for routing in routings(route)[1]]


def scaled(layer, logits):
    """Normalised with an epsilon, scaled twice."""
    values, ids = torch.topk(logits.softmax(-1), K)
    values = values / (values.sum(-1, keepdim=True) + 1e-6)
    return values * 2.5 / 4, ids, logits


def softmax_after(layer, logits):
    values, ids = torch.topk(logits, K)
    return values.softmax(-1), ids, logits


def raw(layer, logits):
    values, ids = torch.topk(logits, K)
    return values, ids, logits


def squashed(layer, logits):
    values, ids = torch.topk(logits.sigmoid(), K)
    return values.to(torch.bfloat16).float(), ids, logits


def test_numbers_of_the_chain_are_what_may_scale():
    """1 always; a positive number, and its inverse where it divides; small ones may be an epsilon."""
    found = scorings(scaled)
    assert {scoring.scale for scoring in found} == {1.0, 1e-6, 2.5, 4.0, 0.25, float(K)}
    assert {scoring.epsilon for scoring in found if scoring.renormalize} == {1e-6, 0.0}
    assert {scoring.epsilon for scoring in found if not scoring.renormalize} == {0.0}
    # The epsilon first: on most logits it makes no visible difference.
    assert [scoring.epsilon for scoring in found if scoring.renormalize][:2] == [1e-6, 0.0]
    assert found[0].scale == 1.0


@pytest.mark.parametrize(
    ("route", "scoring"),
    [(scaled, "softmax"), (softmax_after, "softmax_after"), (raw, "none"), (squashed, "sigmoid")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_where_scores_become_weights(route, scoring):
    """A softmax behind the selection is another one than in front of it."""
    assert {found.scoring for found in scorings(route)} == {scoring}
    assert {found.dtype for found in scorings(route)} == {torch.float32}


def in_groups(count, chosen, score=lambda groups: groups.amax(-1), outside=0.0):
    def route(layer, logits):
        scores = logits.sigmoid()
        best = score(scores.view(-1, count, E // count))
        mask = torch.zeros_like(best).scatter(1, best.topk(chosen, dim=-1)[1], 1.0).bool()
        mask = mask.unsqueeze(-1).expand(-1, count, E // count).reshape(scores.shape)
        ids = scores.masked_fill(~mask, outside).topk(K, dim=-1)[1]
        return scores.gather(1, ids), ids, logits

    return route


@pytest.mark.parametrize(("count", "chosen"), [(2, 1), (4, 3)])
@pytest.mark.parametrize("outside", [0.0, float("-inf")])
def test_what_stands_outside_the_groups_is_tried_as_it_is_written(count, chosen, outside):
    """The likelier value first."""
    found = [scoring for scoring in scorings(in_groups(count, chosen, outside=outside)) if not scoring.renormalize]
    assert {(scoring.num_groups, scoring.top_groups) for scoring in found} == {(count, chosen)}
    assert [scoring.outside_zero for scoring in found[:1]] == [outside == 0]
    assert {(scoring.group_score, scoring.outside_zero) for scoring in found} == {
        (score, zero) for score in ("max", "top2") for zero in (True, False)
    }


def test_a_bias_of_another_size_is_none():
    """No operator of ours has it."""

    class Odd(Routed):
        def __init__(self, route):
            super().__init__(route)
            self.odd = torch.nn.Parameter(torch.ones(1))

    gate = gate_of(Odd(lambda layer, logits: (*raw(layer, logits * layer.odd)[:2], logits)))
    chain = find_chain(gate)
    assert isinstance(chain, RoutingChain)
    assert list(possible_routings(gate, chain)) == []


@pytest.mark.parametrize(
    ("gate", "reason", "detail"),
    [
        (lambda: dataclasses.replace(gate_of(renormalised), form="sort"), SkipReason.NOT_TOP_K, "but by sort"),
        (lambda: gate_of(clipped), SkipReason.OWN_OPERATIONS, "clamp"),
        (lambda: dataclasses.replace(gate_of(renormalised), top_k=65), SkipReason.SHAPES, f"E = {E}, K = 65"),
        (lambda: dataclasses.replace(gate_of(renormalised), num_experts=E + 1), SkipReason.SHAPES, f"E = {E}, K = {K}"),
    ],
    ids=["form", "operations", "slots", "experts"],
)
def test_refusals_say_what_was_found(gate, reason, detail):
    found = find_chain(gate())
    assert isinstance(found, Skip)
    assert (found.reason, found.detail) == (reason, detail)
