"""Whether a run computes every expert for every token."""

import pytest
import torch
import torch.nn.functional as F

from sere_compile.compiler.expert_products import WatchProducts

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
