"""What `strict=True` proves of a gate: its graph is run, and where experts stand outside the graph, they are."""

from __future__ import annotations

import torch

from ..errors import SereError
from ..experts.hidden_states import draw
from ..experts.module_tree import Experts, find_experts_module
from ..passes import Evidence, Gate, Proof, Skip, SkipReason, verify_rewrite
from ..passes.verify_rewrite import ValueOf, tolerance

_ROWS = 16


def verify_gate(gate: Gate, weight: torch.Tensor, value_of: ValueOf) -> str | Skip:
    """What is proven of a gate's rewrite, in words for a report, or the refusal where it is wrong.

    Ids and weights that leave the graph go to code that it does not show. Where an experts module beside the router
    takes them, it is run on random hidden states: it has to give the sum over distinct experts.

    Args:
        gate: found, not yet rewritten.
        weight: the router's parameter in the live model.
        value_of: see `passes.verify_rewrite`.
    """
    shown = verify_rewrite(gate, value_of)
    if isinstance(shown, Skip):
        return shown
    experts = find_experts_module(weight, gate.num_experts) if shown is Proof.MERGED else None
    if experts is None:
        return shown.value
    error = _distance_from_sum(experts, gate, weight)
    if isinstance(error, str):
        return f"{shown.value} ({error})"
    if error > tolerance(weight.dtype):
        detail = f"the experts beside its router are off by {error:.2g} of their scale from the sum over experts"
        return Skip(SkipReason.UNVERIFIED, gate.selection, detail, evidence=Evidence.EXPERTS)
    return "what the traced code makes of merged ids and weights; the experts outside the graph sum them"


def _distance_from_sum(experts: Experts, gate: Gate, weight: torch.Tensor) -> float | str:
    """How far the experts of K distinct slots are from the sum of each alone, relative; or why they did not run."""
    size, width, device = gate.num_experts, gate.top_k, weight.device
    generator = torch.Generator().manual_seed(0)
    hidden_size = weight.shape[1] if weight.shape[0] == size else weight.numel() // weight.shape[0]
    hidden = draw(_ROWS, hidden_size, 0, weight.dtype, device, None, lambda node: None)
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
