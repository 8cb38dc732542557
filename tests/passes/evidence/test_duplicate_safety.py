"""`duplicate_safety`: which ways back from sorted slots treat each slot on its own."""

import pytest
import torch

from sere_compile.passes import UseKind
from sere_compile.passes.graph import nodes

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
