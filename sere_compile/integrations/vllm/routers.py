"""Routers that `sere::route` can stand in for: it selects and re-routes, where vLLM would select first.

A router is known by its class and its settings, and believed only after both have routed the same
random logits: same experts for every token, same weights. A router that does anything else keeps its own
selection, and the ids are re-routed after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops import route
from .engine import NOT_AS_KNOWN

# As many rows of random logits; with 16 bits, equal scores are among them.
COMPARED_TOKENS = 512
WEIGHT_TOLERANCE = 1e-4
# Beyond, a selection is not what a forward waits for.
MOST_TOKENS = 1024


@dataclass(frozen=True)
class KnownRouter:
    """How `sere::route` is called for a router. Attributes are that operator's arguments.

    dtype: of the logits that were compared; logits of another dtype are vLLM's to route.
    """

    bias: Tensor | None
    top_k: int
    scoring: str
    renormalize: bool
    scale: float
    num_groups: int
    top_groups: int
    group_score: str
    dtype: torch.dtype

    @property
    def kind(self) -> tuple[Any, ...]:
        """What is the same for layers of one kind."""
        values: dict[str, Any] = vars(self) | {"bias": None if self.bias is None else self.bias.dtype}
        return tuple(values.values())

    def takes(self, logits: Tensor) -> bool:
        """Whether logits are such as were compared, and few."""
        return logits.dtype is self.dtype and logits.dim() == 2 and logits.shape[0] <= MOST_TOKENS

    def route(
        self,
        logits: Tensor,
        similarity: Tensor | None,
        numbers: tuple[int, float, int, int],
        ids_dtype: torch.dtype,
        real_tokens: Tensor | None,
        rerouted_tokens: Tensor | None,
        router_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weights fp32 [T, K], best first, and ids [T, K]; `numbers` are S, rho, `min_active` and `max_active`.

        Without similarities lost slots are filled. With the router's weight, `logits` are hidden states.
        """
        return route(
            logits, self.bias, self.top_k, self.scoring, self.renormalize, 0.0, self.scale, torch.float32,
            self.num_groups, self.top_groups, self.group_score, False, similarity, *numbers, None,
            similarity is None, ids_dtype, real_tokens, rerouted_tokens, router_weight,
        )  # fmt: skip


def known_router(router: Any, dtype: torch.dtype) -> KnownRouter | None:
    """How a router of vLLM's is called as `sere::route`; None for one that is not known."""
    name = type(router).__name__
    scoring = getattr(router, "scoring_func", None)
    if name not in ("FusedTopKRouter", "FusedTopKBiasRouter", "GroupedTopKRouter"):
        return None
    if scoring not in ("softmax", "sigmoid") or getattr(router, "num_fused_shared_experts", None):
        return None
    if any(getattr(router, opaque, None) is not None for opaque in ("_hash_indices_table", "bias_vl")):
        return None
    bias = getattr(router, "e_score_correction_bias", None)
    grouped = name == "GroupedTopKRouter"
    groups, top_groups = (int(router.num_expert_group), int(router.topk_group)) if grouped else (1, 1)
    return KnownRouter(
        None if bias is None else bias.detach(), int(router.top_k), scoring, bool(router.renormalize),
        float(getattr(router, "routed_scaling_factor", 1.0)), groups, top_groups, "max" if bias is None else "top2",
        dtype,
    )  # fmt: skip


def differs(router: Any, known: KnownRouter, num_experts: int, device: torch.device) -> str:
    """What `sere::route` does otherwise than a router, on the same random logits; empty where nothing is."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(COMPARED_TOKENS, num_experts, generator=generator).to(device, known.dtype)
    hidden = torch.empty(COMPARED_TOKENS, 1, device=device, dtype=known.dtype)
    try:
        weights, ids = router._compute_routing(hidden, logits, torch.int32)
        ours, our_ids = known.route(logits, None, (0, 0.0, 0, 0), torch.int32, None, None)
    except NOT_AS_KNOWN as error:
        return f"could not be compared: {type(error).__name__}: {error}"
    if ids.shape != our_ids.shape:
        return f"ids of shape {list(ids.shape)}"
    # A router may leave the best anywhere.
    order, our_order = ids.argsort(dim=1), our_ids.argsort(dim=1)
    same = (ids.gather(1, order) == our_ids.gather(1, our_order)).all(1)
    if not bool(same.all()):
        return f"other experts for {int((~same).sum())} of {COMPARED_TOKENS} tokens"
    gap = (weights.float().gather(1, order) - ours.gather(1, our_order)).abs().max().item()
    return "" if gap <= WEIGHT_TOLERANCE * ours.abs().max().item() else f"weights {gap:.1e} apart"
