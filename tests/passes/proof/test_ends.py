"""Where tokens come together, and what else reads what a rewrite changes."""

import pytest
import torch
from torch import nn

from sere_compile.compiler import dynamo
from sere_compile.passes import Proof, find_gates, verify_rewrite
from sere_compile.passes.evidence.router import trace_router
from sere_compile.passes.evidence.routing_weights import outer_consumers
from sere_compile.passes.graph import nodes
from sere_compile.passes.proof.ends import (
    _looks_up_state,
    _one_row_a_token,
    _root_of,
    _same_attribute,
    _Search,
    find_ends,
)

from ..graph.written import Written
from ..moe_modules import (
    DUPLICATE_UNSAFE,
    EXPERTS,
    HIDDEN,
    SUMS_DUPLICATES,
    TOKENS,
    TOP_K,
    ExpertLoop,
    Indexed,
    IndexPut,
    ScatterCombine,
    from_dynamo,
    from_make_fx,
    one_gate,
    rows,
)
from ..test_verify_rewrite import Leaving, weights_of
from .regions import Dispatch


def ends_of(module, trace=from_make_fx, gate_of=one_gate, *more):
    graph = trace(module, rows(), *more)
    return found_in(graph, gate_of(graph))


def found_in(graph, gate):
    scores = nodes.operand(gate.selection)
    projection = trace_router(scores, nodes.last_size(scores)).projection
    return graph, find_ends(gate, tuple(outer_consumers(gate.weights, gate.ids)), projection)


def returned(graph):
    """What the graph returns, in front of views."""
    found = []
    for node in graph.graph.output_node().all_input_nodes:
        while nodes.kind(node) in nodes.VALUE_PRESERVING | {"permute", "transpose"}:
            node = nodes.operand(node)
        found.append(node)
    return found


@pytest.mark.parametrize(
    "module",
    [module for module in (*SUMS_DUPLICATES, *DUPLICATE_UNSAFE) if module.__name__ != "IndexPut"],
    ids=lambda m: m.__name__,
)
def test_the_exit_is_what_the_block_returns(module):
    """A loop over experts ends at its last expert, not at the first sum."""
    graph, ends = ends_of(module())
    assert [ends.exit] == returned(graph)
    assert ends.sides == ends.written == ()
    assert ends.last is ends.exit


def test_a_reader_of_the_table_beside_the_exit_is_an_end():
    class Counted(ScatterCombine):
        def forward(self, x):
            ids, weights = self.route(x)
            table = x.new_zeros(x.shape[0], self.num_experts).scatter(1, ids, weights)
            return self.dispatch(x, ids, weights), table.sum(0)

    _, ends = ends_of(Counted())
    assert [nodes.shape(side) for side in ends.sides] in ([(8,)], [(10, 8)])
    assert nodes.count(ends.exit) == TOKENS * HIDDEN
    assert ends.last is max([ends.exit, *ends.sides])


class Around(Indexed):
    """What stands around a dispatch is a function of (module, x, y)."""

    def __init__(self, around):
        super().__init__()
        self.around = around
        self.shared = nn.Parameter(torch.rand(HIDDEN, HIDDEN))

    def forward(self, x):
        y = self.dispatch(x, *self.route(x))
        self.exit_shape = y.shape
        return self.around(self, x, y)


# The exit is the dispatch's own sum over slots, whatever follows.
AROUND = {
    "a residual": lambda m, x, y: x + y,
    "a projection": lambda m, x, y: torch.tanh(y) @ m.shared,
    "a shared expert": lambda m, x, y: y + torch.tanh(x @ m.shared),
    "a scale and a cast": lambda m, x, y: (y * 2).double(),
    "the next layer": lambda m, x, y: (x + y) @ m.shared @ m.shared,
}


@pytest.mark.parametrize("name", AROUND)
def test_what_follows_is_behind_the_exit(name):
    _, ends = ends_of(Around(AROUND[name]))
    assert nodes.kind(ends.exit) == "sum"
    assert tuple(nodes.shape(ends.exit)) == (TOKENS, HIDDEN)
    assert ends.sides == ()


class Joined(Indexed):
    """Two dispatches by the same ids are added: the exit is their sum."""

    def dispatch(self, x, ids, weights):
        return super().dispatch(x, ids, weights) + super().dispatch(2 * x, ids.clone(), weights)


