"""`expert_evidence`: what shows that experts stand behind ids, and what only looks like it."""

import pytest
import torch
import torch.nn.functional as F

from sere_compile.passes import SkipReason, UseKind, find_gates
from sere_compile.passes.evidence.expert_evidence import (
    is_multiplied,
    limits_named,
    numbers_named,
    reaches_experts,
    same_for_every_expert,
)
from sere_compile.passes.graph import nodes

from ..moe_modules import (
    EXPERTS,
    TRACERS,
    ColumnLoop,
    ExpertLoop,
    Indexed,
    Used,
    from_dynamo,
    from_export,
    from_make_fx,
    one_gate,
    rows,
)

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


@pytest.mark.parametrize("tracer", ["dynamo", "export"])
@pytest.mark.parametrize("name", SCALES)
def test_one_number_per_expert(name, tracer):
    """It goes with the expert where it meets the expert's weights or outputs, with the original ids elsewhere."""
    function, kind = SCALES[name]
    gate = one_gate(TRACERS[tracer](Used(function), rows()))
    tables = [use.kind for use in gate.uses if len(nodes.shape(nodes.operand(use.consumer))) == 1]
    assert tables
    assert set(tables) == {kind}


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


def consumer(function, operation):
    """The node of that kind in the graph of an ordinary block whose ids also go through the function."""
    graph = from_export(Used(function), rows()).graph
    return [node for node in graph.nodes if nodes.kind(node) == operation][-1]


class TestReachesExperts:
    """The search for stacked weights behind a consumer."""

    def test_stacked_weights(self):
        """The gather of an ordinary dispatch reads [E, H, H]; another number of experts is none."""
        gather = one_gate(from_export(Indexed(), rows())).dispatch_uses[0].consumer
        assert reaches_experts(gather, EXPERTS)
        assert reaches_experts(gather, None)
        assert not reaches_experts(gather, EXPERTS + 1)

    def test_a_shared_matrix_ends_the_path(self):
        """What lies behind a projection that all tokens share is another part of the model."""

        def shared(b, x, ids, s):
            return F.linear(ids[:, :1].float().sin() * x, b.router) @ b.experts[:, 0]

        def straight(b, x, ids, s):
            return (ids[:, :1].float().sin() * x) @ b.experts[0]

        assert not reaches_experts(consumer(shared, "sin"), EXPERTS)
        assert reaches_experts(consumer(straight, "sin"), EXPERTS)

    def test_what_becomes_hidden_states_ends_the_path(self):
        """An embedding of the ids that is added to the hidden states meets experts in a later layer."""

        def added(b, x, ids, s):
            return torch.bmm((x + ids[:, :1].float().sin())[None], b.experts[:1])

        assert not reaches_experts(consumer(added, "sin"), EXPERTS)


@pytest.mark.parametrize(
    ("function", "operation", "numbers"),
    [
        (lambda b, x, ids, s: ids == 3, "eq", {3}),
        (lambda b, x, ids, s: ids == 2.5, "eq", set()),
        (lambda b, x, ids, s: F.one_hot(ids, EXPERTS)[..., 5], "one_hot", {5}),
        (lambda b, x, ids, s: F.one_hot(ids, EXPERTS).permute(2, 0, 1)[4:5], "one_hot", {4}),
        (lambda b, x, ids, s: F.one_hot(ids, EXPERTS).sum(1), "one_hot", set()),
    ],
    ids=["compared", "half", "column", "row of a permuted mask", "no column"],
)
def test_numbers_named(function, operation, numbers):
    """The numbers of experts that a comparison or a mask asks for."""
    assert numbers_named(consumer(function, operation)) == numbers


@pytest.mark.parametrize(
    ("function", "operation", "limits"),
    [
        (lambda b, x, ids, s: ids < 6, "lt", {6}),
        (lambda b, x, ids, s: ids > 6, "gt", {7}),
        (lambda b, x, ids, s: ids.clamp(max=5) + 1, "clamp", {6}),
        (lambda b, x, ids, s: ids + 1, "add", set()),
    ],
    ids=["lt", "gt", "clamp", "add"],
)
def test_limits_named(function, operation, limits):
    """The number of experts that a comparison or clamp of the ids makes sense of."""
    assert limits_named(consumer(function, operation)) == limits


def compared(function, operation):
    """The consumer of that kind in the graph of make_fx, which is made in no time."""
    graph = from_make_fx(Used(function), rows()).graph
    return [node for node in graph.nodes if nodes.kind(node) == operation][-1]


