"""Whether the code that receives a router's ids sends tokens to other experts, or to none, as it may padding."""

from __future__ import annotations

import contextlib
import itertools
import random

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ...experts.trial_block import ExpertSlices
from .arguments import Arguments, half_masked
from .made_up_choices import DRAWS
from .results import changed_rows
from .trial import Trial

SENT_ELSEWHERE = (
    "outside the graph some tokens go to other experts than it chose, or to none, as padding does: mark their ids with "
    "-1 before the graph ends"
)


def sends_elsewhere(trial: Trial, experts: list[ExpertSlices], inputs: Arguments) -> bool:
    """Whether the code outside changes ids before the experts get them, as those of padding: it may count no token.

    An expert that padding would be sent to must do nothing where nobody chose it, and what a token chose must do
    something, whatever a mask of tokens among the inputs says. (One of attention may leave a token nothing.)
    """
    trial.run(inputs)
    tokens = trial.graphs.ids[0].numel() // trial.gate.top_k
    masked = tree_map(lambda value: half_masked(value, tokens), inputs)
    has_mask = any(a is not b for a, b in zip(tree_leaves(masked), tree_leaves(inputs), strict=True))
    calls = [inputs, *([masked] if has_mask else []), *trial.other_calls(inputs)]
    return any(_adds_tokens(trial, experts, given) or _misses_tokens(trial, experts, given) for given in calls)


def _adds_tokens(trial: Trial, experts: list[ExpertSlices], inputs: Arguments) -> bool:
    """Whether the first or last expert does something for tokens that did not choose it."""
    count = trial.block.num_experts
    for expert in (0, count - 1) if trial.gate.top_k < count else ():
        before = trial.run(inputs, seed=1, absent=expert)
        with contextlib.ExitStack() as stack:
            for one in experts:
                stack.enter_context(trial.block.disturbed(one, expert))
            after = trial.run(inputs, seed=1, absent=expert)
        if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            return True
    return False


def _misses_tokens(trial: Trial, experts: list[ExpertSlices], inputs: Arguments) -> bool:
    """Whether some tokens with a choice are the same in every draw, whatever their experts are, or go to others."""
    served: torch.Tensor | None = None
    for seed in range(DRAWS):
        before, after = trial.with_exchange(experts, inputs, seed=seed)
        ids = trial.graphs.ids[0].reshape(-1, trial.gate.top_k)  # the same in both runs
        changed = changed_rows(before, after, len(ids))
        if changed is None:
            return False
        if _takes_others(trial, experts, inputs, seed, before, ids):
            return True
        unmarked = ((ids >= 0) & (ids < trial.block.num_experts)).any(-1).to(changed.device)
        found = changed | ~unmarked
        served = found if served is None else served | found
    # Where none is served, a flag switches the experts off.
    return served is not None and bool(served.any()) and not bool(served.all())


def _takes_others(
    trial: Trial,
    experts: list[ExpertSlices],
    inputs: Arguments,
    seed: int,
    before: list[torch.Tensor],
    ids: torch.Tensor,
) -> bool:
    """Whether some experts do something for tokens that chose none of them, as where padding takes others' choice.

    Args:
        trial: of the block.
        experts: the parameters of all.
        inputs: of the run.
        seed: of the run.
        before: what it returned.
        ids: that it chose, int [T, K].
    """
    some = random.Random(seed).sample(range(trial.block.num_experts), max(1, trial.block.num_experts // 2))
    with contextlib.ExitStack() as stack:
        for one, expert in itertools.product(experts, some):
            stack.enter_context(trial.block.disturbed(one, expert))
        changed = changed_rows(before, trial.run(inputs, seed=seed), len(ids))
    names = torch.isin(ids, torch.tensor(some, device=ids.device)).any(-1)
    return changed is not None and bool((changed & ~names.to(changed.device)).any())
