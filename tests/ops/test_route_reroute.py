"""`sere::route` with re-routing and with groups: one launch gives what the steps one after the other give."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from sere_compile.ops import route
from sere_compile.ops.route.reference import Rerouting, Scoring

from ..thinned import thinned
from . import test_route
from .cases import exact_product, poisoned_memory
from .oracle import destination, union_of_first_slots


@dataclasses.dataclass(frozen=True)
class Case:
    experts: int
    top_k: int
    select: int
    scoring: str = "softmax"
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    groups: tuple = (1, 1, "max", True)
    threshold: float = 0.0
    min_active: int = 0
    max_active: int = 0
    projection: bool = False

    def draw(self, tokens, seed, device):
        generator = torch.Generator().manual_seed(seed)
        logits = (torch.randn(tokens, self.experts, generator=generator) * 2).to(self.dtype)
        if seed % 2:
            logits = logits.round()  # equal scores, within a token and across tokens
        bias = torch.randn(self.experts, generator=generator) if self.bias else None
        similarity = torch.rand(self.experts, self.experts, generator=generator)
        projection = torch.rand(self.experts, self.experts, generator=generator) if self.projection else None
        moved = [None if x is None else x.to(device) for x in (logits, bias, similarity, projection)]
        scoring = Scoring(self.top_k, self.scoring, True, 0.0, 1.5, torch.float32, *self.groups)
        numbers = (self.select, self.threshold, self.min_active, self.max_active)
        return moved[0], moved[1], scoring, Rerouting(moved[2], *numbers, moved[3])


CASES = [
    Case(128, 8, 2, min_active=8),
    Case(128, 8, 1, dtype=torch.float16, threshold=0.98, projection=True),
    Case(60, 6, 3, dtype=torch.float32, scoring="softmax_after", min_active=20),
    Case(37, 5, 2, bias=True, scoring="sigmoid", min_active=37),
    Case(8, 2, 1, scoring="sigmoid", projection=True),
    Case(16, 4, 1, max_active=9),
    Case(16, 4, 1, max_active=3, min_active=6, dtype=torch.float32),
    Case(16, 4, 2, max_active=16, projection=True),
    Case(24, 4, 1, groups=(4, 2, "max", True), min_active=4),
    Case(40, 6, 2, scoring="sigmoid", bias=True, groups=(5, 3, "top2", False), dtype=torch.float32),
    Case(3, 3, 1, scoring="softmax_after"),
]


def oracle(logits, bias, scoring, rerouting):
    """Rows in plain Python, from `tests/ops/oracle.py` and the oracle of routing; ids first limited to groups."""
    weights, ids = routed(logits, bias, scoring)
    rows = ids.tolist()
    count, real = logits.shape[-1], [True] * len(rows)
    unions = [union_of_first_slots(rows, real, count, width) for width in range(1, scoring.top_k + 1)]
    width = rerouting.select_top_k
    if rerouting.max_active:
        width = max([w for w, u in enumerate(unions, 1) if w >= width and len(u) <= rerouting.max_active] or [width])
    while width < scoring.top_k and len(unions[width - 1]) < rerouting.min_active:
        width += 1
    if width >= scoring.top_k:
        return weights, ids
    similarity = rerouting.similarity.float().cpu().numpy()
    primary = unions[width - 1]
    new = [[u if u in primary else destination(u, similarity, primary, rerouting.threshold) for u in r] for r in rows]
    if rerouting.projection is not None:
        for t, k in itertools.product(range(len(rows)), range(scoring.top_k)):
            if new[t][k] != rows[t][k]:
                weights[t, k] *= rerouting.projection[rows[t][k], new[t][k]].item()
    return weights, torch.tensor(new)


def routed(logits, bias, scoring):
    numbers = (scoring.top_k, scoring.scoring, scoring.renormalize, scoring.epsilon, scoring.scale, scoring.dtype)
    if not scoring.is_grouped:
        return test_route.oracle(logits, bias, *numbers)
    # A token's experts outside its groups are as good as far away.
    scores = logits.double().softmax(-1) if scoring.scoring == "softmax" else logits.double().sigmoid()
    choice = scores if bias is None else scores + bias.double()
    open_to, size = torch.zeros_like(choice), logits.shape[-1] // scoring.num_groups
    for row, marks in zip(choice.tolist(), open_to, strict=True):
        groups = [sorted(row[g * size : (g + 1) * size])[::-1] for g in range(scoring.num_groups)]
        ranks = [sum(group[: 1 if scoring.group_score == "max" else 2]) for group in groups]
        for g in sorted(range(len(ranks)), key=lambda g, ranks=ranks: (-ranks[g], g))[: scoring.top_groups]:
            marks[g * size : (g + 1) * size] = 1
    closed = torch.where(open_to > 0, choice, 0.0 if scoring.outside_zero else float("-inf"))
    ids = closed.sort(dim=-1, descending=True, stable=True).indices[:, : scoring.top_k]
    weights = scores.gather(-1, ids)
    return (weights / weights.sum(-1, keepdim=True) * scoring.scale).float(), ids


def flat(settings):
    """The fields of a dataclass in order; `dataclasses.astuple` would copy tensors."""
    return tuple(getattr(settings, field.name) for field in dataclasses.fields(settings))


def on_cpu(arguments):
    moved = [x.cpu() if isinstance(x, torch.Tensor) else x for x in (*arguments[:2], *flat(arguments[3]))]
    return *moved[:2], arguments[2], Rerouting(*moved[2:])


def operator(logits, bias, scoring, rerouting):
    return route(logits, bias, *flat(scoring), *flat(rerouting))


def kernel(logits, bias, scoring, rerouting, tile=None):
    from sere_compile.ops.route.launch import Tile, launch_route

    with poisoned_memory():
        return launch_route(logits, bias, scoring, rerouting, Tile(*tile) if tile else None)


def check(result, want):
    torch.testing.assert_close(result[1].cpu(), want[1], rtol=0, atol=0)
    torch.testing.assert_close(result[0].cpu(), want[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_equals_oracle(case, device):
    """The operator (on CPU its ATen reference) gives the ids and weights of the two steps."""
    for seed, tokens in enumerate((1, 3, 13)):
        arguments = case.draw(tokens, seed, device)
        check(operator(*arguments), oracle(*on_cpu(arguments)))


@pytest.mark.parametrize("case", thinned([CASES[0], CASES[2], CASES[4], CASES[6], CASES[8]], (0, 4)), ids=str)
def test_logits_of_hidden_states(case, device):
    """With the router's weight: what routing gives by their product, whose numbers are exact here."""
    for tokens, width in ((1, 256), (13, 1024), (40, 512), (70, 256), (5, 100)):
        _, bias, scoring, rerouting = case.draw(tokens, 0, device)
        hidden, weight = exact_product(tokens, case.experts, width, torch.bfloat16, device)
        want = operator((hidden.float() @ weight.float().T).bfloat16(), bias, scoring, rerouting)
        got = route(hidden, bias, *flat(scoring), *flat(rerouting), router_weight=weight)
        assert torch.equal(got[1], want[1])
        torch.testing.assert_close(got[0], want[0], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.zeros(4, 9), ValueError, r"router_weight: expected shape \[E, H\] with hidden states"),
        (torch.zeros(8), ValueError, r"router_weight: expected shape \[E, H\]"),
        (torch.zeros(4, 8).half(), TypeError, "router_weight: expected dtype torch.float32"),
        (torch.zeros(1, 8), ValueError, "top_k: expected 1 to E"),
    ],
)
def test_router_weights_that_do_not_fit(weight, error, message):
    for call in (route, torch.ops.sere.route.default):
        with pytest.raises(error, match=message):
            call(torch.zeros(3, 8), None, 2, "softmax", router_weight=weight)


