"""Time one Mixture-of-Experts block: router, experts, and what else the block computes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from ..testing import oracle_routing
from .result import Row
from .subject import Block, Subject
from .timing import Run, Timing, time_in_turn
from .variant import (
    Variant,
    all_variants,
    experts_of,
    tell_if_blind,
    those_that_fit,
    token_error,
    use_experts,
    with_own_experts,
    without_effect,
)

# Each call of a graph has its own tokens, so that no expert stays in the L2 cache because all calls use it.
CALLS = 6
# One block in bf16: rounding of two projections and of the router weights.
TOLERANCE = 3e-2


def bench_moe_layer(
    subject: Subject, batch: int, selects: Sequence[int], stock: Sequence[str], bandwidth: float, rounds: int = 15
) -> list[Row]:
    """Rows for one block of the subject on Gaussian hidden states [batch, 1, H]."""
    block = subject.blocks[-1]
    inputs = [_hidden(subject, block, batch, seed) for seed in range(CALLS)]
    expected, active = _references(subject, block, inputs, selects)
    outputs = {select: torch.cat(results) for select, results in expected.items()}
    tell_if_blind(f"MoE layer, batch {batch}", outputs, block.top_k, TOLERANCE)
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    keep: list[Any] = []

    def prepare(variant: Variant) -> None:
        use_experts(subject.model, variant.experts)
        runs[variant.name], results = variant.run_of(block.module, inputs, keep)
        references = expected[variant.select_top_k or block.top_k]
        # The median of the inputs: with S = 1 one tie of two scores, resolved differently, moves a whole small batch.
        errors[variant.name] = statistics.median(
            token_error(_tensor(result), want) for result, want in zip(results, references, strict=True)
        )

    wanted = [*all_variants(selects, block.top_k, stock), *with_own_experts(selects, block.top_k)]
    variants = those_that_fit([*wanted, without_effect(block.top_k)], prepare)
    times = time_in_turn(runs, CALLS, rounds, before=experts_of(variants, subject.model))
    return [
        _row(variant, block, batch, times[variant.name], errors[variant.name], active, bandwidth)
        for variant in variants
    ]


def _row(
    variant: Variant, block: Block, batch: int, timing: Timing, error: float, active: dict[int, float], bandwidth: float
) -> Row:
    count = active[variant.select_top_k or block.top_k]
    size = _shared_bytes(block) + count * block.expert_bytes
    share = size / (timing.median * 1e-6) / bandwidth
    return Row(
        "MoE layer", batch, variant.name, variant.select_top_k is not None, timing, error, TOLERANCE, count, size, share
    )


def _shared_bytes(block: Block) -> int:
    """Weights that every call reads: the router's and those of shared experts."""
    whole = sum(p.numel() * p.element_size() for p in block.module.parameters())
    return whole - block.experts * block.expert_bytes


def _hidden(subject: Subject, block: Block, batch: int, seed: int) -> torch.Tensor:
    weight = dict(block.module.named_parameters())[block.router_weight]
    generator = torch.Generator(weight.device).manual_seed(seed)
    size = (batch, 1, weight.shape[1])
    return torch.randn(size, generator=generator, device=weight.device).to(subject.model.dtype)


def _references(
    subject: Subject, block: Block, inputs: list[torch.Tensor], selects: Sequence[int]
) -> tuple[dict[int, list[torch.Tensor]], dict[int, float]]:
    """Eager outputs and mean active experts by S, the re-routing done by the oracle; always including K."""
    use_experts(subject.model, "grouped_mm")
    matrices = {block.router_weight: subject.matrices[f"{block.name}.{block.router_weight}"]}
    expected, active = {}, {}
    for select in {*(min(s, block.top_k) for s in selects), block.top_k}:
        counts: dict[str, list[tuple[int, int]]] = {}
        with oracle_routing(block.module, matrices, select, active=counts):
            expected[select] = [_tensor(block.module(x)) for x in inputs]
        active[select] = statistics.mean(after for _, after in counts[block.router_weight])
    return expected, active


def _tensor(output: Any) -> torch.Tensor:
    """Hidden states: some blocks return the router's scores beside them."""
    return output[0] if isinstance(output, tuple) else output
