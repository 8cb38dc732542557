"""`sere::route` with `fill=True`: the kernels give what selecting and filling one after the other give."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sere_compile.ops import route
from sere_compile.ops.route.reference import Rerouting, Scoring

from ..thinned import thinned
from . import fill_oracle
from .cases import poisoned_memory
from .test_route_reroute import flat, routed


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
    weights: torch.dtype = torch.float32

    def draw(self, tokens, seed, device):
        generator = torch.Generator().manual_seed(seed)
        common = torch.randn(self.experts, generator=generator) * 2
        logits = (torch.randn(tokens, self.experts, generator=generator) + common).to(self.dtype)
        if seed % 2:
            logits = logits.round()  # equal scores, within a token and across tokens
        bias = torch.randn(self.experts, generator=generator) if self.bias else None
        scoring = Scoring(self.top_k, self.scoring, True, 0.0, 1.5, self.weights, *self.groups)
        filling = Rerouting(None, self.select, self.threshold, self.min_active, self.max_active, None, True)
        return logits.to(device), None if bias is None else bias.to(device), scoring, filling


CASES = [
    Case(128, 8, 2, min_active=8),
    Case(128, 8, 1, dtype=torch.float16, threshold=0.1),
    Case(60, 6, 3, dtype=torch.float32, scoring="softmax_after", min_active=20),
    Case(37, 5, 2, bias=True, scoring="sigmoid", min_active=9),
    Case(8, 2, 1, scoring="sigmoid"),
    Case(16, 4, 1, max_active=9),
    Case(24, 4, 1, groups=(4, 2, "max", True)),
    Case(40, 6, 2, scoring="sigmoid", bias=True, groups=(5, 3, "top2", False), dtype=torch.float32),
    Case(32, 4, 1, scoring="sigmoid", bias=True, groups=(4, 1, "top2", True), max_active=6),
    Case(3, 3, 1, scoring="softmax_after"),
    Case(512, 16, 2, dtype=torch.float32, scoring="sigmoid"),
]


def closed_choice(logits, bias, scoring):
    """What ranks, in double precision, -inf outside of a token's groups."""
    scores = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid}.get(scoring.scoring, lambda x: x)(logits)
    choice = scores if bias is None else scores + bias
    if not scoring.is_grouped:
        return (logits if bias is None else choice).tolist()
    size, rows = logits.shape[-1] // scoring.num_groups, []
    for row in choice.tolist():
        groups = [sorted(row[g * size : (g + 1) * size])[::-1] for g in range(scoring.num_groups)]
        ranks = [sum(group[: 1 if scoring.group_score == "max" else 2]) for group in groups]
        open_to = sorted(range(len(ranks)), key=lambda g, ranks=ranks: (-ranks[g], g))[: scoring.top_groups]
        rows.append([c if u // size in open_to else float("-inf") for u, c in enumerate(row)])
    return rows


def oracle(logits, bias, scoring, filling, rows, weights):
    """(weights, ids) of filling the selected rows, in plain Python."""
    logits = logits.double().cpu()
    bias = None if bias is None else bias.double().cpu()
    scores = logits.sigmoid() if scoring.scoring == "sigmoid" else logits.softmax(-1)
    new_ids, new = fill_oracle.fill_rows(
        rows.tolist(), weights.double().tolist(), scores.tolist(), filling.select_top_k,
        choice=closed_choice(logits, bias, scoring), threshold=filling.threshold, min_active=filling.min_active,
        max_active=filling.max_active,
    )  # fmt: skip
    return torch.tensor(new, dtype=torch.float64), torch.tensor(new_ids)


def selected(logits, bias, scoring):
    """Weights and ids before filling: `sere::route` itself, which test_route and test_route_reroute prove."""
    return route(logits, bias, *flat(scoring))


def kernel(logits, bias, scoring, filling):
    from sere_compile.ops.route.launch import launch_route

    with poisoned_memory():
        return launch_route(logits, bias, scoring, filling)


def operator(logits, bias, scoring, filling):
    return route(logits, bias, *flat(scoring), *flat(filling))


def check(run, case, tokens, seed, device):
    arguments = case.draw(tokens, seed, device)
    weights, ids = (t.cpu() for t in selected(*arguments[:3]))
    want = oracle(*arguments, ids, weights)
    result = run(*arguments)
    torch.testing.assert_close(result[1].cpu(), want[1], rtol=0, atol=0)
    torch.testing.assert_close(result[0].cpu().double(), want[0], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_equals_oracle(case, device):
    """The operator (on CPU its ATen reference) gives the ids and weights of the two steps."""
    for seed, tokens in enumerate((1, 3, 13, 40)):
        check(operator, case, tokens, seed, device)


@pytest.mark.parametrize("case", thinned(CASES, (4,)), ids=str)
def test_kernels_equal_oracle(case, kernel_device):
    """The kernels do too: one token, rows that fill no program, and several tokens a row of statistics."""
    for seed, tokens in enumerate((1, 5, 70) if case.experts < 500 else (5,)):
        check(kernel, case, tokens, seed, kernel_device)


REAL, TAKING_PART = 5, 3  # of seven tokens


def some(run, logits, bias, scoring, filling):
    """The weights and ids of a call of which two tokens are padding, and two more take no part."""
    numbers = {name: torch.tensor([n], device=logits.device) for name, n in (("real", REAL), ("rerouted", TAKING_PART))}
    filling = dataclasses.replace(filling, real_tokens=numbers["real"], rerouted_tokens=numbers["rerouted"])
    return [t.cpu() for t in run(logits, bias, scoring, filling)]


def check_some(run, case, device):
    logits, bias, scoring, filling = case.draw(7, 0, device)
    weights, ids = some(run, logits, bias, scoring, filling)
    filled = [t.cpu() for t in run(logits[:TAKING_PART], bias, scoring, filling)]
    before = [t.cpu() for t in selected(logits, bias, scoring)]
    close = {"rtol": 2e-5, "atol": 1e-7}
    assert torch.equal(ids[:TAKING_PART], filled[1])
    torch.testing.assert_close(weights[:TAKING_PART], filled[0], **close)
    assert torch.equal(ids[TAKING_PART:REAL], before[1][TAKING_PART:REAL])
    torch.testing.assert_close(weights[TAKING_PART:REAL], before[0][TAKING_PART:REAL], **close)
    assert (ids[REAL:] == -1).all()
    assert (weights[REAL:] == 0).all()
    none = dataclasses.replace(filling, rerouted_tokens=torch.zeros(1, dtype=torch.int64, device=device))
    weights, ids = (t.cpu() for t in run(logits, bias, scoring, none))
    assert torch.equal(ids, before[1])
    torch.testing.assert_close(weights, before[0], **close)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_that_take_no_part_keep_their_experts(case, device):
    """And say nothing about those of the others; padding has none."""
    check_some(operator, case, device)


@pytest.mark.parametrize("case", thinned(CASES, (3,)), ids=str)
def test_they_do_in_the_kernels(case, kernel_device):
    """With two launches of Triton's and a choice."""
    check_some(kernel, case, kernel_device)


@pytest.mark.slow
def test_many_tokens_take_the_statistics_of_ids(kernel_device):
    """Beyond what the first launch sums, a launch of its own does."""
    check(kernel, Case(8, 2, 1), 300, 0, kernel_device)


def test_a_selection_that_groups_exhaust(device):
    """Filling stays inside the open groups where the selection itself took an expert of score 0 from outside."""
    logits = torch.tensor([[2.0, 1.0, -1.0, -2.0], [-2.0, -1.0, 1.0, 2.0]], device=device)
    scoring = Scoring(3, "sigmoid", num_groups=2, top_groups=1)
    weights, ids = route(logits, None, *flat(scoring), *flat(Rerouting(None, 1, max_active=3, fill=True)))
    before = route(logits, None, *flat(scoring))[1]
    assert before.tolist() == [[0, 1, 2], [3, 2, 0]]
    # Kept are 0, 3 and the heavier of 1 and 2. The first token loses 1; 3 is of the other group.
    assert ids.tolist() == [[0, 3, 2], [3, 2, 0]]
    assert weights[0, 1] == 0


@pytest.mark.parametrize("case", thinned([CASES[0], CASES[3], CASES[6]], (1,)), ids=str)
def test_opcheck(case):
    """Schema, fake implementation and tracing agree with the operator."""
    logits, bias, scoring, filling = case.draw(5, 0, "cpu")
    torch.library.opcheck(torch.ops.sere.route.default, (logits, bias, *flat(scoring), *flat(filling)))


def test_refusals():
    """A similarity beside filling, and a negative number of experts."""
    with pytest.raises(ValueError, match="similarity: filling goes by"):
        route(torch.zeros(2, 4), None, 2, "softmax", similarity=torch.zeros(4, 4), fill=True)
    with pytest.raises(ValueError, match="min_active: expected 0"):
        route(torch.zeros(2, 4), None, 2, "softmax", min_active=-1, fill=True)


def test_routed_agrees_with_the_other_oracle():
    """The choice that this file ranks by selects what the oracle of routing selects."""
    for case in CASES[:8]:
        logits, bias, scoring, _ = case.draw(5, 0, "cpu")
        ids = selected(logits, bias, scoring)[1]
        assert torch.equal(ids, routed(logits, bias, scoring)[1])