# Comparison -> numbers with which it says the same of every expert, and others.
ALIKE = {
    "eq": ((-2, -1, EXPERTS, EXPERTS + 1), (0, 1, EXPERTS - 1)),
    "ne": ((-2, -1, EXPERTS, EXPERTS + 1), (0, 1, EXPERTS - 1)),
    "ge": ((-1, 0, EXPERTS, EXPERTS + 1), (1, EXPERTS - 1)),
    "lt": ((-1, 0, EXPERTS, EXPERTS + 1), (1, EXPERTS - 1)),
    "gt": ((-2, -1, EXPERTS - 1, EXPERTS), (0, EXPERTS - 2)),
    "le": ((-2, -1, EXPERTS - 1, EXPERTS), (0, EXPERTS - 2)),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_separates_experts_from_other_numbers_alone(name):
    """Ids outside [0, E) are on one side, and all experts on the other."""
    for numbers, alike in zip(ALIKE[name], (True, False), strict=True):
        for number in numbers:
            node = compared(lambda b, x, ids, s, number=number: getattr(ids, name)(number), name)
            assert same_for_every_expert(node, EXPERTS) is alike, number


def test_comparisons_with_a_tensor_name_nothing():
    node = compared(lambda b, x, ids, s: ids < ids.flip(0), "lt")
    assert not same_for_every_expert(node, EXPERTS)
    assert limits_named(node) == set()
    assert not same_for_every_expert(compared(lambda b, x, ids, s: ids + 9, "add"), EXPERTS)


@pytest.mark.parametrize(
    ("function", "operation", "limits"),
    [
        (lambda ids: ids.le(6), "le", {7}),
        (lambda ids: ids.ge(6), "ge", {6}),
        (lambda ids: ids.ne(6), "ne", {6}),
        (lambda ids: ids.eq(6), "eq", {6}),
        (lambda ids: ids.clamp(0, 5), "clamp", {6}),
        (lambda ids: ids.clamp(min=0), "clamp", set()),
        (lambda ids: ids.clamp_max(5), "clamp_max", {6}),
    ],
    ids=["le", "ge", "ne", "eq", "clamp", "from below", "clamp_max"],
)
def test_further_limits(function, operation, limits):
    assert limits_named(compared(lambda b, x, ids, s: function(ids), operation)) == limits


@pytest.mark.parametrize(
    ("pick", "numbers"),
    [
        (lambda table: table[:, 5], {5}),
        (lambda table: table[:, 4:5] + table[:, 0], {4, 0}),
        (lambda table: table[:, 2:4], set()),
        (lambda table: table.T[3] + table.T[6:7], {3, 6}),
        (lambda table: (table * 2)[:, 1], {1}),
        (lambda table: table.sum(1)[:3], set()),
    ],
    ids=["column", "two", "range", "rows", "through a product", "of a sum"],
)
def test_columns_of_a_table(pick, numbers):
    """Of what the ids were scattered into, however it is arranged."""

    def picked(b, x, ids, s):
        return pick(torch.zeros_like(s).scatter(1, ids, 1.0))

    assert numbers_named(compared(picked, "scatter")) == numbers


@pytest.mark.parametrize(
    ("use", "multiplied"),
    [
        (lambda b, x, w: x[:, None, None] @ w, True),
        (lambda b, x, w: torch.einsum("th,tkhd->tkd", x, w), True),
        (lambda b, x, w: torch.bmm(x[:, None], w[:, 0].transpose(1, 2) * 2), True),
        (lambda b, x, w: w.mean(1) @ b.experts[0], False),
        (lambda b, x, w: w @ b.experts[0], False),
        (lambda b, x, w: w + x[:, None, None], False),
        (lambda b, x, w: w.sum(1) * x[:, None], False),
    ],
    ids=["matmul", "einsum", "scaled", "summed", "with weights", "added", "times"],
)
def test_gathered_weights_meet_hidden_states(use, multiplied):
    """In a product of matrices, with something that is not the model's own."""
    node = compared(lambda b, x, ids, s: use(b, x, b.experts[ids]), "index")
    assert is_multiplied(node) is multiplied


def test_the_search_ends_after_some_steps():
    """An ordinary dispatch is much shorter."""

    def far(steps):
        def function(b, x, ids, s):
            y = ids.float()
            for _ in range(steps):
                y = y.sin()
            return torch.bmm(y[None], b.experts[:1, :3])

        graph = from_make_fx(Used(function), rows()).graph
        return next(node for node in graph.nodes if nodes.kind(node) == "sin")

    assert reaches_experts(far(150), EXPERTS)
    assert not reaches_experts(far(250), EXPERTS)
