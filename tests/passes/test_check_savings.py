"""Gates whose experts compute every token whatever the ids say."""

import pytest
import torch

from sere_compile.passes import Evidence, SkipReason, check_savings, find_gates, verify_rewrite

from .moe_modules import EXPERTS, ColumnLoop, Grouped, Indexed, OneHotMask, ScatterCombine, from_dynamo, rows
from .test_verify_rewrite import weights_of


class Dense(Indexed):
    """What all experts give, [E, T, H] or [T, E, H], and a table of weights, or the ids, that pick of it."""

    def __init__(self, pick, apart=False):
        super().__init__()
        self.pick, self.apart = pick, apart

    def every(self, x):
        if self.apart:
            return torch.stack([self.expert(number, x) for number in range(EXPERTS)])
        return self.all_experts(x.expand(EXPERTS, -1, -1))

    def dispatch(self, x, ids, weights):
        return self.pick(self.every(x), ids, weights)


def by_table(every, ids, weights):
    table = weights.new_zeros(len(ids), EXPERTS).scatter(1, ids, weights)
    return torch.einsum("te,eth->th", table, every)


def by_sum(every, ids, weights):
    table = weights.new_zeros(len(ids), EXPERTS).scatter(1, ids, weights)
    return (every * table.T[..., None]).sum(0)


def by_gather(every, ids, weights):
    places = ids[..., None].expand(-1, -1, every.shape[-1])
    return (every.transpose(0, 1).gather(1, places) * weights[..., None]).sum(1)


def by_rows(every, ids, weights):
    return (every[ids, torch.arange(len(ids))[:, None]] * weights[..., None]).sum(1)


PICKS = [by_table, by_sum, by_gather, by_rows]


class Returning(Dense):
    """Its ids leave the graph as well."""

    def forward(self, x):
        ids, weights = self.route(x)
        return self.dispatch(x, ids, weights), ids


def refusal_of(module):
    graph = from_dynamo(module, rows())
    [gate] = find_gates(graph, lambda weight, experts: True).gates
    return check_savings(gate, verify_rewrite(gate, weights_of(graph)).experts)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("pick", PICKS)
def test_all_outputs_stand_in_a_table(pick, apart):
    refusal = refusal_of(Returning(pick, apart))
    assert (refusal.reason, refusal.evidence) == (SkipReason.DENSE, Evidence.EXPERTS)
    assert ".py:" in refusal.detail  # where the table is made


@pytest.mark.parametrize("module", [Indexed, Grouped, ScatterCombine, OneHotMask, ColumnLoop])
def test_experts_that_read_the_choice(module):
    """By its ids, by rows that are masked, or one expert after another."""
    assert refusal_of(module()) is None


def test_experts_outside_the_graph_are_not_seen():
    graph = from_dynamo(Returning(by_table), rows())
    assert check_savings(find_gates(graph, lambda weight, experts: True).gates[0], frozenset()) is None


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("pick", PICKS)
def test_where_no_gate_is_found_the_reason_is_the_same(pick, apart):
    """What ids pick of experts' outputs reaches no expert weights, and the model is an MoE all the same."""
    [skip] = find_gates(from_dynamo(Dense(pick, apart), rows())).skips
    assert (skip.reason, skip.evidence) == (SkipReason.DENSE, Evidence.EXPERTS)


class Heads(Indexed):
    """One matrix for all: parts of what it gives are no experts' outputs."""

    def __init__(self):
        super().__init__()
        self.values = torch.nn.Linear(rows().shape[1], 4 * EXPERTS)

    def forward(self, x):
        ids, weights = self.route(x)
        return by_gather(self.values(x).view(len(x), EXPERTS, 4).transpose(0, 1), ids, weights)


def test_parts_of_one_product_are_no_experts():
    [skip] = find_gates(from_dynamo(Heads(), rows())).skips
    assert skip.reason is SkipReason.NO_DISPATCH
