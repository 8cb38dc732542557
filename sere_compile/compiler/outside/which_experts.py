"""Which parameters of a block are its experts', seen in runs in which others stand in their place."""

from __future__ import annotations

import logging

import torch
from torch.utils._pytree import tree_map

from ...experts.trial_block import ExpertSlices
from ...passes.graph.failures import FAILURES, short
from .arguments import Arguments, turned
from .results import changed_rows, close, floats
from .trial import Trial, shift

log = logging.getLogger(__name__)


def find_experts(trial: Trial, candidates: list[ExpertSlices], inputs: Arguments) -> list[ExpertSlices] | str:
    """The parameters that act on the hidden states of one expert's tokens alone; or why there are none."""
    base = trial.run(inputs)
    ids, weights = trial.graphs.ids[0], [w.clone() for w in trial.graphs.weights]
    taken: list[ExpertSlices] = []
    for one in candidates:
        if any(tensor is other for tensor in one.tensors for known in taken for other in known.tensors):
            continue
        if _belongs_to_experts(trial, one, inputs, base, ids, weights):
            taken.append(one)
    taken = [one for one in taken if not _scales_weights(trial, one, taken, inputs)]
    if not taken:
        return (
            f"no parameter that comes once per score ({trial.block.num_experts}) acts on the tokens of one expert alone"
        )
    if all(one.dim is not None and _is_vector(one.parts(trial.block.num_experts)[0]) for one in taken):
        return "what its indices fetch are vectors, which act on no hidden states: values of a table, no experts"
    if not _acts_on_hidden(trial, taken, inputs):
        return "what its indices fetch is added up whatever the hidden states are: values of a table, no experts"
    return taken


def weighs_nothing(trial: Trial, experts: list[ExpertSlices], inputs: Arguments) -> bool:
    """Whether other scores for the same choice change nothing of what the experts give, as of attended prompts."""
    return trial.gate.top_k > 1 and _is_same_effect(trial, experts, (inputs, "own"), (inputs, "others"))


def _belongs_to_experts(
    trial: Trial,
    one: ExpertSlices,
    inputs: Arguments,
    base: list[torch.Tensor],
    ids: torch.Tensor,
    weights: list[torch.Tensor],
) -> bool:
    """Whether disturbing an expert's part changes outputs of tokens that name it, and of no others."""
    count = ids.numel() // trial.gate.top_k
    chosen = [expert for expert in ids.flatten().tolist() if 0 <= expert < trial.block.num_experts]
    for expert in chosen[:2]:
        try:
            with trial.block.disturbed(one, expert):
                changed = trial.run(inputs)
        except FAILURES as error:  # numbers that have to be what they are, such as places in a table
            log.debug("%s is no expert's: disturbed, %s", one.name, short(error))
            return False
        if not all(torch.equal(a, b) for a, b in zip(weights, trial.graphs.weights, strict=True)):
            return False  # the router's own number per expert
        rows = changed_rows(base, changed, count)
        if rows is None or not bool(rows.any()):
            return False
        names = (ids.reshape(count, -1) == expert).any(-1).to(rows.device)
        if bool((rows & ~names).any()):
            return False
    return True


def _scales_weights(trial: Trial, one: ExpertSlices, taken: list[ExpertSlices], inputs: Arguments) -> bool:
    """Whether a number per expert may scale routing weights, and be the router's.

    A bias of the experts shows where all else that they have is zero, and adds the same whatever that is. So does
    no scale of weights, also where these are read elsewhere, `y + (1 - weights[:, :1]) * x`. What a module of its own
    holds is that expert's.
    """
    others = [other for other in taken if other is not one]
    if one.parts(trial.block.num_experts)[0].numel() > 1 or not others or one.is_of_modules:
        return False
    # Weights that are returned change with it, whatever the experts give.
    made_by_experts = _changes_with(trial, others, inputs)
    with trial.block.zeroed(others):
        changes = _changes_with(trial, [one], inputs)
    if not any(by_one and by_experts for by_one, by_experts in zip(changes, made_by_experts, strict=True)):
        return True
    return not _adds_alone(trial, one, others, inputs)


def _adds_alone(trial: Trial, one: ExpertSlices, others: list[ExpertSlices], inputs: Arguments) -> bool:
    """Whether what an exchange of other parameters changes is the same whatever one of them is."""
    before, after = trial.with_exchange(others, inputs)
    with trial.block.exchanged([one], shift(trial.block.num_experts)):
        then_before, then_after = trial.with_exchange(others, inputs)
    runs = zip(before, after, then_before, then_after, strict=True)
    return all(close(b - a, d - c) for a, b, c, d in runs if floats(a))


def _changes_with(trial: Trial, exchanged: list[ExpertSlices], inputs: Arguments) -> list[bool]:
    """Which of the tensors that the block returns are others when experts take each other's parameters."""
    return [not torch.equal(a, b) for a, b in zip(*trial.with_exchange(exchanged, inputs), strict=True)]


def _acts_on_hidden(trial: Trial, experts: list[ExpertSlices], inputs: Arguments) -> bool:
    """Whether what an exchange of experts changes depends on the hidden states, at the same choices and weights."""
    return not _is_same_effect(trial, experts, (inputs, "equal"), (tree_map(turned, inputs), "equal"))


def _is_same_effect(trial: Trial, experts: list[ExpertSlices], *runs: tuple[Arguments, str]) -> bool:
    """Whether an exchange of experts adds the same to what two runs give, each of inputs and scores."""
    differences = []
    for inputs, scores in runs:
        before, after = trial.with_exchange(experts, inputs, scores=scores)
        differences.append([a - b for a, b in zip(after, before, strict=True) if floats(a)])
    return all(close(a, b) for a, b in zip(*differences, strict=True))


def _is_vector(part: torch.Tensor) -> bool:
    return sum(size > 1 for size in part.shape) < 2
