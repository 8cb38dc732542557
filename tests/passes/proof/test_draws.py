"""Programs that are wrong only where few random draws do not go: a proof has to go there.

Each is refused, and its twin without the trap is proven.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.passes import Proof, Skip, verify_rewrite

from ..moe_modules import EXPERTS, TRACERS, Block, Indexed, ScatterCombine, from_dynamo, one_gate, rows
from ..test_verify_rewrite import weights_of


def proof_of(module, tracer=from_dynamo, x=None, *more, **options):
    graph = tracer(module, rows() if x is None else x, *more, **options)
    return verify_rewrite(one_gate(graph), weights_of(graph))


class Table(Block):
    """Every expert, weighted by a [T, E] table of unnormalised weights; `bend` is done to the table."""

    def __init__(self, bend=lambda block, table: table, experts=EXPERTS):
        super().__init__(experts, top_k=2)
        self.bend = bend
        self.gain = nn.Parameter(torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("limit", torch.tensor(1_000_000))

    def route(self, x):
        values, ids = torch.topk(self.scores(x), self.top_k, dim=-1)
        return ids, values

    def dispatch(self, x, ids, weights):
        table = x.new_zeros(x.shape[0], self.num_experts).scatter(1, ids, weights)
        made = self.all_experts((table.T > 0)[..., None] * x)
        return torch.einsum("te,eth->th", self.bend(self, table), made)


def counted(block, table):
    block.steps.add_(1)
    return torch.where(block.steps > 100, table.sqrt(), table)


BENDS = {
    "only where the router is sure": lambda block, table: torch.where(table > 0.97, torch.ones_like(table), table),
    "small ones are none": lambda block, table: torch.where(table > 0.02, table, 0.0),
    "only near one": lambda block, table: table.clamp(max=0.9),
    "by a gain that is 0 at first": lambda block, table: table + block.gain * table**2,
    "after a hundred calls": counted,
    "beyond a limit that is far at first": lambda block, table: torch.where(
        (table > 0).sum() > block.limit, table.sqrt(), table
    ),
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("bend", BENDS)
def test_weights_that_bend_seldom(bend, tracer):
    """Sharp and flat scores, other small parameters than a model begins with, and late counters are drawn too."""
    refusal = proof_of(Table(BENDS[bend]), TRACERS[tracer])
    assert isinstance(refusal, Skip), bend
    assert "is off by" in refusal.detail


@pytest.mark.parametrize("tracer", TRACERS)
def test_a_table_that_does_not_bend(tracer):
    assert isinstance(proof_of(Table(), TRACERS[tracer]), Proof)


class Scaled(Block):
    """Weights times a number per expert that is 1 at first: the router's, fetched by the mask that dispatches."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(EXPERTS))

    def dispatch(self, x, ids, weights):
        chosen = F.one_hot(ids, EXPERTS).to(x.dtype)
        weights = weights * (chosen @ self.scale)
        out = torch.tanh(torch.einsum("tke,th,ehj->tkj", chosen, x, self.experts))
        return (out * weights[..., None]).sum(1)


def test_a_scale_that_is_one_at_first():
    """New ids would fetch another expert's."""
    assert isinstance(proof_of(Scaled()), Skip)


class OneIsSpecial(Block):
    """Of many experts the last is none: its slots count nothing."""

    def __init__(self, special):
        super().__init__(experts=64, top_k=2)
        self.special = special

    def dispatch(self, x, ids, weights):
        weights = weights * (ids != self.special)
        return Indexed.dispatch(self, x, ids, weights)


@pytest.mark.parametrize("tokens", [2, 10])
@pytest.mark.parametrize("special", [0, 3, 40, 63])
def test_one_of_many_experts_that_is_told_by_its_number(special, tokens):
    """Every expert is re-routed once."""
    refusal = proof_of(OneIsSpecial(special), x=rows(tokens))
    assert isinstance(refusal, Skip)
    assert "is off by" in refusal.detail


def test_a_number_that_no_expert_has():
    assert isinstance(proof_of(OneIsSpecial(64)), Proof)


class AtBorders(Block):
    """Of many experts tokens read one behind the ids at borders of a mask: nowhere where it is all one."""

    def __init__(self, change):
        super().__init__(experts=64, top_k=2)
        self.change = change

    def forward(self, x, real):
        border = real ^ real.roll(1, 0)
        return Indexed.dispatch(self, x, *self.change(border, *self.route(x)))


@pytest.mark.parametrize("number", [3, 40])
def test_an_expert_that_a_mask_sends_tokens_to(number):
    """That one is re-routed while the mask marks some tokens."""
    module = AtBorders(lambda border, ids, weights: (ids * ~border + number * border, weights))
    refusal = proof_of(module, from_dynamo, None, torch.ones(10, 1, dtype=torch.bool))
    assert isinstance(refusal, Skip)
    assert "is off by" in refusal.detail


def test_a_mask_that_sends_no_token_elsewhere():
    module = AtBorders(lambda border, ids, weights: (ids, weights * ~border))
    assert isinstance(proof_of(module, from_dynamo, None, torch.ones(10, 1, dtype=torch.bool)), Proof)


class MaskedIds(Block):
    """A bias keeps expert 0 among every token's best; the mask sends tokens there, too."""

    def __init__(self, masked):
        super().__init__(top_k=4)
        self.bias = nn.Parameter(torch.tensor([0.75, *[0.0] * (EXPERTS - 1)]), requires_grad=False)
        self.masked = masked

    def forward(self, x, real):
        scores = F.linear(x, self.router).sigmoid()
        ids = (scores + self.bias).topk(self.top_k, dim=-1)[1]
        return Indexed.dispatch(self, x, *self.masked(ids, scores.gather(-1, ids), real))


