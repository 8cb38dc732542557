"""What a refusal says of the weights behind ids that reach no experts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.passes import SkipReason, find_gates

from ..moe_modules import EXPERTS, HIDDEN, TOP_K, TRACERS, rows


class Around(nn.Module):
    """A router, and a dispatch to weights of some sizes."""

    def __init__(self, dispatch, *sizes, table=None):
        super().__init__()
        self.router = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.weights = nn.Parameter(torch.randn(sizes))
        self.shared = nn.Parameter(torch.randn(HIDDEN, HIDDEN))
        self.register_buffer("table", table)
        self.dispatch = dispatch

    def forward(self, x):
        weights, ids = F.linear(x, self.router).softmax(-1).topk(TOP_K)
        return self.dispatch(self, x, weights, ids)


def experts(s, x, weights, ids):
    return torch.einsum("th,tkhf,tk->tf", x, s.weights[ids], weights)


def shared_fused(s, x, weights, ids):
    ids = torch.cat([ids, torch.full_like(ids[:, :1], EXPERTS)], -1)
    return experts(s, x, torch.cat([weights, torch.ones_like(weights[:, :1])], -1), ids)


def local(s, x, weights, ids):
    here = (ids >= 2) & (ids < 6)
    return experts(s, x, torch.where(here, weights, 0.0), torch.where(here, ids - 2, 0))


def of_a_layer(s, x, weights, ids):
    return experts(s, x, weights, ids + EXPERTS)


def mapped(s, x, weights, ids):
    return experts(s, x, weights, s.table[ids])


def copies(s, x, weights, ids):
    return experts(s, x, weights, s.table[ids, (torch.arange(x.shape[0]) % 2)[:, None]])


def merged(s, x, weights, ids):
    return torch.einsum("th,thf->tf", x, (s.weights[ids] * weights[..., None, None]).sum(1))


def scaled(s, x, weights, ids):
    return (x[:, None] * s.weights[ids] * weights[..., None]).sum(1)


def vectors(s, x, weights, ids):
    chosen = F.embedding(ids, s.weights.flatten(1)).view(*ids.shape, HIDDEN, HIDDEN)
    return torch.einsum("th,tkhf,tk->tf", x, chosen, weights)


def some_named(s, x, weights, ids):
    return sum(((ids == number) * weights).sum(-1, keepdim=True) * (x @ s.weights[number]) for number in range(5))


def counted(s, x, weights, ids):
    return ids.float().cos(), weights


def behind_a_matrix(s, x, weights, ids):
    """What lies behind a matrix of all tokens is another part of the model."""
    read = (ids.float() * weights).sum(-1, keepdim=True).expand(-1, HIDDEN) @ s.shared
    return torch.einsum("th,ehf->tf", read, s.weights)


def normed(s, x, weights, ids):
    """A vector that all tokens share is no weight of experts."""
    return F.layer_norm((ids.float() * weights).sum(-1, keepdim=True).expand(-1, HIDDEN), (HIDDEN,), s.weights)


MATRIX = (HIDDEN, HIDDEN)
NO_STACK = f"which is no stack of {EXPERTS} matrices, one for each score"
CASES = {
    "a shared expert's id appended": (shared_fused, (EXPERTS + 1, *MATRIX), None, NO_STACK),
    "a rank's experts": (local, (4, *MATRIX), None, NO_STACK),
    "all layers' experts": (of_a_layer, (2 * EXPERTS, *MATRIX), None, NO_STACK),
    "mapped": (mapped, (EXPERTS, *MATRIX), torch.randperm(EXPERTS), "maps the ids to other numbers, by which"),
    "copies": (
        copies, (EXPERTS + 4, *MATRIX), torch.randint(EXPERTS, (EXPERTS, 2)), "maps the ids to other numbers, by which"
    ),
    "merged": (merged, (EXPERTS, *MATRIX), None, "is not multiplied with hidden states slot by slot"),
    "scaled": (scaled, (EXPERTS, HIDDEN), None, f"which holds no matrix for each of the {EXPERTS} scores"),
    "some of the experts": (some_named, (EXPERTS, *MATRIX), None, f"5 numbers, and there are {EXPERTS} scores"),
    "numbers": (counted, MATRIX, None, "and what is made of them leaves the graph"),
    "normed": (normed, (HIDDEN,), None, "ids are read by"),
    "behind a matrix": (behind_a_matrix, (EXPERTS, *MATRIX), None, "ids are read by"),
}  # fmt: skip


@pytest.mark.parametrize("trace", TRACERS)
@pytest.mark.parametrize("case", CASES)
def test_the_nearest_weights_are_told(case, trace):
    """And that they leave the graph only where that is so; a table behind chosen ids is no hash routing."""
    dispatch, sizes, table, expected = CASES[case]
    found = find_gates(TRACERS[trace](Around(dispatch, *sizes, table=table), rows()))
    assert found.gates == ()
    [skip] = found.skips
    assert skip.reason is SkipReason.NO_DISPATCH
    assert expected in skip.detail
    assert ("leaves the graph" in skip.detail) == (case in ("numbers", "normed", "behind a matrix"))


@pytest.mark.parametrize("trace", ["export", "make_fx"])
def test_a_stack_that_is_read_as_vectors(trace):
    [skip] = find_gates(TRACERS[trace](Around(vectors, EXPERTS, *MATRIX), rows())).skips
    assert skip.detail.endswith("as vectors: index the stack of matrices as it is")


def test_ids_that_are_returned():
    [skip] = find_gates(TRACERS["export"](Around(lambda s, x, weights, ids: (weights, ids), 1), rows())).skips
    assert skip.detail == "the graph returns them"
