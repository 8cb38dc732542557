"""What calibration calls a model with, and which of its tokens count."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError

# What a causal language model of transformers need not make for calibration, by the name of the
# argument.
_SPARED = {"use_cache": False, "logits_to_keep": 1}


@dataclass(frozen=True)
class Batch:
    """Arguments of one call.

    Attributes:
        args: by position.
        kwargs: by name.
        masks: bool [batch, length] by name, False at padding.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def real_tokens(self, tokens: int, gate: str) -> torch.Tensor:
        """The numbers of the tokens that are no padding, int64, at a gate that sees so many.

        Raises:
            CalibrationError: no mask is of the tokens that the gate sees, or several that differ
                are.
        """
        if not self.masks:
            return torch.arange(tokens)
        fitting = [mask.flatten() for mask in self.masks.values() if mask.numel() == tokens]
        if not fitting or any(not torch.equal(mask, fitting[0]) for mask in fitting):
            masks = ", ".join(f"{name} {tuple(mask.shape)}" for name, mask in self.masks.items())
            raise CalibrationError(
                f"which tokens are padding cannot be determined at {gate}, which sees {tokens} tokens: "
                f"the batch has {masks}"
            )
        return fitting[0].nonzero().flatten()


def read_batch(batch: Any, model: nn.Module) -> Batch:
    """The call that a batch is: a mapping of keyword arguments, or a tensor.

    Raises:
        CalibrationError: it is neither; or its attention mask is not [batch, length].
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        accepted = set(inspect.signature(getattr(model, "_orig_mod", model).forward).parameters)
    except ValueError:  # of TorchScript
        accepted = set()
    spared = {name: value for name, value in _SPARED.items() if name in accepted}
    if isinstance(batch, torch.Tensor):
        return Batch((batch.to(device),), spared)
    if not isinstance(batch, Mapping) or not all(isinstance(name, str) for name in batch):
        raise CalibrationError(
            f"a batch is a mapping of keyword arguments, such as a tokenizer gives, or a tensor; got "
            f"{type(batch).__name__}"
        )
    kwargs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    masks = {}
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = kwargs.get(name)
        if mask is None:
            continue
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise CalibrationError(f"{name} must be a tensor [batch, length], 0 at padding; got {shape}")
        masks[name] = mask.bool()
    return Batch((), {**spared, **kwargs}, masks)


def example_batch(model: nn.Module, example: Any) -> Any:
    """What to trace a model with: the caller's example, or the one that models of transformers have.

    Raises:
        CalibrationError: there is neither.
    """
    if example is not None:
        return example
    found = getattr(getattr(model, "_orig_mod", model), "dummy_inputs", None)
    if not isinstance(found, Mapping):
        raise CalibrationError(
            f"calibrating {type(model).__name__} without batches needs example=, what to call it with once"
        )
    return found
