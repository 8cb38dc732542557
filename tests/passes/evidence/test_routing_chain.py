"""`routing_chain`: the nodes between logits and dispatch, what they may compute, and why they stay as they are."""

import dataclasses
import types

import pytest
import torch

from sere_compile.ops.route.op import KERNEL_MAX_EXPERTS, KERNEL_MAX_SLOTS
from sere_compile.ops.route.reference import Scoring
from sere_compile.passes import Skip, SkipReason
from sere_compile.passes.evidence.routing_chain import RoutingChain, _groups, cast_like, find_chain, possible_routings
from sere_compile.passes.graph import nodes

from ..graph.written import Written
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


class Chain(Written):
    """A router by hand, of which a gate is told as much as the chain asks."""

    def __init__(self, experts=E, dtype=torch.float32):
        super().__init__()
        self.x = self.input(torch.rand(T, H).to(dtype))
        self.router = self.input(torch.nn.Parameter(torch.rand(experts, H).to(dtype)))
        self.logits = self.call(torch.nn.functional.linear, self.x, self.router)

    def select(self, scores, *, values=True):
        """The selected scores, if they are read."""
        self.best = self.call(torch.topk, scores, K)
        self.ids = self.pick(self.best, 1)
        return self.pick(self.best, 0) if values else None

    def found(self, weights, **changes):
        for node in filter(None, (weights, self.ids)):
            self.call(torch.abs, node)
        told = {"weights": weights, "weights_skip": None, "form": "top-k", "selection": self.best, "ids": self.ids}
        told |= {"all_ids": (self.ids,), "router_weight": self.router, "num_experts": E, "top_k": K}
        self.gate = types.SimpleNamespace(**{**told, **changes})
        return find_chain(self.gate)


def plain_chain(**changes):
    w = Chain()
    return w.found(w.select(w.call(torch.softmax, w.logits, -1)), **changes)


