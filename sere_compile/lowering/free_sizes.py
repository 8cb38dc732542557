"""`dynamic_shapes="auto"`: batch and sequence of a model's inputs may vary, and are called so in files."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..errors import LoweringError

# The first two sizes of an input, in this order.
AXES = ("batch", "sequence")
# What torch calls a free size that nobody named.
_UNNAMED = re.compile(r"s\d+")


def free_sizes(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What torch.export takes as `dynamic_shapes` to let batch and sequence vary.

    What a model's own `dynamic_shapes()` says, as of `DecodeStep` and `Prefill`. Otherwise the first size of every
    tensor, and the second of tokens and masks [B, L] and of hidden states [B, L, width].

    Raises:
        LoweringError: an example has a size below 2 there, which torch.export would fix.
    """
    own = getattr(model, "dynamic_shapes", None)
    if own is not None:
        return own()
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    rest = next((p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is p.VAR_KEYWORD), None)
    given |= given.pop(rest, {}) if rest is not None else {}
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor) and leaf.dim()]
    # One name for the batch of all inputs says that it is one size. Sequences are left to the model: torch.export
    # before 2.13 takes no name for them.
    batch = torch.export.Dim(AXES[0]) if len(tensors) > 1 else torch.export.Dim.DYNAMIC
    return {
        name: pytree.tree_map_with_path(
            lambda path, value, name=name: _free(name + pytree.keystr(path), value, batch), value
        )
        for name, value in given.items()
    }


def _free(name: str, value: Any, batch: Any) -> dict[int, Any] | None:
    if not isinstance(value, Tensor):
        return None
    is_sequence = value.dim() == (3 if value.is_floating_point() else 2)
    free = [batch, torch.export.Dim.DYNAMIC][: min(value.dim(), 2 if is_sequence else 1)]
    if any(size < 2 for size in value.shape[: len(free)]):
        raise LoweringError(
            'dynamic_shapes="auto" needs examples of at least 2 in every free size, because torch.export fixes 0 and '
            f"1: {name} is {list(value.shape)}"
        )
    return dict(enumerate(free))


def name_axes(graph: Any) -> None:
    """Call the free sizes of an ONNX graph that nobody named `batch` and `sequence`, by where inputs have them."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, size in zip(AXES, value.shape or (), strict=False):
            symbol = str(getattr(size, "value", ""))
            if _UNNAMED.fullmatch(symbol) and symbol not in names:
                taken = axis in names.values()
                names[symbol] = f"{value.name}_{axis}" if taken else axis
    every = [*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)]
    for value in every:
        for i, size in enumerate(value.shape or ()):
            expression = getattr(size, "value", None)
            if expression is not None:
                value.shape[i] = _UNNAMED.sub(lambda found: names.get(found[0], found[0]), str(expression))