class Biased(Indexed):
    """So is a bias that the ids look up, which joins last."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.rand(EXPERTS, HIDDEN))

    def dispatch(self, x, ids, weights):
        return super().dispatch(x, ids, weights) + (self.bias[ids] * weights[..., None]).sum(1)


class BiasedEmbedding(Biased):
    def dispatch(self, x, ids, weights):
        y = Indexed.dispatch(self, x, ids, weights)
        return y + (nn.functional.embedding(ids, self.bias) * weights[..., None]).sum(1)


class ByHalves(ExpertLoop):
    """Two loops over half of the experts each, joined at the end."""

    def dispatch(self, x, ids, weights):
        halves = []
        for start in (0, EXPERTS // 2):
            y = torch.zeros_like(x)
            for number in range(start, start + EXPERTS // 2):
                mine = ids == number
                weight = weights.gather(1, mine.int().argmax(-1, keepdim=True))
                y = y + torch.where(mine.any(-1, keepdim=True), weight * self.expert(number, x), 0.0)
            halves.append(y)
        return halves[0] + halves[1]


@pytest.mark.parametrize("module", [Joined, Biased, BiasedEmbedding, ByHalves], ids=lambda m: m.__name__)
@pytest.mark.parametrize("trace", [from_make_fx, from_dynamo])
def test_what_joins_later_is_in_front_of_the_exit(module, trace):
    graph, ends = ends_of(module(), trace)
    assert [ends.exit] == returned(graph)


class Remembering(Indexed):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(2, TOKENS, TOP_K, dtype=torch.int64))

    def dispatch(self, x, ids, weights):
        self.last[0].copy_(ids + 1)
        return super().dispatch(x, ids, weights)


def test_a_buffer_that_is_written_by_a_view_of_it():
    """It is the buffer that a call leaves changed."""
    _, ends = ends_of(Remembering(), from_dynamo)
    [written] = ends.written
    assert written.op == "placeholder"
    assert tuple(nodes.shape(written)) == (2, TOKENS, TOP_K)
    assert written in ends.sides


class WrittenTwice(Remembering):
    def dispatch(self, x, ids, weights):
        self.last.zero_()[0].add_(ids)
        return Indexed.dispatch(self, x, ids, weights)


def test_a_buffer_that_is_written_by_what_a_write_of_it_gives():
    _, ends = ends_of(WrittenTwice(), from_dynamo)
    assert [written.op for written in ends.written] == ["placeholder"]


@torch.library.custom_op("sere_tests::counted_experts", mutates_args=["count"])
def counted_experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """A whole dispatch, and how often each expert was chosen."""
    count += torch.bincount(ids.flatten(), minlength=len(count))
    return (torch.tanh(x[:, None, None, :] @ experts[ids]).squeeze(2) * weights[..., None]).sum(1)


@counted_experts.register_fake
def _(x, ids, weights, experts, count):
    return torch.empty_like(x)


class Counting(Indexed):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(EXPERTS, dtype=torch.int64))

    def dispatch(self, x, ids, weights):
        return counted_experts(x, ids, weights, self.experts, self.count)


@pytest.mark.parametrize("trace", [from_make_fx, from_dynamo])
def test_what_the_exit_itself_writes_is_an_end(trace):
    """One operator dispatches and counts: new ids would be counted."""
    graph, ends = ends_of(Counting(), trace)
    assert [ends.exit] == returned(graph)
    [written] = ends.written
    assert tuple(nodes.shape(written)) == (EXPERTS,)
    assert ends.sides == (written,)
    verdict = verify_rewrite(one_gate(graph), weights_of(graph), graph)
    assert "is off by" in str(verdict)


def test_without_experts_there_is_no_end():
    _, ends = ends_of(Leaving(), gate_of=lambda graph: find_gates(graph, lambda weight, experts: True).gates[0])
    assert ends is None


class Batched(Indexed):
    """Ids and rows of [batch, tokens]."""

    def forward(self, x):
        flat = x.view(2, -1, HIDDEN)
        ids, weights = self.route(flat)
        y = torch.tanh(flat[:, :, None, None, :] @ self.experts[ids]).squeeze(3)
        return (y * weights[..., None]).sum(2).view(x.shape) + 0.0


def test_tokens_of_more_dimensions():
    _, ends = ends_of(Batched())
    assert tuple(nodes.shape(ends.exit)) == (2, TOKENS // 2, HIDDEN)


class TwoLayers(nn.Module):
    """Each layer adds to memory of its own, which the next reads as it is."""

    def __init__(self):
        super().__init__()
        self.first, self.second = IndexPut(), IndexPut()

    def forward(self, x):
        return self.second(self.first(x))


class ReadBefore(ExpertLoop):
    """A copy of the memory leaves before the last expert has added to it."""

    def dispatch(self, x, ids, weights):
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            early = out + 1
            token, slot = torch.where(ids == number)
            out[token] += weights[token, slot, None] * self.expert(number, x[token])
        return out, early


def captured(module):
    with dynamo.dynamic_shape_capture():
        return from_dynamo(module, rows())


def test_memory_that_experts_add_to_is_an_exit():
    """No operation follows that could be one: the memory is returned."""
    _, ends = found_in(graph := captured(IndexPut()), one_gate(graph))
    assert nodes.kind(ends.exit) == "zeros_like"
    assert ends.sides == ends.written == ()
    assert ends.last == max(nodes.writers(ends.exit))


class InViews(ExpertLoop):
    """Each expert adds to a view of its own of one memory; `around` makes the block's output of it."""

    def __init__(self, around):
        super().__init__()
        self.around = around

    def dispatch(self, x, ids, weights):
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            view = out.view(x.shape)
            token, slot = torch.where(ids == number)
            view[token] += weights[token, slot, None] * self.expert(number, x[token])
        return self.around(x, out, view)


