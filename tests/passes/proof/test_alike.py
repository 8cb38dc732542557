"""Why no expert can stand in another's place: parts that differ, or code that tells experts apart."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.passes import Proof, Skip, SkipReason, verify_rewrite
from sere_compile.passes.graph import nodes
from sere_compile.passes.proof.alike import unlike_code, unlike_parameters
from sere_compile.passes.proof.expert_parameters import ExpertParameters, Stack

from ..moe_modules import EXPERTS, HIDDEN, TOP_K, BiasCorrected, Indexed, from_dynamo, one_gate, rows
from ..test_verify_rewrite import weights_of
from .regions import region_of, run_of, told, values_of


class Loop(nn.Module):
    """One module per expert, and a weighed sum over all tokens."""

    def __init__(self, experts=None):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.router = nn.Parameter(torch.randn(EXPERTS, HIDDEN, generator=generator))
        experts = [self.expert(number) for number in range(EXPERTS)] if experts is None else experts
        self.experts = nn.ModuleList(experts)

    def expert(self, number):
        return nn.Sequential(nn.Linear(HIDDEN, 5), nn.SiLU(), nn.Linear(5, HIDDEN))

    def act(self, number, x):
        return self.experts[number](x)

    def forward(self, x):
        weights, ids = F.linear(x, self.router).softmax(-1).topk(TOP_K)
        y = torch.zeros_like(x)
        for number in range(EXPERTS):
            share = ((ids == number) * weights).sum(-1, keepdim=True)
            given = self.act(number, x)
            y = y if given is None else y + share * given
        return y


class SwitchedOff(Loop):
    def act(self, number, x):
        return None if number in (2, 5) else super().act(number, x)


class OnlyOneOff(Loop):
    def act(self, number, x):
        return None if number == 2 else super().act(number, x)


class Identity(Loop):
    def act(self, number, x):
        return x if number >= EXPERTS - 1 else super().act(number, x)


class Widths(Loop):
    def expert(self, number):
        return nn.Sequential(nn.Linear(HIDDEN, 5 + number), nn.SiLU(), nn.Linear(5 + number, HIDDEN))


class Twice(Loop):
    """One module of the pool stands for two experts."""

    def __init__(self):
        super().__init__()
        self.experts[4] = self.experts[1]


class Activations(Loop):
    def act(self, number, x):
        first, _, second = self.experts[number]
        return second(F.relu(first(x)) if number % 2 else F.gelu(first(x)))


class Hooked(Loop):
    """As a hook on one expert changes what it gives."""

    def act(self, number, x):
        return super().act(number, x) * (1.0 if number else 0.5)


class InSequence(Loop):
    def forward(self, x):
        weights, ids = F.linear(x, self.router).softmax(-1).topk(TOP_K)
        for number, expert in enumerate(self.experts):
            x = x + ((ids == number) * weights).sum(-1, keepdim=True) * expert(x)
        return x


class OneMore(Indexed):
    """Stacked experts, of which the last has a matrix beside its part."""

    def __init__(self):
        super().__init__()
        self.beside = nn.Parameter(torch.randn(HIDDEN, HIDDEN))

    def dispatch(self, x, ids, weights):
        share = ((ids == EXPERTS - 1) * weights).sum(-1, keepdim=True)
        return super().dispatch(x, ids, weights) + share * (x @ self.beside)


class Again(Indexed):
    """The ids serve a second set of experts, weighed by another router's scores for them."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.other = nn.Parameter(torch.randn(EXPERTS, HIDDEN, generator=generator))
        self.later = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator))

    def dispatch(self, x, ids, weights):
        x = x + super().dispatch(x, ids, weights)
        again = F.linear(x, self.other).softmax(-1).gather(1, ids)
        return x + torch.einsum("th,tkhf,tk->tf", x, self.later[ids], again)


def refusal_of(module):
    graph = from_dynamo(module, rows())
    found = verify_rewrite(one_gate(graph), weights_of(graph))
    assert isinstance(found, Skip)
    return found


PARTS = "on the way to "
CODE = "where each has the scores and the parameters of the one before it, "


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (SwitchedOff, "experts 2 and 5 have no parameter of their own " + PARTS),
        (OnlyOneOff, "expert 2 has no parameter of its own " + PARTS),
        (Identity, f"expert {EXPERTS - 1} has no parameter of its own " + PARTS),
        (Twice, "experts 1 and 4 have no parameter of their own " + PARTS),
        (InSequence, "experts 1, 2, 3, 4, 5, 6 and 1 other have no parameter of their own " + PARTS),
        (Widths, f"expert 0 has parameters of [{HIDDEN}, 5], and expert 1 of [{HIDDEN}, 6]"),
        (OneMore, f"expert {EXPERTS - 1} has parameters beside those that all experts have"),
        (Activations, CODE),
        (Hooked, CODE),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_refusal_says_how_experts_differ(module, told):
    """And not that weights could not be found to merge: merged they would be as wrong."""
    refusal = refusal_of(module())
    assert refusal.reason is SkipReason.NOT_ALIKE
    assert refusal.detail.startswith(told)


def test_another_router_s_scores_say_nothing():
    """They are not turned with those of the first: experts may well be alike."""
    assert refusal_of(Again()).reason is not SkipReason.NOT_ALIKE


def test_experts_that_are_alike_are_re_routed():
    graph = from_dynamo(Indexed(), rows())
    assert isinstance(verify_rewrite(one_gate(graph), weights_of(graph)), Proof)


def ready(module):
    """A region with its draws and parameters."""
    region = region_of(module, from_dynamo)
    experts, sources = told(region)
    return region, run_of(region), [values_of(region, n) for n in range(4)], experts, sources.router


@pytest.mark.parametrize("module", [Indexed, BiasCorrected], ids=lambda m: m.__name__)
def test_alike(module):
    """Scores, parameters and the router's own numbers are turned together."""
    assert unlike_code(*ready(module())) is None


def test_what_the_router_does_not_turn_says_nothing():
    """Parameters turned without the bias of the router: other experts are chosen."""
    region, run, draws, experts, router = ready(BiasCorrected())
    assert router
    bias = next(iter(router))
    for values in draws:
        values[bias] = 4.0 * torch.arange(EXPERTS)
    assert unlike_code(region, run, draws, experts, set()) is None
    assert unlike_code(region, run, draws, ExpertParameters(), set()) is None
    assert unlike_code(region, run, draws, ExpertParameters(), router) is None


def test_parameters_in_a_stack_say_nothing():
    region, _, _, experts, _ = ready(Indexed())
    [stack] = experts.stacks
    assert unlike_parameters({}, experts, region, {}) is None
    owners = dict.fromkeys(region.graph.nodes, 0)
    assert stack in owners
    sizes = dict.fromkeys(owners, (1,))
    assert unlike_parameters(owners, ExpertParameters({stack: Stack(0, EXPERTS)}), region, sizes).startswith(
        "experts 1, 2, 3, 4, 5, 6 and 1 other have no parameter of their own on the way to "
    )
    assert nodes.shape(stack) is not None
