"""A Hugging Face model as a function from tokens to logits, to be traced and lowered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Prefill(nn.Module):
    """(input_ids, attention_mask) -> logits, for prefill and scoring: tensors only, so that any process can load it.

    Args:
        model: a causal language model of transformers.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """All positions at once.

        Args:
            input_ids: int64 [B, L].
            attention_mask: int64 [B, L], 1 for a token and 0 for padding.

        Returns:
            Logits [B, L, vocabulary].
        """
        for own, other in zip(attention_mask.shape, input_ids.shape, strict=True):
            torch._check(own == other)
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    def example_inputs(self, batch: int = 2, length: int = 8) -> tuple[Tensor, Tensor]:
        """Arguments of `forward` to trace with."""
        tokens = torch.zeros(batch, length, dtype=torch.int64, device=self.model.device)
        return tokens, torch.ones_like(tokens)

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """What lets batch and sequence vary, as torch.export takes it."""
        free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        return free, free

    def names(self) -> tuple[list[str], list[str]]:
        """Names for the inputs and outputs of the lowered model."""
        return ["input_ids", "attention_mask"], ["logits"]
