"""A layer's gate whose product `sere::route` makes itself, in the launch that selects and re-routes.

vLLM computes the router's logits, then asks the router. The gate is held back instead: it hands its hidden states to
the hook behind the router, and makes no logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops.cuda.cluster import MOST_HIDDEN_TOKENS
from .engine import NOT_AS_KNOWN, EngineMismatchError
from .routers import KnownRouter

# Rows of random hidden states that have to get the same experts: sums in another order round some logits otherwise.
SAME_ROWS = 0.75
WEIGHT_TOLERANCE = 2e-2


class HeldGate:
    """Stands in for a gate's `forward`.

    Args:
        gate: vLLM's linear layer, without a bias and not quantised, which returns logits and None.
    """

    def __init__(self, gate: Any) -> None:
        self._gate = gate
        self._original: Callable[[Tensor], Any] = gate.forward
        self._held: tuple[Tensor, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """[E, H], as it is now: an engine may load other weights."""
        weight: Tensor = self._gate.weight
        return weight

    def install(self) -> None:
        """On the instance, which the layer holds."""
        self._gate.forward = self.forward

    def forward(self, hidden: Tensor) -> Any:
        """The gate's own result, or for few tokens memory for logits that `take` knows again."""
        if torch.compiler.is_compiling() or not 0 < hidden.shape[0] <= MOST_HIDDEN_TOKENS or hidden.dim() != 2:
            return self._original(hidden)
        logits = hidden.new_empty(hidden.shape[0], self.weight.shape[0])
        self._held = hidden, logits
        return logits, None

    def take(self, logits: Tensor) -> Tensor | None:
        """The hidden states that are to become these logits; None where they are logits already.

        Raises:
            EngineMismatchError: what the gate handed out became something else on its way, which holds no logits.
        """
        held, self._held = self._held, None
        if held is None:
            return None
        if held[1] is not logits:
            raise EngineMismatchError(
                "vLLM does something with a gate's logits before it asks the router, so that sere::route cannot make "
                'them: add "router": "sere" to the options of sere'
            )
        return held[0]


def cannot_hold(runner: Any, known: KnownRouter) -> str:
    """Why a layer's gate is left as it is; empty where it can be held."""
    gate = getattr(runner, "gate", None)
    if gate is None:
        return "its gate is computed outside of it"
    if hasattr(gate, "base_layer"):
        return "its gate can be adapted (LoRA)"
    if getattr(runner, "_fse_fuse_gate", False):
        return "its gate is one product with the shared expert's"
    weight = getattr(gate, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or getattr(gate, "bias", None) is not None:
        return "its gate is quantised, or has a bias"
    out_dtype = getattr(gate, "out_dtype", None) or weight.dtype
    if not known.dtype is weight.dtype is out_dtype:
        return f"its gate has weights of {weight.dtype} and gives {out_dtype}, and logits are {known.dtype}"
    return ""


def differs(
    gate: Any,
    known: KnownRouter,
    matrix: Tensor | None,
    numbers: tuple[int, float, int, int],
    tokens: int = MOST_HIDDEN_TOKENS,
) -> str:
    """What routing from hidden states does otherwise than from a gate's logits; empty where nothing is.

    Args:
        gate: vLLM's, as it is.
        known: how its router is called.
        matrix: similarities [E, E]; None to fill.
        numbers: S, rho, `min_active` and `max_active`.
        tokens: rows of random hidden states.
    """
    weight = gate.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, weight.shape[1], generator=generator).to(weight)
    none = torch.zeros(1, dtype=torch.int64, device=weight.device)
    try:
        logits = gate(hidden)[0]
        expected, ids = known.route(logits, matrix, numbers, torch.int32, None, none)
        ours, our_ids = known.route(hidden, matrix, numbers, torch.int32, None, none, weight)
    except NOT_AS_KNOWN as error:
        return f"could not be compared: {type(error).__name__}: {error}"
    same = (ids == our_ids).all(1)
    if float(same.float().mean()) < SAME_ROWS:
        return f"other experts for {int((~same).sum())} of {tokens} tokens"
    gap, scale = (ours - expected)[same].abs().max().item(), expected.abs().max().item()
    return "" if gap <= WEIGHT_TOLERANCE * scale else f"weights {gap:.1e} apart"
