"""The sizes for which the kernels of this library are no slower than stock ones.

Comparing a symbolic batch with a limit makes Dynamo guard on the answer: two graphs per limit at
most.
"""

from __future__ import annotations

from ..ops.expert_mlp.op import MAX_SLOTS, MAX_TOKENS
from .gate import Gate, Skip, SkipReason
from .graph import nodes

# Slots per expert, on average, up to which the expert kernels were never measured slower than stock
# (docs/kernels.md).
MAX_SLOTS_PER_EXPERT = 32


def check_router_gains(gate: Gate, has_gradients: bool) -> Skip | None:
    """A refusal where `sere.route` would not be faster, or where a call may need gradients."""
    if has_gradients:
        return Skip(SkipReason.GRADIENTS, gate.ids, "torch.no_grad() or inference_mode() switches them off")
    if has_more_tokens(gate, MAX_TOKENS):
        return Skip(SkipReason.MANY_TOKENS, gate.ids, f"more than {MAX_TOKENS}")
    return None


def check_experts_gain(gate: Gate, has_gradients: bool) -> Skip | None:
    """The same for `sere.expert_mlp`, whose cost also depends on the slots per expert."""
    refused = check_router_gains(gate, has_gradients)
    if refused is not None:
        return refused
    slots = nodes.value(gate.ids).numel()
    if slots > MAX_SLOTS_PER_EXPERT * gate.num_experts:
        detail = f"more than {MAX_SLOTS_PER_EXPERT} for each of its {gate.num_experts} experts"
        return Skip(SkipReason.MANY_SLOTS, gate.ids, detail)
    return Skip(SkipReason.TOO_MANY_SLOTS, gate.ids, f"more than {MAX_SLOTS}") if slots > MAX_SLOTS else None


def has_more_tokens(gate: Gate, limit: int | None) -> bool:
    """Whether the gate's batch has more tokens than `limit`; never, without one."""
    return limit is not None and bool(nodes.value(gate.ids).numel() > limit * gate.top_k)