# By default one cut of every other case, in turn.
@pytest.mark.parametrize(
    ("case", "tile"),
    thinned(
        itertools.product(CASES, ((2, 4, 1), None)), [2 * place + place // 2 % 2 for place in range(0, len(CASES), 2)]
    ),
    ids=str,
)
def test_one_launch_equals_oracle(case, tile, kernel_device):
    """The kernel does too, in one step over the tokens, in several, and with rows that fill no program."""
    for seed, tokens in enumerate((1, 3, 13)):
        arguments = case.draw(tokens, seed, kernel_device)
        check(kernel(*arguments, tile), oracle(*on_cpu(arguments)))


@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=str)
def test_two_launches_equal_one(case, kernel_device):
    """Beyond the size for one launch the ids are the same, and the weights up to rounding."""
    arguments = case.draw(20, 1, kernel_device)
    two, one = kernel(*arguments), kernel(*arguments, (8, 32, 4))
    assert torch.equal(two[1], one[1])
    # Sums over a row are taken in the order of the tile.
    torch.testing.assert_close(two[0], one[0], rtol=1e-6, atol=0)


def test_groups_alone(kernel_device):
    """Group-limited selection without re-routing, and with a negative bias, where 0 and -inf outside differ."""
    logits, bias = (
        torch.tensor([[5.0, 4.0, 3.0, 2.0]], device=kernel_device),
        torch.full((4,), -2.0, device=kernel_device),
    )
    for outside_zero, ids in ((True, [[2, 3, 0]]), (False, [[0, 1, 2]])):
        scoring = Scoring(3, "sigmoid", num_groups=2, top_groups=1, outside_zero=outside_zero)
        for run in (operator, kernel):
            assert run(logits, bias, scoring, Rerouting())[1].tolist() == ids


@pytest.mark.parametrize("case", thinned([CASES[0], CASES[1], CASES[8]], (2,)), ids=str)
def test_opcheck(case):
    """Schema, fake implementation and tracing agree with the operator."""
    logits, bias, scoring, rerouting = case.draw(5, 0, "cpu")
    torch.library.opcheck(torch.ops.sere.route.default, (logits, bias, *flat(scoring), *flat(rerouting)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"similarity": torch.zeros(4, 3)}, ValueError, r"similarity: expected shape \[E, E\]"),
        ({"similarity": torch.zeros(3, 3)}, ValueError, r"similarity: expected shape \[4, 4\]"),
        ({"similarity": torch.zeros(4, 4), "min_active": -1}, ValueError, "min_active: expected 0"),
        ({"max_active": -1}, ValueError, "max_active: expected 0"),
        (
            {"similarity": torch.zeros(4, 4), "projection": torch.zeros(4, 4).half()},
            TypeError,
            "projection: expected dtype torch.float32",
        ),
        ({"num_groups": 3}, ValueError, "num_groups: expected a divisor of 4"),
        ({"num_groups": 2, "top_groups": 3}, ValueError, "top_groups: expected 1 to 2"),
        ({"group_score": "mean"}, ValueError, "group_score: expected one of max, top2"),
        ({"num_groups": 4, "group_score": "top2"}, ValueError, "top2 needs groups of two experts"),
    ],
)
def test_refusals(change, error, message):
    """Each wrong argument is named, with what was expected."""
    with pytest.raises(error, match=message):
        route(torch.zeros(2, 4), None, 2, "softmax", **change)
