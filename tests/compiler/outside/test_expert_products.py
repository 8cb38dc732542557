"""Whether a run computes every expert for every token."""

import pytest
import torch
import torch.nn.functional as F

from sere_compile.compiler.outside.expert_products import WatchProducts, computes_all
from sere_compile.passes import SkipReason

from .blocks import EXPERTS, HIDDEN, Block, Experts, InVmap, rows
from .trials import EagerTrial, parameters, verdicts

T, E, H = 5, 4, 8


def seen(run, shapes=((E, H, H),), leading=(T,)):
    parameters = [torch.randn(shape) for shape in shapes]
    with WatchProducts(parameters, T, E) as watch:
        run(torch.randn(*leading, H), *parameters)
    return watch.makes_all


@pytest.mark.parametrize(
    "run",
    [
        lambda x, w: torch.bmm(x.expand(E, T, H), w),
        lambda x, w: torch.einsum("th,eho->teo", x, w),
        lambda x, w: torch.stack([x @ w[e] for e in range(E)], 1),
        lambda x, w: torch.stack([F.linear(x, w[e], torch.ones(H)) for e in range(E)], 1),
        lambda x, w: torch.baddbmm(torch.zeros(E, T, H), x.expand(E, T, H), w),
        lambda x, w: (x[:, None, :, None] * w).sum(2),
    ],
)
def test_all_of_them(run):
    assert seen(run)


def test_experts_apart_and_tokens_of_sequences():
    assert seen(lambda x, *w: torch.stack([x @ one for one in w], -2), [(H, H)] * E, (1, T))


@pytest.mark.parametrize(
    "run",
    [
        lambda x, w: (x[:, None, None, :] @ w[torch.arange(2 * T).view(T, 2) % E]).sum(1),  # fetched
        lambda x, w: torch.bmm(x[:2].expand(E, 2, H), w).new_zeros(T, E, H) + 1,  # few rows of each
        lambda x, w: sum(x @ w[e] for e in range(E)),  # no table
        lambda x, w: torch.bmm(x.expand(E, T, H)[:2], w[:2]).new_zeros(T, E, H) + 1,  # two of them
        lambda x, w: x.view(T, 1, H) + w[:1, 0],  # none
    ],
)
def test_some_of_them(run):
    assert not seen(run)


def test_vectors_are_no_matrices():
    assert not seen(lambda x, b: x[:, None] + b.view(E, 1) + torch.zeros(T, E, H), [(E,)])


class Dense(Experts):
    """All experts compute every token, and a table picks; a buffer counts the calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x, ids, weights):
        self.calls += 1
        outputs = torch.stack([torch.tanh(x @ w) for w in self.w], 1)
        x.zero_()
        return torch.einsum("te,teh->th", x.new_zeros(len(x), EXPERTS).scatter(1, ids, weights), outputs)


def test_experts_that_all_compute_every_token_are_told():
    """A table picks of what all of them give: re-routing is right, and saves nothing."""
    [verdict] = verdicts(Block(InVmap()), rows())
    assert verdict.merged is not None
    assert verdict.saves_nothing.startswith(SkipReason.DENSE.value)
    assert "seen in a run of" in verdict.saves_nothing


class TestArgumentsOfATrial:
    X = torch.randn(5, HIDDEN)

    def test_every_expert_that_computes_every_token(self):
        """Nothing is left of the run in which that is seen."""
        for experts, every in ((Dense(), True), (Experts(), False)):
            trial = EagerTrial(experts)
            inputs = ((self.X.clone(),), {})
            trial.run(inputs)
            [w] = parameters(trial, "experts.w")
            before = {name: value.clone() for name, value in trial.block.module.state_dict().items()}
            assert computes_all(trial, [w], inputs) is every
            assert torch.equal(inputs[0][0], self.X)
            assert all(torch.equal(value, before[name]) for name, value in trial.block.module.state_dict().items())
