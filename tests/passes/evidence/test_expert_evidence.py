"""`expert_evidence`: what shows that experts stand behind ids, and what only looks like it."""

import operator
import types

import pytest
import torch
import torch.nn.functional as F

from sere_compile.passes import SkipReason, UseKind, find_gates
from sere_compile.passes.evidence.expert_evidence import (
    is_multiplied,
    limits_named,
    numbers_named,
    outputs_of_all,
    picks_outputs,
    reaches_experts,
    runs_experts,
    same_for_every_expert,
    scales_experts,
    tells_experts_apart,
)
from sere_compile.passes.graph import nodes

from ..graph.written import Written
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
        assert skip.detail == "ids are compared with 7 numbers, and there are 8 scores"


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


TOKENS, WIDTH = 4, 6


def used_by(write):
    """A consumer of ids [T, K], once `write(written, consumer, x)` has said what becomes of its numbers [T, 1]."""
    w = Written()
    x, ids = w.given(TOKENS, WIDTH), w.input(torch.zeros(TOKENS, 1, dtype=torch.int64))
    start = w.call(torch.add, w.call("float", ids), 1)
    write(w, start, x)
    return start


def meet_experts(w, node, experts=EXPERTS):
    """Multiplied with weights that are stacked over experts."""
    return w.call(torch.mul, node, w.weight(experts, 1, 1))


# What becomes of the numbers on the way to the experts, and whether these are seen. `e` came in before the ids.
WAYS_TO_EXPERTS = {
    "straight": (lambda w, n, e: n, True),
    "a product with an input": (lambda w, n, e: w.call(torch.matmul, n, e.row), True),
    "a product with a matrix": (lambda w, n, e: w.call(torch.matmul, n, w.weight(1, WIDTH)), False),
    "a table of words": (lambda w, n, e: w.call(F.embedding, w.call("long", n), w.weight(20, WIDTH)), False),
    "a product with a vector": (lambda w, n, e: w.call(torch.matmul, n, w.weight(1)), True),
    "a scale of every token": (lambda w, n, e: w.call(torch.mul, e.x, n), True),
    "a scale of other rows": (lambda w, n, e: w.call(torch.mul, e.batches, n), False),
    "a scale of all": (lambda w, n, e: w.call(torch.mul, e.x, w.call(torch.sum, n)), False),
    "a division of all": (lambda w, n, e: w.call(torch.div, e.x, w.call(torch.sum, n)), False),
    "a scale by a plain number": (lambda w, n, e: w.call(torch.mul, e.x, w.call("item", w.call(torch.sum, n))), False),
    "added to hidden states": (lambda w, n, e: w.call(torch.add, e.x, n), False),
    "taken from hidden states": (lambda w, n, e: w.call(torch.sub, e.x, n), False),
    "joined with hidden states": (lambda w, n, e: w.call(torch.cat, [e.x, n], 1), False),
    "added to a number": (lambda w, n, e: w.call(torch.add, n, 2.0), True),
    "added to one number": (lambda w, n, e: w.call(torch.add, n, e.one), True),
    "added to each other": (lambda w, n, e: w.call(torch.add, n, w.call(torch.exp, n)), True),
    "whole numbers added": (lambda w, n, e: w.call(torch.add, w.call("long", n), e.whole), True),
    "a number for each expert": (
        lambda w, n, e: w.call(torch.add, w.call("expand", n, TOKENS, EXPERTS), e.scores),
        True,
    ),
}