@pytest.mark.parametrize(
    "around",
    [lambda x, out, view: out + x, lambda x, out, view: view + x, lambda x, out, view: (torch.tanh(view), out * 2)],
    ids=["itself", "a view", "both"],
)
def test_what_reads_memory_behind_its_last_write_reads_the_exit(around):
    """Whatever view it is read by, it is no other end."""
    _, ends = found_in(graph := captured(InViews(around)), one_gate(graph))
    assert nodes.kind(ends.exit) == "zeros_like"
    assert ends.complete == max(nodes.writers(ends.exit))
    assert ends.sides == ends.written == ()


def test_the_memory_of_the_layer_before_is_made_up():
    """The second layer starts from what the first left there, not from its experts' writes."""
    graph = captured(TwoLayers())
    for gate in find_gates(graph).gates:
        assert isinstance(proof := verify_rewrite(gate, weights_of(graph)), Proof), proof
        assert len(proof.experts) == EXPERTS


def test_what_is_read_of_memory_before_it_is_complete_is_an_end():
    _, ends = found_in(graph := captured(ReadBefore()), one_gate(graph))
    assert [nodes.shape(side)[-1] for side in ends.sides] == [HIDDEN]


class TestByHand:
    @pytest.mark.parametrize(
        ("sizes", "ids", "one"),
        [
            ((4, 6), (4, 3), True),
            ((4, 1), (4, 3), True),
            ((4,), (4, 3), False),
            ((4,), (4,), False),
            ((6,), (1, 3), False),
            ((5, 6), (4, 3), False),
            ((6, 4), (4, 6), False),
            ((2, 2, 6), (4, 3), True),
            ((2, 3, 6), (4, 3), False),
            ((4, 6), (2, 2, 3), True),
            ((2, 2, 6), (2, 2, 3), True),
            ((1, 4, 6), (2, 2, 3), False),
            ((1, 2, 2, 6), (2, 2, 3), True),
        ],
    )
    def test_one_row_a_token(self, sizes, ids, one):
        """All sizes but the last, or where there are others as many rows in all."""
        w = Written()
        assert _one_row_a_token(w.given(*sizes), w.input(torch.zeros(ids).long())) is one

    def test_whole_numbers_are_no_rows(self):
        w = Written()
        assert not _one_row_a_token(w.input(torch.zeros(4, 6).long()), w.input(torch.zeros(4, 3).long()))
        assert not _one_row_a_token(w.graph.placeholder("unknown"), w.input(torch.zeros(4, 3).long()))
        assert not _one_row_a_token(w.given(4, 6), w.graph.placeholder("unknown"))

    def test_what_looks_up_state(self):
        w = Written()
        table, ids = w.weight(EXPERTS, 2), w.input(torch.zeros(4, 2).long())
        assert _looks_up_state(w.pick(table, ids))
        assert _looks_up_state(w.call(torch.nn.functional.embedding, ids, table))
        assert _looks_up_state(w.call(torch.gather, w.call("view", table, 8, 2), 0, ids))
        assert not _looks_up_state(w.pick(w.given(EXPERTS, 2), ids))
        assert _looks_up_state(w.pick(w.call(torch.exp, table), ids))
        assert not _looks_up_state(w.pick(w.mul(table, w.given(EXPERTS, 2)), ids))
        assert not _looks_up_state(w.mul(table, 2))
        whole = w.input(nn.Parameter(torch.zeros(EXPERTS, 2).long(), False))
        assert not _looks_up_state(w.pick(whole, ids))

    @pytest.mark.parametrize(("steps", "weighed"), [(0, True), (12, True), (13, False)])
    def test_a_matrix_some_steps_back_weighs(self, steps, weighed):
        """Neither the router's nor one that is written does."""
        w = Written()
        search = _Search.__new__(_Search)
        router, experts, buffer = (w.weight(EXPERTS, 6) for _ in range(3))
        search._projection, search._router, search._of_router = w.given(4, EXPERTS), {router}, {EXPERTS}
        w.call("add_", buffer, 1.0)

        def behind(node):
            return [node, *(node := w.call(torch.exp, node) for _ in range(steps))][-1]

        assert search._is_weighed(behind(experts)) is weighed
        assert not any(search._is_weighed(behind(node)) for node in (router, buffer, search._projection))
        assert not search._is_weighed(behind(w.weight(EXPERTS)))

    def test_whole_numbers_that_weigh(self):
        """A packed matrix does; a row of numbers, such as an order, is none."""
        w = Written()
        search = _Search.__new__(_Search)
        search._projection, search._router, search._of_router = w.given(4, EXPERTS), set(), {EXPERTS}
        packed, order = (w.input(nn.Parameter(torch.zeros(sizes).long(), False)) for sizes in ((2, 6), (12,)))
        assert search._is_weighed(packed)
        assert not search._is_weighed(order)
        assert search._is_weighed(w.weight(12))

    def test_attributes_that_are_read_twice(self):
        w = Written()
        first, other, second = (w.graph.get_attr(name) for name in ("router", "experts", "router"))
        assert _same_attribute(first) == [first, second]
        assert _same_attribute(other) == [other]
        assert _same_attribute(w.given(2)) == []

    def test_who_owns_memory(self):
        w = Written()
        memory = w.call(torch.zeros, 4, 6)
        assert _root_of(w.call("view", w.pick(memory, slice(0, 2)), -1)) is memory
        assert _root_of(memory) is memory
        made = w.call(torch.exp, memory)
        assert _root_of(made) is made


