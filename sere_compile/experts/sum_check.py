"""Run the experts beside a router on a token's slots together, and on each slot alone."""

from __future__ import annotations

import torch

from ..errors import SereError
from ..passes import Gate
from .experts_module import Experts
from .hidden_states import draw, hidden_size_of

_ROWS = 16


def distance_from_sum(experts: Experts, gate: Gate, weight: torch.Tensor) -> float | str:
    """How far the experts of K distinct slots are from the sum of each alone, or why they did not run.

    Args:
        experts: (hidden [T, H], ids [T, K], weights [T, K]) -> [T, H].
        gate: whose experts they are.
        weight: of its router.

    Returns:
        The largest difference on random hidden states, relative to the largest sum.
    """
    size, width, device = gate.num_experts, gate.top_k, weight.device
    generator = torch.Generator().manual_seed(0)
    hidden = draw(_ROWS, hidden_size_of(weight, gate), 0, weight.dtype, device)
    ids = torch.rand(_ROWS, size, generator=generator).argsort(-1)[:, :width].to(device)
    weights = (torch.rand(_ROWS, width, generator=generator) + 0.1).to(device=device, dtype=weight.dtype)
    try:
        with torch.inference_mode(False), torch.no_grad():
            together = experts(hidden, ids, weights).double()
            total = torch.zeros_like(together)
            for slot in range(width):
                alone = torch.zeros_like(weights)
                alone[:, 0] = weights[:, slot]
                total += experts(hidden, ids.roll(-slot, -1), alone).double()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, SereError) as error:
        return f"the experts beside the router did not run alone: {type(error).__name__}"
    return float((together - total).abs().max() / total.abs().max().clamp(min=1e-6))
