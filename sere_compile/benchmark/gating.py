"""Time what comes before the experts: the router's projection, scoring, selection, and re-routing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import SereError
from ..testing import oracle_routing
from .result import Row
from .subject import Block, Subject
from .timing import Run, time_in_turn
from .variant import Variant, all_variants, token_error

# Calls in one graph: a call takes a few microseconds, and the start of a replay must not be what is measured.
CALLS = 20
# A weighted sum of table rows in the model's dtype.
TOLERANCE = 3e-2


class GatingOnly(nn.Module):
    """A block whose experts are 8 x 8: out [T, 8] = sum over k of weights[t, k] * hidden[t, :8] @ table[ids[t, k]].

    What reads the ids is part of every variant, so that the differences between variants are the gating's.
    """

    def __init__(self, block: Block, seed: int = 0) -> None:
        super().__init__()
        self.router = block.module.get_submodule(block.router_weight.rpartition(".")[0])
        weight: Any = self.router.weight
        generator = torch.Generator().manual_seed(seed)
        # Stacked weights that the ids select and hidden states are multiplied by: this is what identifies a gate.
        table = torch.randn(block.experts, 8, 8, generator=generator).to(weight)
        self.table = nn.Parameter(table, requires_grad=False)

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, weights), both [T, K], of hidden states [T, H]."""
        outputs = self.router(hidden)
        ids = [x for x in outputs if not x.is_floating_point()]
        weights = [x for x in outputs if ids and x.is_floating_point() and x.shape == ids[0].shape]
        if not weights:
            raise SereError(f"{type(self.router).__name__} is no router that returns expert ids and routing weights")
        return ids[0], weights[0]

    def consume(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What stands in for the experts."""
        rows = torch.matmul(hidden[:, None, None, :8], self.table[ids])
        return (rows * weights[..., None, None]).sum(1).flatten(1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, 8] from hidden states [T, H]."""
        return self.consume(hidden, *self.route(hidden))


class WithoutGating(nn.Module):
    """The rest of `GatingOnly`: the router's projection, and the same reading of ids, given ones."""

    def __init__(self, module: GatingOnly, hidden: torch.Tensor) -> None:
        super().__init__()
        self.module = module
        self.routing = tuple(x.clone() for x in module.route(hidden))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The projection's scores [T, E], and [T, 8]."""
        scores = nn.functional.linear(hidden, self.module.router.weight)  # type: ignore[arg-type]
        return scores, self.module.consume(hidden, *self.routing)


def bench_gating(
    subject: Subject, batch: int, selects: Sequence[int], stock: Sequence[str], bandwidth: float, rounds: int = 25
) -> list[Row]:
    """Rows for the router of one block on Gaussian hidden states [batch, H]; `stock` experts make no difference here.

    All times include the router's projection and what reads the ids. The last row is these alone: subtract it from
    the others to get the gating.
    """
    block = subject.blocks[-1]
    module = GatingOnly(block)
    weight: Any = module.router.weight
    size = (batch, weight.shape[1])
    inputs = [
        torch.randn(size, device=weight.device, generator=_seeded(weight, i)).to(weight.dtype) for i in range(CALLS)
    ]
    matrices = {"router.weight": subject.matrices[f"{block.name}.{block.router_weight}"]}
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    keep: list[Any] = []
    variants = [
        dataclasses.replace(v, name="inductor") if v.name.startswith("inductor") else v
        for v in all_variants(selects, block.top_k, stock[:1])
    ]
    for variant in variants:
        torch._dynamo.reset()
        with oracle_routing(module, matrices, variant.select_top_k or block.top_k):
            expected = [module(x) for x in inputs]
        runs[variant.name], results = variant.run_of(module, inputs, keep)
        errors[variant.name] = max(token_error(result, want) for result, want in zip(results, expected, strict=True))
    torch._dynamo.reset()
    rest = Variant("inductor, all but the gating", "", variants[1].backend)
    runs[rest.name], _ = rest.run_of(WithoutGating(module, inputs[0]), inputs, keep)
    times = time_in_turn(runs, CALLS, rounds)
    rows = [
        Row("gating", batch, v.name, v.select_top_k is not None, times[v.name], errors[v.name], TOLERANCE)
        for v in variants
    ]
    return [*rows, Row("without gating", batch, rest.name, False, times[rest.name], None, TOLERANCE)]


def _seeded(like: torch.Tensor, seed: int) -> torch.Generator:
    return torch.Generator(like.device).manual_seed(seed)
