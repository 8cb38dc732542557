"""Whether a rewritten block gives what it gives, as traced, when experts have the parameters of others."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ... import ops as _ops  # noqa: F401  (registers torch.ops.sere)
from ...experts.trial_block import ExpertSlices
from ...passes import Gate
from ...passes.graph.failures import FAILURES, short
from .. import dynamo
from .arguments import Arguments, hidden_of, with_rows
from .made_up_choices import DRAWS
from .results import TOLERANCE, distance
from .trial import RETURNED, Trial, tokens_in_call
from .ways import IDS_ALONE, IDS_KEPT, ids_alone, version_name
from .where_tokens_go import SENT_ELSEWHERE

log = logging.getLogger(__name__)

# Tokens that a rewrite is tried on at last: as many as the call has, and where a block is small some thousands.
_LEAST_ROWS, _MOST_ROWS = 256, 4096
_WORK = 1 << 31  # rows times parameters
_MOST_DRAWS = 24  # until each expert was re-routed once


@dataclass(frozen=True)
class Verdict:
    """What trying a gate's block has shown.

    Attributes:
        merged: whether slots are merged in the rewrite that was proven; None where none was.
        reason: why none was.
        saves_nothing: why no fewer weights are read where it is re-routed.
        is_gate: whether experts were seen to act on the hidden states of the tokens that name them.
        block: a number for what the block that was tried computes, see `computes_the_same`.
        whole: whether the block holds the gate as the model's graph does; else it may be a part of it.
        ids_alone: whether what is made of the ids in the graph keeps what the router chose, see `ids_alone`.
        off: of the rewrites that merge slots and those that do not, which gave other things when the block was run.
        written: attributes of the block that its calls write; None where the block that was tried is another.
        rows: how many tokens the block was tried on, at most.
    """

    merged: bool | None
    reason: str = ""
    is_gate: bool = True
    block: int = -1
    whole: bool = True
    saves_nothing: str = ""
    ids_alone: bool = False
    off: frozenset[bool] = frozenset()
    written: frozenset[str] | None = None
    rows: int = 0


def compare_versions(trial: Trial, experts: list[ExpertSlices], inputs: Arguments, kept: bool) -> Verdict:
    """Whether a rewrite of the block is right, and which, or what is wrong with the first that was tried.

    Args:
        trial: of the block.
        experts: the parameters of all.
        inputs: of the block.
        kept: asks for rewrites in which what leaves is of the ids that the router chose.
    """
    merged_first, problems, off = trial.gate.needs_merge, [], set[bool]()
    ways = ["", IDS_ALONE] if ids_alone(trial.graphs.found[0]) is not None else [""]
    for way in [IDS_KEPT] if kept else ways:
        for merged in (merged_first, not merged_first):
            version = version_name(merged, way)
            try:
                problem = _problem_with(trial, version, experts, inputs)
                if problem is not None and version in trial.graphs.versions:
                    off.add(merged)
            except FAILURES as error:  # an expert named twice is not counted twice, and sizes no longer fit
                name = type(trial.block.module).__name__
                problem = f"{name} could not be run on made-up choices: {short(error)}"
            if problem is None:
                return Verdict(merged, ids_alone=way == IDS_ALONE, rows=many_rows(trial))
            problems.append(problem)
    return Verdict(None, problems[0], off=frozenset(off))


def _problem_with(trial: Trial, version: str, experts: list[ExpertSlices], inputs: Arguments) -> str | None:
    """How a rewritten version differs from the definition, or None."""
    if version not in trial.graphs.versions:
        return f"{trial.graphs.refused.get(version, 'it cannot be rewritten')}"
    for given in (inputs, *trial.other_calls(inputs)):
        problem = _problem_in_draws(trial, version, experts, given)
        if problem is not None:
            return problem if given is inputs else f"{problem} under another mask: {SENT_ELSEWHERE}"
    return _problem_with_more(trial, version, experts, inputs)


def _problem_in_draws(trial: Trial, version: str, experts: list[ExpertSlices], inputs: Arguments) -> str | None:
    """The same with one call's inputs, in as many draws as it takes to re-route each expert once."""
    stays = set(range(trial.block.num_experts))  # experts that were not re-routed so far
    for seed in range(_MOST_DRAWS):
        if seed >= DRAWS and not stays:
            break
        # An even seed: few first choices, and the others are re-routed.
        chosen = sorted(stays) if seed >= DRAWS else ()
        problem = _problem_in_draw(trial, version, experts, inputs, 2 * seed if chosen else seed, chosen)
        if problem is not None:
            return problem
        stays -= {expert for expert, other in _expert_map(trial).items() if expert != other}
    return None


def _problem_in_draw(
    trial: Trial, version: str, experts: list[ExpertSlices], inputs: Arguments, seed: int, chosen: Sequence[int] = ()
) -> str | None:
    got, kept = trial.run(inputs, version, seed, chosen=chosen), trial.kept
    with trial.block.exchanged(experts, _expert_map(trial)):
        wanted = trial.run(inputs, "original", seed, chosen=chosen)
    error = distance(got, wanted)
    run = f"run with the code that receives its ids, {type(trial.block.module).__name__}"
    if error is not None and error > TOLERANCE:
        return f"{run} is off by {error:.2g} of its scale"
    names = sorted(kept.keys() | trial.kept.keys())
    other = next((n for n in names if not trial.is_left_alike(n, kept.get(n), trial.kept.get(n))), None)
    if error is None or other == RETURNED:
        return f"{run} returns other things"
    return None if other is None else f"{run} leaves other things in {other}, where they may be read later"


def _problem_with_more(trial: Trial, version: str, experts: list[ExpertSlices], inputs: Arguments) -> str | None:
    """The same with many tokens, if the block takes them: code may drop what is beyond a place."""
    hidden = hidden_of(inputs)
    if hidden is None:
        return None
    dim = trial.counting_dim(hidden)
    rows = many_rows(trial)
    more = with_rows(inputs, dim, rows)
    # A number of sequences is often a constant of the graph, which is made anew then.
    by_tokens = dim == hidden.dim() - 2
    with dynamo.compiling_nothing_more() if by_tokens else contextlib.nullcontext():
        try:
            trial.run(more)
        except FAILURES as error:
            log.debug("%s does not run on more tokens: %s", type(trial.block.module).__name__, short(error))
            return None
        if not trial.graphs.ids:  # the gate's graph serves no more than it was made for
            return None
        problem = _problem_in_draw(trial, version, experts, more, 0)
    return None if problem is None else f"{problem} where there are {rows} tokens"


def many_rows(trial: Trial) -> int:
    """How many tokens a rewrite is tried on at last: code outside the graph may drop those beyond a number."""
    size = sum(parameter.numel() for parameter in trial.block.module.parameters())
    return max(least_rows(trial.gate), min(_MOST_ROWS, _WORK // max(size, 1)))


def least_rows(gate: Gate) -> int:
    """How many they are at least: as many as the call has that a gate was traced in, to a power of two."""
    return max(_LEAST_ROWS, 1 << max(tokens_in_call(gate) - 1, 0).bit_length())


def _expert_map(trial: Trial) -> dict[int, int]:
    """What re-routing makes of each expert that the last run chose."""
    before = trial.graphs.ids[0]
    after = torch.ops.sere.reroute.default(before, trial.graphs.matrix, 1, 0.0, 0)
    return dict(zip(before.flatten().tolist(), after.flatten().tolist(), strict=True))