class TestChains:
    def test_from_the_logits_to_the_weights(self):
        w = Chain()
        scores = w.call(torch.sigmoid, w.logits)
        bias = w.weight(E)
        biased = w.call(torch.add, scores, bias)
        w.select(biased, values=False)
        weights = w.call(torch.gather, scores, 1, w.ids)
        chain = w.found(weights)
        assert isinstance(chain, RoutingChain), chain
        assert chain.logits is w.logits
        assert chain.inputs == (bias,)
        assert list(chain.inside) == [scores, biased, w.best, w.ids, weights]

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"weights": None}, SkipReason.WEIGHTS_UNKNOWN),
            ({"form": "max"}, SkipReason.NOT_TOP_K),
            ({"num_experts": E + 1}, SkipReason.SHAPES),
            ({"top_k": 65}, SkipReason.SHAPES),
        ],
        ids=str,
    )
    def test_what_the_gate_is(self, changes, reason):
        w = Chain()
        values = w.select(w.call(torch.softmax, w.logits, -1))
        assert w.found(**{"weights": values, **changes}).reason is reason

    @pytest.mark.parametrize(("more", "fits"), [(0, True), (1, False)])
    def test_as_many_experts_as_the_kernel_takes(self, more, fits):
        w = Chain(KERNEL_MAX_EXPERTS + more)
        found = w.found(w.select(w.logits), num_experts=KERNEL_MAX_EXPERTS + more)
        assert isinstance(found, RoutingChain) is fits
        assert isinstance(plain_chain(top_k=KERNEL_MAX_SLOTS), RoutingChain)
        assert not isinstance(plain_chain(top_k=KERNEL_MAX_SLOTS + 1), RoutingChain)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_types_of_logits(self, dtype):
        w = Chain(dtype=dtype)
        found = w.found(w.select(w.logits))
        if dtype is torch.float64:
            assert (found.reason, found.node, found.detail) == (
                SkipReason.DTYPE, w.logits, "its logits are torch.float64"
            )  # fmt: skip
        else:
            assert isinstance(found, RoutingChain)

    @pytest.mark.parametrize(
        ("write", "reason"),
        [
            (lambda w: w.select(w.given(T, E)), SkipReason.NO_LOGITS),
            (
                lambda w: w.select(w.call(torch.add, w.logits, w.call(torch.nn.functional.linear, w.x, w.router))),
                SkipReason.TWO_PROJECTIONS,
            ),
            (lambda w: w.select(w.call(torch.clamp, w.logits, 0)), SkipReason.OWN_OPERATIONS),
            (lambda w: w.select(w.call("view", w.logits, 2, T // 2, E)), SkipReason.SHAPES),
            (lambda w: w.call("view", w.select(w.logits), 2, T // 2, K), SkipReason.SHAPES),
            (lambda w: w.select(w.call("mul_", w.logits, 2)), SkipReason.SHARED_MEMORY),
            (lambda w: w.select(w.call("add", w.logits, w.call("mul_", w.given(E), 2))), SkipReason.SHARED_MEMORY),
            (
                lambda w: [s := w.call(torch.softmax, w.logits, -1), w.select(s), w.call(torch.sum, s)][1],
                SkipReason.READ_ELSEWHERE,
            ),
            (
                lambda w: [v := w.select(w.logits), w.call("add_", w.logits, 1), w.mul(v, 2)][2],
                SkipReason.SHARED_MEMORY,
            ),
        ],
        ids=["no logits", "two", "clamp", "tokens", "weights", "in place", "a bias", "read elsewhere", "meanwhile"],
    )  # fmt: skip
    def test_refusals(self, write, reason):
        w = Chain()
        skip = w.found(write(w))
        assert isinstance(skip, Skip), skip
        assert skip.reason is reason
        assert isinstance(skip.node, torch.fx.Node)

    @pytest.mark.parametrize(("number", "told"), [(1, "exp"), (5, "abs, ceil, cos, erf, exp"), (6, None)])
    def test_many_operations_of_its_own_are_told_in_part(self, number, told):
        w = Chain()
        scores = w.logits
        for operation in (torch.exp, torch.cos, torch.abs, torch.erf, torch.ceil, torch.sin)[:number]:
            scores = w.call(operation, scores)
        assert w.found(w.select(scores)).detail == (told or "abs, ceil, cos, erf, exp, ..")

    def test_tokens_of_more_dimensions(self):
        """Of logits and ids alike."""
        w = Chain()
        w.logits = w.call(torch.nn.functional.linear, w.given(2, 3, H), w.router)
        assert isinstance(w.found(w.select(w.logits)), RoutingChain)

    def test_numbers_that_are_no_epsilon(self):
        """From a thousandth on they scale, and add nothing to a sum."""
        w = Chain()
        chain = w.found(w.mul(w.mul(w.select(w.call(torch.softmax, w.logits, -1)), 0.5), 1e-4))
        w.gate.weights = chain.inside[-1]
        found = [routing.scoring for routing in possible_routings(w.gate, chain)]
        assert {scoring.epsilon for scoring in found} == {1e-4, 0.0}
        assert {scoring.scale for scoring in found} == {1.0, 0.5, 1e-4, float(K)}

    def test_no_scale_is_the_inverse_of_nothing(self):
        w = Chain()
        chain = w.found(w.call(torch.div, w.select(w.call(torch.softmax, w.logits, -1)), 0.0))
        w.gate.weights = chain.inside[-1]
        assert {routing.scoring.scale for routing in possible_routings(w.gate, chain)} == {1.0, float(K)}

    def test_a_write_behind_the_chain_is_none_in_it(self):
        w = Chain()
        values = w.select(w.logits)
        w.call("add_", w.logits, 1)
        assert isinstance(w.found(values), RoutingChain)

    def test_what_only_takes_a_type(self):
        """Its numbers are not read: the chain ends there."""
        w = Chain()
        other = w.call(torch.exp, w.x)
        values = w.call("type_as", w.select(w.logits), other)
        chain = w.found(values)
        assert isinstance(chain, RoutingChain), chain
        assert other not in chain.inside
        assert cast_like(values) is nodes.operand(values)
        assert cast_like(w.call("float", values)) is None
        assert cast_like(w.call(torch.add, values, values)) is None

    @pytest.mark.parametrize("groups", [None, 4, 3])
    def test_masks_may_limit_to_groups(self, groups):
        """Where another selection does not fit groups of experts, they are operations of its own."""
        w = Chain()
        mask = w.call(torch.zeros_like, w.logits, dtype=torch.bool)
        if groups is not None:
            best = w.pick(w.call(torch.topk, w.pick(w.logits, (slice(None), slice(0, groups))), 2), 1)
            mask = w.call(torch.scatter, mask, 1, best, True)
        found = w.found(w.select(w.call("masked_fill", w.logits, mask, 0.0)))
        assert isinstance(found, RoutingChain) is (groups is None)
        assert groups is None or found.reason is SkipReason.OWN_OPERATIONS
        assert groups is None or found.detail == ("slice" if groups == 4 else "masked_fill, scatter, slice, zeros_like")

    @pytest.mark.parametrize(
        ("groups", "chosen", "fits"), [(4, 2, True), (4, 4, True), (3, 2, False), (E, 2, False), (2, 1, True)]
    )
    def test_groups(self, groups, chosen, fits):
        w = Chain()
        best = w.call(torch.topk, w.given(T, groups), chosen)
        w.select(w.logits)
        inside = (best, w.best, w.ids)
        gate = types.SimpleNamespace(selection=w.best, num_experts=E)
        assert _groups(gate, inside) == [(1, 1, "max", True)], "nobody reads which groups"
        w.pick(best, 1)
        found = _groups(gate, inside)
        if not fits:
            assert found == []
        elif chosen == groups:
            assert found == [(1, 1, "max", True)]
        else:
            assert found == [(groups, chosen, s, z) for s in ("max", "top2") for z in (True, False)]

    @pytest.mark.parametrize(("outside", "zero"), [(0.0, True), (-1e3, True), (-1.5e4, False), (float("-inf"), False)])
    def test_what_stands_outside_of_groups_is_tried_first(self, outside, zero):
        """Zeros, unless the chain has a number that closes an expert."""
        w = Chain()
        best = w.call(torch.topk, w.given(T, 4), 2)
        w.pick(best, 1)
        closed = w.call("masked_fill", w.logits, w.input(torch.zeros(T, E, dtype=torch.bool)), outside)
        w.select(closed)
        found = _groups(types.SimpleNamespace(selection=w.best, num_experts=E), (best, closed, w.best, w.ids))
        assert found == [(4, 2, score, z) for score in ("max", "top2") for z in (zero, not zero)]

    def test_a_number_of_groups_that_only_a_call_knows(self):
        """An operator has it as a constant."""
        w = Chain()
        best = w.call(torch.topk, w.given(T, 4), w.input(2))
        w.pick(best, 1)
        w.select(w.logits)
        assert _groups(types.SimpleNamespace(selection=w.best, num_experts=E), (best, w.best, w.ids)) == []

    @pytest.mark.parametrize(
        ("write", "node", "detail"),
        [
            (lambda w: w.select(w.given(T, E)), "topk", "topk"),
            (lambda w: w.select(w.call(torch.clamp, w.logits, 0)), "topk", "clamp"),
            (
                lambda w: w.select(w.call("view", w.logits, 2, T // 2, E)),
                "linear",
                "its logits have other tokens than its ids",
            ),
            (
                lambda w: w.call("view", w.select(w.logits), 2, T // 2, K),
                "view",
                "its weights have another shape than its ids",
            ),
            (lambda w: w.select(w.call("mul_", w.logits, 2)), "mul_", "mul_ writes to what others read"),
            (
                lambda w: [s := w.call(torch.softmax, w.logits, -1), w.select(s), w.call(torch.cos, s)][1],
                "cos",
                "cos reads its softmax as well",
            ),
            (
                lambda w: [v := w.select(w.logits), w.call("add_", w.logits, 1), w.mul(v, 2)][2],
                "add_",
                "add_ changes its logits or bias",
            ),
        ],
        ids=["no logits", "clamp", "tokens", "weights", "in place", "read elsewhere", "meanwhile"],
    )
    def test_what_refusals_point_at(self, write, node, detail):
        w = Chain()
        skip = w.found(write(w))
        assert (skip.node.name, skip.detail) == (node, detail)

    def test_two_projections_are_both_named(self):
        w = Chain()
        again = w.call(torch.nn.functional.linear, w.x, w.router)
        skip = w.found(w.select(w.call(torch.add, w.logits, again)))
        assert sorted(skip.detail.split(", ")) == ["linear", "linear_1"]
        assert skip.node.name == skip.detail.split(", ")[1]

    def test_weights_that_nobody_knows(self):
        """The refusal has why."""
        why = Skip(SkipReason.BENT_WEIGHTS, None, "for once")
        w = Chain()
        w.select(w.logits, values=False)
        found = w.found(None, weights_skip=why)
        assert (found.reason, found.node, found.detail) == (SkipReason.WEIGHTS_UNKNOWN, w.ids, str(why))

    def test_a_projection_by_another_weight_is_looked_through(self):
        """It is none of the router's: an operation of the chain's own."""
        w = Chain()
        bent = w.call(torch.matmul, w.logits, w.weight(E, E))
        found = w.found(w.select(bent))
        assert (found.reason, found.detail) == (SkipReason.OWN_OPERATIONS, "matmul")

    def test_another_weight_s_vector_is_the_bias(self):
        """Of one number an expert, and the only one."""
        for sizes, bias in (((E,), True), ((1,), False), ((T, E), False)):
            w = Chain()
            vector = w.weight(*sizes)
            chain = w.found(w.select(w.call(torch.add, w.logits, vector)))
            found = list(possible_routings(w.gate, chain))
            assert {routing.bias for routing in found} == ({vector} if bias else set())
        w = Chain()
        chain = w.found(w.select(w.call(torch.add, w.call(torch.add, w.logits, w.weight(E)), w.weight(E))))
        assert list(possible_routings(w.gate, chain)) == []