def test_an_expert_that_no_draw_re_routes_under_a_mask():
    """It must not act on tokens that do not name it; one that acts on its own tokens alone may stay."""
    real = torch.ones(10, 1, dtype=torch.bool)
    module = MaskedIds(lambda ids, weights, real: (ids * real, weights))
    refusal = proof_of(module, from_dynamo, None, real)
    assert isinstance(refusal, Skip)
    assert "expert 0 acts on tokens that do not name it" in refusal.detail
    assert isinstance(
        proof_of(MaskedIds(lambda ids, weights, real: (ids, weights * real)), from_dynamo, None, real), Proof
    )


class Capacity(Block):
    """Each expert takes its first slots only, numbered by comparing all pairs."""

    def __init__(self, places):
        super().__init__(top_k=2)
        self.places = places

    def dispatch(self, x, ids, weights):
        slots = ids.reshape(-1)
        number = torch.arange(slots.shape[0])
        earlier = (slots[:, None] == slots[None]) & (number[:, None] > number[None])
        weights = weights * (earlier.sum(1) < self.places).view(weights.shape)
        return Indexed.dispatch(self, x, ids, weights)


def test_tokens_that_are_dropped_only_where_there_are_many():
    """A graph for any number of tokens is run on many."""
    refusal = proof_of(Capacity(50), dynamic=True)
    assert isinstance(refusal, Skip)
    assert "tokens" in refusal.detail


def test_a_graph_for_one_number_of_tokens_drops_none():
    assert isinstance(proof_of(Capacity(50), dynamic=False), Proof)


class FirstOnly(Block):
    """The experts of the first choice only; the second is for a loss."""

    def forward(self, x):
        scores = self.scores(x)
        values, ids = torch.topk(scores, 2, dim=-1)
        y = torch.tanh(x[:, None] @ self.experts[ids[:, 0]]).squeeze(1) * values[:, :1]
        return y, (F.one_hot(ids, EXPERTS).float().mean((0, 1)) * scores.mean(0)).sum()


def test_a_rewrite_that_would_change_nothing_is_none():
    """First choices are never re-routed: nothing would be saved, and a report would say that it is."""
    refusal = proof_of(FirstOnly())
    assert isinstance(refusal, Skip)
    assert "no token changed" in refusal.detail


def test_masks_of_a_scatter_are_still_proven():
    assert isinstance(proof_of(ScatterCombine(), dynamic=True), Proof)


class Picks(Block):
    """A mask of the ids sends tokens and picks their weights out of the table of all scores; `keep` changes it."""

    def __init__(self, keep=lambda mask, *_: mask, bend=lambda picked: picked, experts=EXPERTS):
        super().__init__(experts, top_k=2)
        self.keep, self.bend = keep, bend

    def forward(self, x):
        scores = self.scores(x)
        values, ids = torch.topk(scores, self.top_k, dim=-1)
        named = F.one_hot(ids, self.num_experts).float()
        mask = self.keep(named.amax(1), named, scores, values)
        picked = self.bend(scores * mask)
        return torch.einsum("te,eth->th", picked, self.all_experts(mask.T[..., None] * x))


def second_that_weighs(mask, named, scores, values):
    kept = torch.cat([torch.ones_like(values[:, :1]), (values[:, 1:] > 0.45).float()], 1)
    return (named * kept[..., None]).amax(1)


def top_p(mask, named, scores, values):
    before = values.cumsum(-1) - values
    return (named * (before < 0.999)[..., None]).amax(1)


def none_at_the_end(mask, named, scores, values):
    return mask * torch.cat([torch.ones(EXPERTS - 1), torch.zeros(1)])


KEEPS = {
    "a second expert that weighs enough": second_that_weighs,
    "experts up to a share of all": top_p,
    "scores above a bound, as a mask": lambda mask, named, scores, values: mask * (scores > 0.499),
    "scores above a bound, as a number": lambda mask, named, scores, values: mask * (scores - 0.499).relu().sign(),
    "a score that is no expert's": none_at_the_end,
    "by the largest score": lambda mask, named, scores, values: mask * (scores.amax(-1, keepdim=True) < 0.9999),
    "by how many chose the expert": lambda mask, named, scores, values: mask * (mask.sum(0) < 40),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("keep", KEEPS)
def test_a_mask_that_takes_a_slot_only_sometimes(keep, dynamic):
    """Made-up scores may never show such a slot: scores have no say in a mask that picks weights out of a table."""
    proof = proof_of(Picks(KEEPS[keep]), dynamic=dynamic)
    if keep == "by how many chose the expert" and not dynamic:  # a graph for so few tokens never leaves one out
        assert proof.tables
        return
    assert isinstance(proof, Skip), keep


PICKED = {
    "large ones are less": lambda picked: picked.clamp(max=0.9),
    "small ones are none": lambda picked: torch.where(picked > 0.02, picked, 0.0),
    "by the largest": lambda picked: picked / picked.amax(-1, keepdim=True),
}


@pytest.mark.parametrize("bend", PICKED)
def test_picked_weights_that_bend(bend):
    assert isinstance(proof_of(Picks(bend=PICKED[bend])), Skip)


@pytest.mark.parametrize("tracer", TRACERS)
def test_picked_weights_that_do_not_bend(tracer):
    """Also divided by their sum, and in a graph for any number of tokens."""
    assert proof_of(Picks(), TRACERS[tracer]).tables
    assert proof_of(Picks(bend=lambda picked: picked / picked.sum(-1, keepdim=True)), TRACERS[tracer]).tables
