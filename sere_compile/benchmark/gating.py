"""Time what comes before the experts: the router's projection, scoring, selection, and re-routing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..testing import oracle_routing
from .result import Row
from .subject import Block, Subject
from .timing import capture, time_in_turn
from .variant import Variant, all_variants, token_error

# Calls in one graph: a call takes a few microseconds, a replay must not be measured for its own start.
CALLS = 20
# A weighted sum of table rows in the model's dtype.
TOLERANCE = 3e-2


class GatingOnly(nn.Module):
    """A block whose experts are one row each: out [T, 8] = sum over k of weights[t, k] * table[ids[t, k]].

    What reads the ids is part of every variant and costs about one small kernel, so that the differences between
    variants are the gating's, and their sum is what a layer pays before its experts.
    """

    def __init__(self, block: Block, seed: int = 0) -> None:
        super().__init__()
        self.router = block.module.get_submodule(block.router_weight.rpartition(".")[0])
        weight: Any = self.router.weight
        generator = torch.Generator().manual_seed(seed)
        # Three dimensions, as stacked experts have: that is what tells a gate from other selections.
        table = torch.randn(block.experts, 1, 8, generator=generator).to(weight)
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, 8] from hidden states [T, H]."""
        outputs = self.router(hidden)
        ids = next(x for x in outputs if not x.is_floating_point())
        weights = next(x for x in outputs if x.is_floating_point() and x.shape == ids.shape)
        return (self.table[ids] * weights[..., None, None]).sum(1).flatten(1)


def bench_gating(
    subject: Subject, batch: int, selects: Sequence[int], stock: Sequence[str], bandwidth: float, rounds: int = 25
) -> list[Row]:
    """Rows for the router of one block on Gaussian hidden states [batch, H]; `stock` experts make no difference here.

    The row "inductor projection alone" is the part that no fusion can save.
    """
    block = subject.blocks[-1]
    module = GatingOnly(block)
    weight: Any = module.router.weight
    size = (batch, weight.shape[1])
    inputs = [
        torch.randn(size, device=weight.device, generator=_seeded(weight, i)).to(weight.dtype) for i in range(CALLS)
    ]
    matrices = {"router.weight": subject.matrices[f"{block.name}.{block.router_weight}"]}
    runs: dict[str, Callable[[], object]] = {}
    errors, keep = {}, []
    variants = [
        dataclasses.replace(v, name="inductor") if v.name.startswith("inductor") else v
        for v in all_variants(selects, block.top_k, stock[:1])
    ]
    for variant in variants:
        torch._dynamo.reset()
        function = variant.compiled(module)
        with oracle_routing(module, matrices, variant.select_top_k or block.top_k):
            expected = [module(x) for x in inputs]
        errors[variant.name] = max(token_error(function(x), want) for x, want in zip(inputs, expected, strict=True))
        runs[variant.name] = _run(variant, function, inputs, keep)
    torch._dynamo.reset()
    alone = Variant("inductor projection alone", "", variants[1].backend)
    project = alone.compiled(functools.partial(nn.functional.linear, weight=weight))
    runs[alone.name] = _run(alone, project, inputs, keep)
    times = time_in_turn(runs, CALLS, rounds)
    rows = [
        Row("gating", batch, v.name, v.select_top_k is not None, times[v.name], errors[v.name], TOLERANCE)
        for v in variants
    ]
    return [*rows, Row("gating: projection", batch, alone.name, False, times[alone.name], 0.0, TOLERANCE)]


def _run(
    variant: Variant, function: Callable[..., Any], inputs: list[torch.Tensor], keep: list[Any]
) -> Callable[[], object]:
    """Calls the function on all inputs: a graph's replay, or one by one for an eager variant."""
    if variant.backend is None:
        return functools.partial(_call_all, function, inputs)
    graph = capture(functools.partial(_call_one, function, inputs), len(inputs))
    keep.append((graph, function))
    return graph.replay


def _call_one(function: Callable[..., Any], inputs: list[torch.Tensor], index: int) -> Any:
    return function(inputs[index])


def _call_all(function: Callable[..., Any], inputs: list[torch.Tensor]) -> None:
    for x in inputs:
        function(x)


def _seeded(like: torch.Tensor, seed: int) -> torch.Generator:
    return torch.Generator(like.device).manual_seed(seed)