class TestOnTheWayToExperts:
    @pytest.mark.parametrize("name", WAYS_TO_EXPERTS)
    def test_ways(self, name):
        """What becomes part of the hidden states, or meets a matrix of all tokens, says nothing of these experts."""
        way, seen = WAYS_TO_EXPERTS[name]
        w = Written()
        early = types.SimpleNamespace(
            x=w.given(TOKENS, WIDTH),
            row=w.given(1, WIDTH),
            batches=w.given(3, TOKENS, WIDTH),
            scores=w.given(TOKENS, EXPERTS),
            one=w.input(torch.tensor(2.0)),
            whole=w.input(torch.ones(TOKENS, 1, dtype=torch.int64)),
        )
        start = w.call(torch.add, w.call("float", w.input(torch.zeros(TOKENS, 1, dtype=torch.int64))), 1)
        meet_experts(w, w.call(torch.exp, w.call("view", w.call("float", way(w, start, early)), -1)))
        assert reaches_experts(start, EXPERTS) is seen
        assert reaches_experts(start, EXPERTS + 1) is False

    def test_any_number_of_experts(self):
        """Then nothing is known to be data."""
        start = used_by(lambda w, n, x: meet_experts(w, w.call(torch.add, x, n), 3))
        assert reaches_experts(start, None)
        assert not reaches_experts(start, 3)

    def test_flat_weights_are_none(self):
        assert not reaches_experts(used_by(lambda w, n, x: w.call(torch.mul, n, w.weight(1, EXPERTS))), None)
        assert not reaches_experts(used_by(lambda w, n, x: w.call(torch.matmul, n, w.weight(1, EXPERTS))), 1)
        assert not reaches_experts(used_by(lambda w, n, x: w.call(torch.mul, n, w.weight(2, 1, EXPERTS))), EXPERTS)

    def test_a_convolution_is_none(self):
        def convolved(w, n, x):
            return w.call(F.conv1d, w.call("view", n, 1, 1, TOKENS), w.weight(EXPERTS, 1, 2))

        assert not reaches_experts(used_by(convolved), EXPERTS)

    @pytest.mark.parametrize(("steps", "seen"), [(198, True), (199, False)])
    def test_the_last_step_that_is_looked_at(self, steps, seen):
        def far(w, n, x):
            for _ in range(steps):
                n = w.call(torch.sin, n)
            meet_experts(w, n)

        assert reaches_experts(used_by(far), EXPERTS) is seen

    def test_sizes_of_parts_are_no_distance(self):
        """One for each expert, of which there may be hundreds, and each is checked."""

        def parts(w, n, x):
            each = w.graph.call_method("tolist", (w.call("view", n, -1),))
            for number in range(250):
                size = w.graph.call_function(operator.getitem, (each, number))
                w.graph.call_function(torch.ops.aten._assert_scalar.default, (size, "size"))
            meet_experts(w, w.call(torch.exp, n))

        assert reaches_experts(used_by(parts), EXPERTS)

    def test_what_only_checks_a_size_is_no_distance(self):
        def checked(w, n, x):
            for _ in range(250):
                w.graph.call_function(torch.ops.aten._assert_scalar.default, (n, "size"))
            meet_experts(w, w.call(torch.exp, w.call(torch.exp, n)))

        assert reaches_experts(used_by(checked), EXPERTS)

    def test_the_nearest_are_looked_at_first(self):
        """A long way beside a short one does not hide it."""

        def beside(w, n, x):
            meet_experts(w, w.call(torch.exp, n))
            for _ in range(250):
                n = w.call(torch.sin, n)

        assert reaches_experts(used_by(beside), EXPERTS)

    def test_what_is_met_by_two_ways_is_looked_at_once(self):
        def joined(w, n, x):
            for _ in range(12):
                n = w.call(torch.add, w.call(torch.sin, n), w.call(torch.cos, n))
            meet_experts(w, n)

        assert reaches_experts(used_by(joined), EXPERTS)


def looked_up(write):
    """One number per expert at the ids [T, K], and what `write(written, numbers)` makes of it."""
    w = Written()
    table, ids = w.weight(EXPERTS), w.input(torch.zeros(TOKENS, 3, dtype=torch.int64))
    numbers = w.pick(table, ids)
    write(w, numbers)
    return numbers


def column(w, numbers):
    return w.call("unsqueeze", numbers, -1)


def times_outputs(w, numbers):
    """Multiplied with rows of two numbers per slot."""
    return w.call(torch.mul, column(w, numbers), w.given(TOKENS, 3, 2))


def doubled(w, numbers, times):
    for _ in range(times):
        numbers = w.call(torch.mul, numbers, 2)
    return numbers


def slots(w):
    return w.input(torch.zeros(TOKENS, 3, dtype=torch.int64))


