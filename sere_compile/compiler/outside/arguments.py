"""What a block is called with, and other arguments of the same kind."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from .results import floats

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def detached(value: Any) -> Any:
    """A tensor without its history, which cannot be copied."""
    return value.detach() if isinstance(value, torch.Tensor) else value


def in_float32(value: Any) -> Any:
    """A tensor of floating-point numbers as float32; other values are as they are."""
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def half_masked(value: Any, tokens: int) -> Any:
    """A mask of so many tokens marks the second half of them; other values are as they are."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or value.numel() != tokens or tokens < 2:
        return value
    return torch.arange(tokens, device=value.device).view(value.shape) < tokens // 2


def hidden_of(inputs: Arguments) -> torch.Tensor | None:
    """Hidden states [.., T, H], if they are all the tensors among the arguments."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    fits = len(tensors) == 1 and floats(tensors[0]) and 2 <= tensors[0].dim() <= 3
    return tensors[0] if fits and tensors[0].shape[-2] > 1 else None


def with_rows(inputs: Arguments, dim: int, rows: int) -> Arguments:
    """The arguments with other hidden states, so many along one dimension; they are all the tensors among them."""
    hidden = hidden_of(inputs)
    assert hidden is not None
    sizes = [*hidden.shape]
    sizes[dim] = rows
    drawn = torch.randn(sizes, generator=torch.Generator().manual_seed(3)).to(hidden)
    return tree_map(lambda value: drawn if value is hidden else value, inputs)  # type: ignore[no-any-return]


def turned(value: Any) -> Any:
    """Other numbers of the same kind."""
    return value.flip(-1) * 0.5 if isinstance(value, torch.Tensor) and value.is_floating_point() else value
