"""What a trial of one block around a router concludes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ...experts.owner import Owner
from ...experts.trial_block import ExpertSlices, TrialBlock
from ...passes import Gate, SkipReason
from ...passes.graph import nodes
from ...passes.graph.failures import FAILURES, short
from .arguments import Arguments
from .compare_versions import Verdict, compare_versions
from .expert_products import computes_all
from .trial import Trial
from .where_tokens_go import SENT_ELSEWHERE, sends_elsewhere
from .which_experts import find_experts, weighs_nothing


def try_block(
    gate: Gate, module: torch.nn.Module, owner: Owner, called_with: Arguments | None, kept: bool
) -> Verdict | None:
    """The verdict on one module around the router, or None where it does not hold the gate and its experts.

    Args:
        gate: of the model's graph.
        module: that is copied.
        owner: of the router's weight.
        called_with: what the model calls the module with, if that is known.
        kept: asks for rewrites in which what leaves the graph is of the ids that the router chose.
    """
    try:
        scores = nodes.operand(gate.selection)
        columns = gate.num_experts if scores is None else nodes.last_size(scores) or gate.num_experts
        block = TrialBlock(module, owner.weight, owner.root, gate.num_experts, columns)
    except FAILURES as error:
        return Verdict(None, f"{type(module).__name__} cannot be copied to try it: {short(error)}")
    candidates = block.candidates()
    if not candidates:
        return None
    trial = Trial(gate, block, called_with)
    verdict = _conclude(trial, candidates, kept)
    return verdict and replace(verdict, written=frozenset(trial.written))


def _conclude(trial: Trial, candidates: list[ExpertSlices], kept: bool) -> Verdict | None:
    """The verdict on this block, or None where it is not the one that holds the gate and its experts."""
    inputs = trial.inputs()
    if inputs is None:
        return None
    name = type(trial.block.module).__name__
    if len(trial.graphs.found) > 1 or signature(trial.graphs.found[0]) != signature(trial.gate):
        return Verdict(None, f"{name} compiled alone has another gate than it has in the model", whole=False)
    seen = False
    trial.is_compiled = True
    try:
        trial.restless = trial.find_restless(inputs)
        experts = find_experts(trial, candidates, inputs)
        if isinstance(experts, str):
            return Verdict(None, experts, is_gate=False)
        seen = True
        verdict = compare_versions(trial, experts, inputs, kept)
        if verdict.merged is None:
            return verdict
        if weighs_nothing(trial, experts, inputs):
            return Verdict(None, SkipReason.NOTHING_WEIGHED.value)
        if sends_elsewhere(trial, experts, inputs):
            return Verdict(None, SENT_ELSEWHERE)
        if computes_all(trial, experts, inputs):
            return replace(verdict, saves_nothing=f"{SkipReason.DENSE.value} (seen in a run of {name})")
        return verdict
    except FAILURES as error:
        return Verdict(None, f"{name} could not be run on made-up choices: {short(error)}", is_gate=seen)


def signature(gate: Gate) -> tuple[Any, ...]:
    """What tells a gate from others of its block: the trial has to find the same."""
    kinds = tuple(sorted(use.kind.name for use in gate.uses))
    return gate.form, gate.num_experts, gate.top_k, gate.scoring, kinds, gate.weights is None, gate.needs_merge
