"""Count, on the device, what re-routing did to a gate's batch.

    rerouted = sere.reroute(ids, ..)        ->    rerouted = sere.reroute(ids, ..)
                                                  add_counts(ids, rerouted, E, counts)

`counts` is a graph input that the call adds to in place, so that it also counts inside a CUDA
graph.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from .reroute_dispatch import Rewrite

# What each entry of a counts buffer adds up.
COUNTED = ("calls", "tokens", "slots", "slots_changed", "active_before", "active_after")


def add_counts(
    before: torch.Tensor,
    after: torch.Tensor,
    num_experts: int,
    counts: torch.Tensor,
    real: torch.Tensor | None = None,
) -> None:
    """Add one batch to `counts` in place.

    Args:
        before: int [..., K], ids of the gate; ids outside [0, E) count as slots, never as experts.
        after: int, same shape, the ids that were dispatched.
        num_experts: E.
        counts: int64 [6], see `COUNTED`.
        real: bool [...], rows that count; None: all of them.
    """
    top_k = before.shape[-1]
    if real is None:
        slots = torch.ones_like(before, dtype=torch.int64).sum()
    else:
        slots = real.sum() * top_k
        before, after = (torch.where(real[..., None], ids, -1) for ids in (before, after))
    changed = (before != after).sum()
    batch = [torch.ones_like(slots), slots // top_k, slots, changed]
    batch += [_active(ids, num_experts) for ids in (before, after)]
    counts.add_(torch.stack(batch))


def _active(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Number of distinct experts among the ids, a 0-dim int64 tensor."""
    flat = ids.reshape(-1).to(torch.int64)
    inside = (flat >= 0) & (flat < num_experts)
    flags = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    flags = flags.scatter(0, torch.where(inside, flat, num_experts), 1)
    return flags[:num_experts].sum()


def count_routing(rewrite: Rewrite, counts: Node) -> Node:
    """Insert the counting call behind a rewritten gate; `counts` is the gate's buffer."""
    graph = rewrite.new_ids.graph
    with graph.inserting_after(rewrite.new_ids):
        node = graph.call_function(add_counts, (rewrite.gate.ids, rewrite.new_ids, rewrite.gate.num_experts, counts))
    node.meta = {
        key: rewrite.new_ids.meta[key] for key in ("stack_trace", "nn_module_stack") if key in rewrite.new_ids.meta
    }
    return node