# What is made of a number per expert, and whether it scales what experts give.
NUMBERS = {
    "outputs": (times_outputs, True),
    "outputs divided": (lambda w, n: w.call(torch.div, w.given(TOKENS, 3, WIDTH), w.call("view", n, -1, 3, 1)), True),
    "repeated": (lambda w, n: w.call(torch.mul, w.call("repeat", column(w, n), 1, 1, 2), w.given(2, 1, 1, 1)), True),
    "with a constant": (lambda w, n: times_outputs(w, w.call(torch.mul, n, 2)), True),
    "with one number": (lambda w, n: times_outputs(w, w.call(torch.mul, n, w.given(1))), True),
    "with another look-up": (
        lambda w, n: times_outputs(w, w.call(torch.mul, n, w.pick(w.weight(5), slots(w)))),
        True,
    ),
    "with a look-up of vectors": (
        lambda w, n: times_outputs(w, w.call(torch.mul, n, w.call(torch.sum, w.pick(w.weight(5, 2), slots(w)), -1))),
        False,
    ),
    "with an input's numbers": (
        lambda w, n: times_outputs(w, w.call(torch.mul, n, w.pick(w.call(torch.exp, w.given(5)), slots(w)))),
        False,
    ),
    "with a part of a weight of the model": (
        lambda w, n: times_outputs(w, w.call(torch.mul, n, w.call("view", w.weight(3), 1, 3))),
        False,
    ),
    "with random numbers": (lambda w, n: times_outputs(w, w.call(torch.mul, n, w.call(torch.rand, TOKENS, 3))), False),
    "with constants, a few times": (lambda w, n: times_outputs(w, doubled(w, n, 11)), True),
    "with constants, many times": (lambda w, n: times_outputs(w, doubled(w, n, 14)), False),
    "with routing weights": (lambda w, n: times_outputs(w, w.call(torch.mul, n, w.given(TOKENS, 3))), False),
    "with a weight of the model": (lambda w, n: times_outputs(w, w.call(torch.mul, n, w.weight(3))), False),
    "routing weights alone": (lambda w, n: w.call(torch.mul, n, w.given(TOKENS, 3)), False),
    "summed": (lambda w, n: w.call(torch.sum, n, -1), False),
    "their mean": (lambda w, n: w.call(torch.mean, n), False),
    "their norm": (lambda w, n: w.call("norm", n), False),
    "joined": (lambda w, n: w.call(torch.cat, [n, n], 1), False),
    "stacked": (lambda w, n: w.call(torch.stack, [n, n]), False),
    "put": (lambda w, n: w.call(torch.index_add, w.given(9, 3), 0, w.input(torch.arange(TOKENS)), n), False),
    "the best of them": (lambda w, n: w.call(torch.amax, n, -1), False),
    "scattered": (lambda w, n: w.call(torch.scatter, w.given(TOKENS, EXPERTS), 1, slots(w), n), False),
    "compared": (lambda w, n: w.call(torch.gt, column(w, n), w.given(2, 1, 1, 1)), False),
    "unread": (lambda w, n: None, False),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_whose_number_it_is(name):
    write, scales = NUMBERS[name]
    assert scales_experts(looked_up(write)) is scales


@pytest.mark.parametrize(
    ("target", "scales"), [(torch.sub, True), (torch.add, True), (torch.mul, True), (torch.bitwise_and, False)]
)
def test_whole_numbers_shift_packed_weights(target, scales):
    """As zero points do; what only masks their bits does not."""
    w = Written()
    table = w.input(torch.nn.Parameter(torch.ones(EXPERTS, dtype=torch.int64), requires_grad=False))
    numbers = w.pick(table, slots(w))
    w.call(target, w.input(torch.ones(TOKENS, 3, 2, dtype=torch.int64)), column(w, numbers))
    assert scales_experts(numbers) is scales


def loop(write, experts=EXPERTS, compared=None):
    """Masks `ids == e`, each with what `write(written, mask, number)` makes of it."""
    w = Written()
    ids = w.input(torch.zeros(TOKENS, 3, dtype=torch.int64))
    w.x = w.given(TOKENS, WIDTH)
    masks = [w.call(torch.eq, ids, number) for number in (range(experts) if compared is None else compared)]
    for number, mask in enumerate(masks):
        write(w, w.call("any", mask, -1, True), number)
    return masks


def of_its_own(w, mask, number):
    """A layer of its own, whose output the mask scales."""
    return w.call(torch.mul, mask, w.call(torch.tanh, w.call(F.linear, w.x, w.weight(WIDTH, WIDTH))))


class TestLoops:
    """`tells_experts_apart`: a number, and a weight, for each expert."""

    def test_layers_of_their_own(self):
        assert tells_experts_apart(loop(of_its_own), EXPERTS)
        assert not tells_experts_apart(loop(of_its_own), EXPERTS + 1)
        assert tells_experts_apart(loop(of_its_own, EXPERTS + 1), EXPERTS)

    def test_every_number_has_to_occur(self):
        assert not tells_experts_apart(loop(of_its_own, compared=range(1, EXPERTS + 1)), EXPERTS)
        assert not tells_experts_apart(loop(of_its_own, compared=[*range(EXPERTS - 1), 3]), EXPERTS)

    def test_parts_of_a_stack(self):
        """Each counts for itself."""

        def write(w, mask, number):
            w.stack = w.weight(EXPERTS, WIDTH, WIDTH) if number == 0 else w.stack
            y = w.call(torch.matmul, w.x, w.pick(w.stack, number))
            return w.call(torch.mul, mask, y)

        assert tells_experts_apart(loop(write), EXPERTS)

    @pytest.mark.parametrize(
        "write",
        [
            lambda w, mask, number: w.call(torch.sum, mask),
            lambda w, mask, number: w.call(torch.mul, mask, w.x),
            lambda w, mask, number: w.call(torch.mul, mask, w.weight(WIDTH)),
            lambda w, mask, number: w.call(
                torch.mul, mask, w.input(torch.nn.Parameter(torch.ones(1, WIDTH, dtype=torch.int64), False))
            ),
            lambda w, mask, number: of_its_own(w, mask, number) if number else None,
        ],
        ids=["counts", "masked", "vectors", "whole numbers", "one too few"],
    )
    def test_too_few_weights(self, write):
        assert not tells_experts_apart(loop(write), EXPERTS)

    def test_one_matrix_for_all(self):
        def write(w, mask, number):
            w.shared = w.weight(WIDTH, WIDTH) if number == 0 else w.shared
            return w.call(torch.mul, mask, w.call(F.linear, w.x, w.shared))

        assert not tells_experts_apart(loop(write), EXPERTS)

    def test_one_matrix_for_all_that_is_viewed_anew(self):
        def write(w, mask, number):
            w.shared = w.weight(WIDTH, WIDTH) if number == 0 else w.shared
            return w.call(torch.mul, mask, w.call(F.linear, w.x, w.call("detach", w.shared)))

        assert not tells_experts_apart(loop(write), EXPERTS)

    def test_behind_a_projection_of_all_tokens_nothing_is_met(self):
        """It is the next layer's."""

        def write(w, mask, number):
            y = w.call(F.linear, w.call("expand", w.call("float", mask), TOKENS, WIDTH), w.shared) if number else None
            if number == 0:
                w.shared = w.weight(WIDTH, WIDTH)
                return
            w.call(F.linear, w.call(torch.tanh, y), w.weight(WIDTH, WIDTH))

        assert not tells_experts_apart(loop(write), EXPERTS)

    @pytest.mark.parametrize(("steps", "seen"), [(11, True), (12, False)])
    def test_within_some_steps(self, steps, seen):
        def write(w, mask, number):
            mask = w.call("float", mask)
            for _ in range(steps - 2):
                mask = w.call(torch.exp, mask)
            return of_its_own(w, mask, number)

        assert tells_experts_apart(loop(write), EXPERTS) is seen

    @pytest.mark.parametrize(("steps", "seen"), [(10, True), (11, True), (12, False)])
    def test_an_operand_is_made_of_a_weight_within_some_steps(self, steps, seen):
        def write(w, mask, number):
            y = w.call(F.linear, w.x, w.weight(WIDTH, WIDTH))
            for _ in range(steps):
                y = w.call(torch.exp, y)
            return w.call(torch.mul, mask, y)

        assert tells_experts_apart(loop(write), EXPERTS) is seen


class TestNumbersInOtherSpellings:
    @staticmethod
    def table():
        w = Written()
        ids = w.input(torch.zeros(TOKENS, 3, dtype=torch.int64))
        return w, w.call(F.one_hot, ids, EXPERTS)

    @pytest.mark.parametrize(
        ("pick", "numbers"),
        [
            (lambda w, t: w.call(torch.select, t, 2, 3), {3}),
            (lambda w, t: w.call(torch.ops.aten.slice.Tensor, t, 2, 3, 4), {3}),
            (lambda w, t: w.call(torch.ops.aten.slice.Tensor, t, 2, 3, 5), set()),
            (lambda w, t: w.call(torch.ops.aten.slice.Tensor, t, 2, end=1), {0}),
            (lambda w, t: w.pick(t, (slice(None), slice(None), 0)), {0}),
            (lambda w, t: w.pick(t, (Ellipsis, slice(7, 8))), {7}),
            (lambda w, t: w.pick(t, (Ellipsis, slice(6, 8))), set()),
            (lambda w, t: w.pick(w.call("transpose", w.call("view", t, -1, EXPERTS), 0, 1), 5), {5}),
            (lambda w, t: w.pick(w.pick(t, (Ellipsis, 2)), 1), {2}),
            (lambda w, t: w.pick(w.call(torch.sum, t, 1), (slice(None), 1)), set()),
            (lambda w, t: w.call(torch.neg, t), set()),
        ],
        ids=[
            "select", "slice", "two wide", "from the start", "column", "one wide", "the last two", "row", "a part",
            "of a sum", "none",
        ],
    )  # fmt: skip
    def test_picked(self, pick, numbers):
        w, table = self.table()
        pick(w, table)
        assert numbers_named(table) == numbers

    def test_compared(self):
        w = Written()
        ids = w.input(torch.zeros(TOKENS, 3, dtype=torch.int64))
        for other, numbers in ((0, {0}), (2.0, {2}), (2.5, set()), (ids, set())):
            assert numbers_named(w.call(torch.eq, ids, other)) == numbers
        assert numbers_named(w.call(torch.ne, ids, 3)) == set()
        assert limits_named(w.call(torch.clamp_max, ids, 5)) == {6}
        assert limits_named(w.call("clamp", ids, 1, 4)) == {5}
        assert limits_named(w.call(torch.neg, ids)) == set()


def gathered(write):
    """Weights of experts, gathered by the ids, and what `write(written, weights, x)` makes of them."""
    w = Written()
    x = w.given(TOKENS, 1, 1, WIDTH)
    weights = w.pick(w.weight(EXPERTS, WIDTH, WIDTH), w.input(torch.zeros(TOKENS, 3, dtype=torch.int64)))
    write(w, weights, x)
    return weights


@pytest.mark.parametrize(
    ("write", "multiplied"),
    [
        (lambda w, g, x: w.call(torch.matmul, x, g), True),
        (lambda w, g, x: w.call(torch.matmul, x, w.call(torch.sub, w.call(torch.mul, g, 2), 1)), True),
        (lambda w, g, x: w.call(torch.matmul, x, w.call("transpose", w.call("contiguous", g), 2, 3)), True),
        (lambda w, g, x: w.call(torch.matmul, x, w.pick(w.call(torch.chunk, g, 2, -1), 1)), True),
        (lambda w, g, x: w.call(torch.matmul, x, w.call(torch.exp, g)), False),
        (lambda w, g, x: w.call(torch.matmul, w.weight(WIDTH, WIDTH), g), False),
        (lambda w, g, x: w.call(torch.matmul, w.call("float", w.weight(WIDTH, WIDTH)), g), False),
        (lambda w, g, x: w.call(torch.mul, x, g), False),
    ],
    ids=["matmul", "scaled", "turned", "a half", "bent", "with weights", "with cast weights", "times"],
)
def test_in_a_product(write, multiplied):
    assert is_multiplied(gathered(write)) is multiplied


def test_what_runs_experts():
    """A matrix behind it, also by what was written to its sources; not the table of weights alone."""
    w = Written()
    x, ids, weights = w.given(4, 6), w.input(torch.zeros(4, 2).long()), w.given(4, 2)
    routing = weights, ids
    assert runs_experts(w.mul(w.call(torch.exp, x), 2), routing)
    assert not runs_experts(w.call(torch.scatter, w.call(torch.zeros, 4, 8), 1, ids, weights), routing)
    assert not runs_experts(w.mul(weights, w.given(2)), routing)
    assert not runs_experts(w.mul(weights, w.input(torch.ones(4, 2).long())), routing)
    assert not runs_experts(w.call(torch.zeros_like, x), routing)
    memory = w.call(torch.zeros, 4, 6)
    early = w.call(torch.exp, memory)
    w.call("add_", memory, x)
    assert runs_experts(w.call(torch.exp, memory), routing)
    assert not runs_experts(early, routing)


class TestOutputsOfAll:
    """Experts that compute every token, and what the ids pick of it."""

    def setup_method(self):
        self.w = w = Written()
        self.x, self.ids = w.given(TOKENS, WIDTH), w.input(torch.zeros(TOKENS, 2, dtype=torch.int64))
        self.stack = w.weight(EXPERTS, WIDTH, WIDTH)
        self.every = w.call(torch.tanh, w.call(torch.matmul, self.x, self.stack))  # [E, T, H]

    def test_products_with_a_stack(self):
        """Of these experts' own: neither another number of matrices, nor what the model's state alone makes."""
        w = self.w
        assert outputs_of_all(self.every, EXPERTS)
        assert outputs_of_all(w.call("transpose", self.every, 0, 1), EXPERTS)
        assert not outputs_of_all(w.call(torch.matmul, self.x, w.weight(EXPERTS + 1, WIDTH, WIDTH)), EXPERTS)
        assert not outputs_of_all(w.call("expand", w.call(torch.exp, self.x), EXPERTS, TOKENS, WIDTH), EXPERTS)
        assert not outputs_of_all(w.call(torch.tanh, self.stack), EXPERTS)
        assert not outputs_of_all(w.call(torch.sum, self.every, -1), EXPERTS)
        assert not outputs_of_all(w.call("long", self.every), EXPERTS)
        assert not outputs_of_all(w.call("transpose", self.every, 0, 2), EXPERTS)

    def test_products_with_a_layer_of_each(self):
        w = self.w
        each = [w.call(F.linear, self.x, w.weight(WIDTH, WIDTH)) for _ in range(EXPERTS)]
        assert outputs_of_all(w.call(torch.stack, each), EXPERTS)
        assert not outputs_of_all(w.call(torch.stack, [each[0]] * EXPERTS), EXPERTS)

    def weighed(self, table):
        """The product of a table [T, E] of the ids and the outputs."""
        return self.w.call(torch.einsum, "te,eth->th", table, self.every)

    def table(self):
        return self.w.call("float", self.w.call(torch.sum, self.w.call(F.one_hot, self.ids, EXPERTS), 1))

    def test_weighed_by_a_table_of_the_ids(self):
        """Some steps behind them, and not in these alone."""
        self.weighed(self.table())
        assert picks_outputs([self.ids], EXPERTS) is self.every
        assert picks_outputs([self.ids], EXPERTS + 1) is None
        assert picks_outputs([self.w.given(TOKENS, 2)], EXPERTS) is None

    def test_picked_by_the_ids(self):
        self.w.call(torch.gather, self.every, 0, self.w.call("view", self.ids, 2, TOKENS, 1))
        assert picks_outputs([self.ids], EXPERTS) is self.every

    def test_behind_a_projection_of_all_tokens_nothing_is_picked(self):
        """It is the next layer's."""
        self.weighed(self.w.call(F.linear, self.table(), self.w.weight(EXPERTS, EXPERTS)))
        assert picks_outputs([self.ids], EXPERTS) is None
