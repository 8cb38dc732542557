"""A model of a public package with the places of its gates and of its experts' parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Layer:
    """One gate.

    Attributes:
        router: name of the router's weight in the model.
        around: the module that routes and runs the experts.
        experts: the parameters of each expert.
        top_k: K.
        drawn: how many its selection draws, where it leaves the last ones out; else K.
    """

    router: str
    around: nn.Module
    experts: Sequence[Sequence[torch.Tensor]]
    top_k: int
    drawn: int | None = None


@dataclass(frozen=True)
class Gated:
    """A model, with random weights that make routing differ from token to token.

    Attributes:
        model: in eval mode.
        arguments: of a call.
        layers: its gates, in the order in which they run.
    """

    model: nn.Module
    arguments: tuple[Any, ...]
    layers: Sequence[Layer]


def listed(experts: nn.ModuleList) -> list[list[torch.Tensor]]:
    """The parameters of experts that are modules."""
    return [list(expert.parameters()) for expert in experts]


def stacked(*stacks: torch.Tensor) -> list[list[torch.Tensor]]:
    """The parameters of experts that are slices of tensors [E, ...]."""
    return [[stack[number] for stack in stacks] for number in range(len(stacks[0]))]


def scattered(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Random weights, no gradients, eval mode."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.eval().requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, scale, generator=generator)
        else:  # some packages leave norms as they were allocated
            parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def rows(*shape: int) -> torch.Tensor:
    """Random hidden states."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def tokens(vocabulary: int, *shape: int) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(2))
