"""`duplicate_safety`: which ways back from sorted slots treat each slot on its own."""

import pytest
import torch

from sere_compile.passes import UseKind
from sere_compile.passes.evidence.duplicate_safety import consumers, counts_ids, slots_stay_apart
from sere_compile.passes.graph import nodes

from ..graph.written import Written
from ..moe_modules import EXPERTS, HIDDEN, TOP_K, TRACERS, Block, one_gate, rows


class Sorted(Block):
    """Slots in the order of their experts; `combine` says how rows get back to their tokens."""

    def __init__(self, combine):
        super().__init__()
        self.combine = combine

    def dispatch(self, x, ids, weights):
        flat, order = torch.sort(ids.view(-1))
        y = torch.bmm(torch.tanh(x[order // self.top_k])[:, None], self.experts[flat]).squeeze(1)
        return self.combine(self, x, order, y * weights.view(-1)[order][:, None])


def inverse_by_write(b, x, order, y):
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return y[inverse].view(-1, TOP_K, HIDDEN).sum(1)


SAFE = {
    "index_add by token": lambda b, x, order, y: torch.zeros_like(x).index_add(0, order // TOP_K, y),
    "index_put accumulating": lambda b, x, order, y: torch.zeros_like(x).index_put((order // TOP_K,), y, True),
    "inverse by argsort": lambda b, x, order, y: y[order.argsort()].view(-1, TOP_K, HIDDEN).sum(1),
    "inverse by write": inverse_by_write,
    "write by slot": lambda b, x, order, y: torch.zeros_like(y).index_copy(0, order, y).view(-1, TOP_K, HIDDEN).sum(1),
    "scatter_add": lambda b, x, order, y: torch.zeros_like(x).scatter_add(
        0, (order // TOP_K)[:, None].expand(-1, HIDDEN), y
    ),
}
UNSAFE = {
    "write by token": lambda b, x, order, y: torch.zeros_like(x).index_put((order // TOP_K,), y),
    "scatter by token": lambda b, x, order, y: torch.zeros_like(x).scatter(
        0, (order // TOP_K)[:, None].expand(-1, HIDDEN), y
    ),
    "compared tokens": lambda b, x, order, y: ((order // TOP_K)[:, None] == torch.arange(x.shape[0])).float().T @ y,
    "inverse used for more": lambda b, x, order, y: y[order.argsort() % 5],
    "order as data": lambda b, x, order, y: x + (order * 1.0).sum(),
    "rows of the order": lambda b, x, order, y: torch.zeros_like(x).index_add(
        0, order[torch.arange(order.shape[0])] // TOP_K, y
    ),
    "added to tokens as data": lambda b, x, order, y: torch.zeros_like(x).index_add(
        0, order // TOP_K, y + (order // TOP_K)[:, None]
    ),
    "index_put by token, written": lambda b, x, order, y: torch.zeros_like(x).index_put((order // TOP_K,), y, False),
}


class Sentinels(Sorted):
    """What is not a number of an expert is told by `compare`, and clamped, in place or not."""

    def __init__(self, compare, in_place):
        super().__init__(SAFE["inverse by write"])
        self.compare, self.in_place = compare, in_place

    def dispatch(self, x, ids, weights):
        flat, order = torch.sort(ids.view(-1))
        sentinel = self.compare(flat)[:, None]
        flat = flat.clamp_(max=EXPERTS - 1) if self.in_place else flat.clamp(max=EXPERTS - 1)
        y = torch.bmm(torch.tanh(x[order // self.top_k])[:, None], self.experts[flat]).squeeze(1)
        return self.combine(self, x, order, (y * weights.view(-1)[order][:, None]).masked_fill(sentinel, 0.0))


class Numbered(Sorted):
    """Each expert's slots are numbered, from where its first row is."""

    def dispatch(self, x, ids, weights):
        flat, order = torch.sort(ids.view(-1))
        first = torch.bincount(flat, minlength=EXPERTS).cumsum(0)
        number = torch.arange(flat.shape[0]) - first[flat]
        y = torch.bmm(torch.tanh(x[order // self.top_k])[:, None], self.experts[flat]).squeeze(1)
        return self.combine(self, x, order, y * weights.view(-1)[order][:, None] * (number[:, None] * 0 + 1))


class Turned(Sorted):
    """Only the permutation is used, by argsort."""

    def dispatch(self, x, ids, weights):
        order = ids.view(-1).argsort()
        y = torch.bmm(torch.tanh(x[order // self.top_k])[:, None], self.experts[ids.view(-1)[order]]).squeeze(1)
        return self.combine(self, x, order, y * weights.view(-1)[order][:, None])


@pytest.mark.parametrize("tracer", ["dynamo", "export"])
class TestSortedSlots:
    def test_numbers_of_an_experts_slots(self, tracer):
        """They depend on the slots of all tokens: a table of counts is no parameter."""
        gate = one_gate(TRACERS[tracer](Numbered(SAFE["inverse by write"]), rows()))
        assert UseKind.UNKNOWN in {use.kind for use in gate.uses}
        assert gate.needs_merge

    def test_argsort_alone(self, tracer):
        """Its consumers are asked as those of a sort are."""
        kinds = []
        for combine in (SAFE["index_add by token"], UNSAFE["write by token"]):
            gate = one_gate(TRACERS[tracer](Turned(combine), rows()))
            kinds.append({use.kind for use in gate.uses if nodes.kind(use.consumer) == "argsort"})
        assert kinds == [{UseKind.GROUPED}, {UseKind.UNKNOWN}]

    @pytest.mark.parametrize("in_place", [True, False])
    def test_sentinels(self, in_place, tracer):
        """Rows of no expert, as transformers 5.17 masks them, are told by what no expert's number answers otherwise."""
        gate = one_gate(TRACERS[tracer](Sentinels(lambda flat: flat >= EXPERTS, in_place), rows()))
        assert {use.kind for use in gate.uses} == {UseKind.GROUPED}
        gate = one_gate(TRACERS[tracer](Sentinels(lambda flat: flat >= EXPERTS - 1, in_place), rows()))
        assert {use.kind for use in gate.uses} == {UseKind.UNKNOWN}

    @pytest.mark.parametrize("name", SAFE)
    def test_safe(self, name, tracer):
        """Ways to bring sorted rows back that treat each slot on its own."""
        gate = one_gate(TRACERS[tracer](Sorted(SAFE[name]), rows()))
        assert {use.kind for use in gate.uses} == {UseKind.GROUPED}

    @pytest.mark.parametrize("name", UNSAFE)
    def test_unsafe(self, name, tracer):
        """What could depend on two slots at once is not taken for safe."""
        gate = one_gate(TRACERS[tracer](Sorted(UNSAFE[name]), rows()))
        assert {use.kind for use in gate.uses} == {UseKind.UNKNOWN}


class Slots(Written):
    """Sorted ids [T * K], their order, and tensors to read and write rows of."""

    def __init__(self):
        super().__init__()
        self.flat = self.input(torch.arange(12))
        self.made = self.call(torch.sort, self.flat)
        self.x, self.y = self.given(12, 2), self.given(12, 2)
        self.stack = self.weight(EXPERTS + 12, 2)

    def sorted_ids(self):
        return self.pick(self.made, 0)

    def order(self):
        return self.pick(self.made, 1)

    def tokens(self):
        return self.call(torch.floor_divide, self.order(), 3)


# What is read of a sort, and whether slots stay apart.
SLOTS = {
    "nothing": (lambda w: None, True),
    "read by order": (lambda w: w.pick(w.x, w.order()), True),
    "written by order": (lambda w: w.call(torch.index_copy, w.x, 0, w.order(), w.y), True),
    "put by order": (lambda w: w.call(torch.index_put, w.x, (w.order(),), w.y), True),
    "counted": (lambda w: w.call(torch.bincount, w.sorted_ids()), True),
    "counted as numbers": (lambda w: w.call(torch.histc, w.call("float", w.sorted_ids()), 4), True),
    "parameters by sorted ids": (lambda w: w.pick(w.stack, w.sorted_ids()), True),
    "a table of counts by sorted ids": (
        lambda w: w.pick(w.call(torch.cumsum, w.call(torch.bincount, w.flat), 0), w.sorted_ids()),
        False,
    ),
    "compared with E": (lambda w: w.call(torch.ge, w.sorted_ids(), EXPERTS), True),
    "compared with an expert": (lambda w: w.call(torch.ge, w.sorted_ids(), 3), False),
    "clamped, then counted": (lambda w: w.call(torch.bincount, w.call(torch.clamp, w.sorted_ids(), 0, 7)), True),
    "clamped, then compared": (lambda w: w.call(torch.eq, w.call(torch.clamp, w.sorted_ids(), 0, 7), 2), False),
    "clamped and counted, then compared": (
        lambda w: [w.call(torch.bincount, w.call(torch.clamp, ids := w.sorted_ids(), 0, 7)), w.call(torch.eq, ids, 2)],
        False,
    ),
    "sorted back, then as numbers": (
        lambda w: [w.pick(w.x, w.call(torch.argsort, order := w.order())), w.call(torch.add, order, 1)],
        False,
    ),
    "read by order, then as numbers": (lambda w: [w.pick(w.x, o := w.order()), w.call(torch.add, o, 1)], False),
    "read by token, then as numbers": (lambda w: [w.pick(w.x, t := w.tokens()), w.call(torch.add, t, 1)], False),
    "order added to numbers": (lambda w: w.call(torch.add, w.flat, w.order()), False),
    "tokens added to numbers": (lambda w: w.call(torch.add, w.flat, w.tokens()), False),
    "sorted ids as numbers": (lambda w: w.call(torch.add, w.sorted_ids(), 1), False),
    "rows of sorted ids": (lambda w: w.pick(w.sorted_ids(), w.flat), False),
    "rows of the order": (lambda w: w.pick(w.order(), w.flat), False),
    "order as numbers": (lambda w: w.call(torch.add, w.order(), 1), False),
    "sorted back": (lambda w: w.pick(w.x, w.call(torch.argsort, w.order())), True),
    "sorted back, as numbers": (lambda w: w.call(torch.add, w.call(torch.argsort, w.order()), 1), False),
    "order masked": (lambda w: w.pick(w.x, w.call(torch.clamp, w.order(), 0, 3)), False),
    "read by token": (lambda w: w.pick(w.x, w.tokens()), True),
    "added by token": (lambda w: w.call(torch.index_add, w.x, 0, w.tokens(), w.y), True),
    "put by token": (lambda w: w.call(torch.index_put, w.x, (w.tokens(),), w.y), False),
    "put by token, adding": (lambda w: w.call(torch.index_put, w.x, (w.tokens(),), w.y, True), True),
    "put by token, adding by name": (
        lambda w: w.call(torch.index_put, w.x, (w.tokens(),), w.y, accumulate=True),
        True,
    ),
    "copied by token": (lambda w: w.call(torch.index_copy, w.x, 0, w.tokens(), w.y), False),
    "rows of tokens": (lambda w: w.pick(w.tokens(), w.flat), False),
    "tokens masked": (lambda w: w.pick(w.x, w.call(torch.clamp, w.tokens(), 0, 1)), False),
    "a third of the order as data": (lambda w: w.call(torch.add, w.call(torch.div, w.order(), 3), 1), False),
    "all of it": (
        lambda w: [
            w.call(torch.bincount, w.sorted_ids()),
            w.pick(w.x, order := w.order()),
            w.pick(w.y, w.call(torch.floor_divide, order, 3)),
        ],
        True,
    ),
    "the order twice": (lambda w: (w.pick(w.x, w.order()), w.pick(w.y, w.order())), False),
    "one of three unsafe": (
        lambda w: (w.call(torch.bincount, w.sorted_ids()), w.call(torch.add, w.sorted_ids(), 1), w.order()),
        False,
    ),
    "the pair itself": (lambda w: w.graph.call_function(len, (w.made,)), False),
}


@pytest.mark.parametrize("name", SLOTS)
def test_slots(name):
    write, apart = SLOTS[name]
    w = Slots()
    write(w)
    assert slots_stay_apart(w.made, EXPERTS) is apart


@pytest.mark.parametrize(
    ("write", "apart"),
    [
        (lambda w, order: w.pick(w.x, order), True),
        (lambda w, order: w.call(torch.add, order, 1), False),
        (lambda w, order: None, True),
    ],
)
def test_an_argsort_is_its_order(write, apart):
    w = Slots()
    order = w.call(torch.argsort, w.flat)
    write(w, order)
    assert slots_stay_apart(order, EXPERTS) is apart


def test_what_counts():
    w = Slots()
    ones = w.input(torch.ones(12).long())
    assert counts_ids(w.call(torch.bincount, w.flat))
    assert counts_ids(w.call(torch.histc, w.call("float", w.flat)))
    assert counts_ids(w.call(torch.scatter_add, w.input(torch.zeros(12).long()), 0, w.flat, ones))
    table, rows = w.input(torch.zeros(2, 12).long()), (w.call("view", node, 1, -1) for node in (w.flat, ones))
    assert not counts_ids(w.call(torch.scatter_add, table, 1, *rows))
    assert not counts_ids(w.call(torch.cumsum, w.flat, 0))


def test_consumers_of_ids():
    """Behind views, and behind masks unless these are left out; none of sizes, none behind where it stops."""
    w = Slots()
    viewed, masked = w.call("view", w.flat, 3, 4), w.call(torch.clamp, w.flat, 0, 3)
    readers = [w.call(torch.neg, viewed), w.call(torch.abs, masked), w.call(torch.exp, w.flat)]
    w.call(torch.zeros_like, w.flat)
    assert [c for c, _ in consumers(w.flat)] == [w.made, readers[0], readers[1], readers[2]]
    assert dict(consumers(w.flat))[readers[0]] is viewed
    assert dict(consumers(w.flat))[readers[1]] is masked
    assert set(dict(consumers(w.flat, masks=False))) == {w.made, readers[0], masked, readers[2]}
    assert set(dict(consumers(w.flat, (viewed, w.made)))) == {readers[1], readers[2]}