def ends_by_hand(dispatch, *results):
    """Where its gate ends once the graph gives these."""
    gate = dispatch.gate(*results)
    return find_ends(gate, tuple(gate.weights.users), dispatch.projection)


class TestEndsByHand:
    def test_the_exit(self):
        """What lies between is inside; what follows is not, and nor is the graph's output."""
        w = Dispatch()
        total = w.total()
        late = w.call(torch.exp, total)
        ends = ends_by_hand(w, late, w.ids, w.weights)
        assert (ends.exit, ends.complete, ends.last, ends.sides, ends.written) == (total, total, total, (), ())
        assert total not in ends.inside
        assert late not in ends.inside
        assert {nodes.kind(node) for node in ends.inside} == {"index", "matmul", "view", "mul", "unsqueeze"}

    def test_what_is_read_elsewhere(self):
        """By its numbers: a shape is none, and what ends in front of the exit has no reader."""
        w = Dispatch()
        count = w.call(torch.bincount, w.call("view", w.ids, -1))
        described = w.call(torch.exp, w.ids)
        w.call(torch.neg, w.call(torch.cos, w.ids))
        total = w.total()
        ends = ends_by_hand(w, total, w.call(torch.add, count, 1), w.call(torch.zeros_like, described))
        assert ends.exit is total
        assert ends.sides == (count,)

    def test_the_last_of_all(self):
        """An end behind the exit is the last."""
        w = Dispatch()
        total = w.total()
        count = w.call(torch.bincount, w.call("view", w.ids, -1))
        ends = ends_by_hand(w, total, count)
        assert (ends.exit, ends.complete, ends.last, ends.sides) == (total, total, total, ())

    @pytest.mark.parametrize(("returned", "seen"), [(True, True), (False, False)])
    def test_numbers(self, returned, seen):
        """A number that the graph returns is an end; one that something else reads is the size of something."""
        w = Dispatch()
        number = w.call("item", w.call(torch.sum, w.ids))
        total = w.total()
        ends = ends_by_hand(w, total, number if returned else w.call(torch.mul, total, number))
        assert (number in ends.sides) is seen

    @pytest.mark.parametrize(
        ("numbers", "experts"), [(1, False), (2, False), (8, False), (9, False), (5, True), (7, True)]
    )
    def test_state_of_the_router(self, numbers, experts):
        """One number for all, for each slot, expert or column of its projection; any other is an expert's parameter."""
        w = Dispatch(columns=9)
        total = w.total()
        best = w.call(torch.amax, w.weights, -1, True)
        scaled = w.mul(best, w.weight(numbers))
        ends = ends_by_hand(w, total, scaled)
        assert (ends is not None and ends.exit is total) is not experts

    def test_the_router_s_product_joins_nothing(self):
        w = Dispatch()
        total = w.total()
        again = w.call(torch.matmul, w.call("t", w.weights), w.projection)
        assert ends_by_hand(w, total, again).exit is total

    def test_what_reads_the_exit_first_is_behind_it(self):
        """A matrix that is met together with the exit, or later, is the next layer's."""
        w = Dispatch()
        total = w.total()
        beside = w.call(torch.sum, w.weights)
        both = w.mul(total, beside)
        ends = ends_by_hand(w, w.call(torch.matmul, both, w.weight(6, 6)))
        assert ends.exit is total

    def test_a_bias_that_is_not_yet_looked_up(self):
        """Of whole numbers, it would be no output; nor of what is no state."""
        for table, joins in ((lambda w: w.weight(8), True), (lambda w: w.given(8), False)):
            w = Dispatch()
            held = table(w)
            total = w.total()
            bias = w.call(torch.sum, w.mul(w.pick(held, w.ids), w.weights), 1)
            last = w.call(torch.add, total, w.column(bias))
            assert ends_by_hand(w, last).exit is (last if joins else total)

    def adding(self, memory_of=lambda w: w.call(torch.zeros, 4, 6), between=lambda w, memory: None):
        """Two experts, each of which adds to memory what it gives."""
        w = Dispatch()
        memory = memory_of(w)
        for number in range(2):
            early = between(w, memory)
            scale = w.column(w.call(torch.sum, w.mul(w.weights, w.call(torch.eq, w.ids, number)), -1))
            part = w.call(torch.matmul, w.x, w.pick(w.experts, number))
            last = w.call("add_", memory, w.mul(part, scale))
        return w, memory, early, last

    def test_memory(self):
        """Complete with the last write to it; what reads it then reads the exit, what reads it before is an end."""
        w, memory, early, last = self.adding(between=lambda w, memory: w.call(torch.exp, memory))
        ends = ends_by_hand(w, w.call(torch.neg, memory), early)
        assert (ends.exit, ends.complete, ends.last, ends.written) == (memory, last, last, ())
        assert early in ends.sides
        assert memory not in ends.sides
        assert last not in ends.inside
        assert memory not in ends.inside

    def test_memory_by_a_view_of_it(self):
        w, memory, _, last = self.adding(lambda w: w.call("view", w.call(torch.zeros, 4, 6), 4, 6))
        ends = ends_by_hand(w, w.call(torch.exp, memory))
        assert nodes.kind(ends.exit) == "zeros"
        assert ends.complete is last

    def test_memory_of_the_caller(self):
        """An input that experts add to is no exit, but is left changed."""
        w, memory, _, _ = self.adding(lambda w: w.given(4, 6))
        ends = ends_by_hand(w, read := w.call(torch.exp, memory))
        assert (ends.exit, ends.complete) == (read, read)
        assert ends.written == (memory,)
        assert ends.sides == (memory,)

    def test_what_is_added_to_memory_that_is_complete(self):
        """By another expert: the exit is their sum."""
        w, memory, _, _ = self.adding()
        bias = w.call(torch.sum, w.mul(w.pick(w.weight(8), w.ids), w.weights), 1)
        total = w.call(torch.add, memory, w.column(bias))
        ends = ends_by_hand(w, total)
        assert (ends.exit, ends.complete) == (total, total)

    def test_memory_of_other_rows_is_no_exit(self):
        w, memory, _, _ = self.adding(lambda w: w.call(torch.zeros, 2, 4, 6))
        total = w.call(torch.sum, memory, 0)
        assert ends_by_hand(w, total).exit is total

    def test_memory_without_experts_is_no_exit(self):
        """A vector weighs no hidden states."""
        w = Dispatch()
        memory = w.call(torch.zeros, 4, 6)
        w.call("add_", memory, w.mul(w.column(w.call(torch.sum, w.weights, -1)), w.weight(6)))
        assert ends_by_hand(w, w.call(torch.exp, memory)) is None

    def test_a_vector_is_no_expert(self):
        w = Dispatch()
        scaled = w.mul(w.column(w.call(torch.sum, w.weights, -1)), w.weight(6))
        assert ends_by_hand(w, scaled) is None

    def test_what_is_copied_from_the_exit_is_behind_it(self):
        w = Dispatch()
        memory = w.call(torch.zeros, 4, 6)
        total = w.total()
        beside = w.call(torch.sum, w.weights)
        w.call("copy_", memory, total)
        ends = ends_by_hand(w, w.call(torch.matmul, w.mul(memory, beside), w.weight(6, 6)))
        assert ends.exit is total

    def test_numbers_that_a_matrix_yields_are_none_of_it(self):
        """Places of the best, for instance: they weigh nothing."""
        w = Dispatch()
        total = w.total()
        beside = w.call(torch.sum, w.weights)
        places = w.call(torch.argmax, w.experts, -1)
        ends = ends_by_hand(w, total, w.mul(beside, places))
        assert ends.exit is total

    @pytest.mark.parametrize(("nodes_between", "joined"), [(397, True), (399, False)])
    def test_experts_far_away_are_not_looked_for(self, nodes_between, joined):
        w = Dispatch()
        total = w.total()
        beside = w.weights
        for _ in range(nodes_between):
            beside = w.call(torch.neg, beside)
        ends = ends_by_hand(w, total, w.call(torch.matmul, beside, w.weight(2, 6)))
        assert (ends is None or ends.exit is not total) is joined

    def test_what_is_met_by_two_ways_is_looked_at_once(self):
        w = Dispatch()
        total = w.total()
        beside = w.weights
        for _ in range(12):
            beside = w.call(torch.add, w.call(torch.sin, beside), w.call(torch.cos, beside))
        ends = ends_by_hand(w, total, w.call(torch.matmul, beside, w.weight(2, 6)))
        assert ends is None or ends.exit is not total


class Parts(nn.Module):
    """Experts write parts of one buffer; how many tokens each has is returned as numbers."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN))

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        order = ids.flatten().sort(0)[1]
        sizes = torch.zeros(len(x), EXPERTS).scatter(1, ids, 1.0).long().sum(0).tolist()
        buffer = torch.empty(len(x) * TOP_K, HIDDEN)
        for number, (part, place) in enumerate(zip(x[order // TOP_K].split(sizes), buffer.split(sizes), strict=True)):
            torch.mm(part, self.w[number], out=place)
        return torch.zeros_like(x).index_add(0, order // TOP_K, buffer * weights.flatten()[order, None]), sizes[0]


def test_a_buffer_is_made_of_what_its_parts_are_written_with():
    with torch.no_grad(), dynamo.dynamic_shape_capture():
        graph = from_dynamo(Parts().requires_grad_(False), rows())
    [gate] = find_gates(graph).gates
    _, ends = found_in(graph, gate)
    assert nodes.kind(ends.exit) == "index_add"
    [number] = ends.sides
    assert isinstance(nodes.value(number), torch.SymInt)
    assert ends.complete is ends.exit
    assert number in ends.inside
    assert ends.exit not in ends.inside
