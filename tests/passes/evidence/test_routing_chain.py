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
