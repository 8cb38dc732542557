"""Whether a call under dynamic-shape capture gives what the model gives: torch itself is wrong about some loops.

With numbers read from tensors as symbols, Dynamo takes `n in ids[t].tolist()` for False whatever the list holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..experts.trial_block import is_changed, write_back
from . import dynamo

_APART = 1e-2  # of the norm, and more in half precision: a compiler rounds, and a close choice may be another one
_APART_IN_HALF = 1e-1
# Of buffers that are copied: quantised weights, or a cache of keys and values, may not fit twice.
MOST_BYTES = 1 << 30


def copy_of(call: Any) -> Any:
    """The arguments of a call with tensors of their own; anything that is no tensor is shared."""

    def copied(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)

    return tree_map(copied, call)


class HeldBuffers:
    """The buffers of a model as they are now. By their numbers: `running_mean` changes and no version counter tells.

    The smallest are copied, up to `MOST_BYTES` of all. Others, which no norm has, are told by that counter and not put
    back.

    Args:
        model: anything but a module has none.
    """

    def __init__(self, model: Any) -> None:
        modules = list(model.modules()) if isinstance(model, nn.Module) else []
        dictionaries = [(module._buffers, dict(module._buffers)) for module in modules]
        # TorchScript gives a view of its own, in which nothing else can be put.
        self._dictionaries = [(now, held) for now, held in dictionaries if isinstance(now, dict)]
        buffers = {id(b): b for _, held in dictionaries for b in held.values() if b is not None}.values()
        self._kept: list[tuple[torch.Tensor, int, torch.Tensor]] = []
        self._uncopied: list[tuple[torch.Tensor, int]] = []
        copied = 0
        for buffer in sorted(filter(_is_written_to, buffers), key=_bytes):
            copied += _bytes(buffer)
            if copied <= MOST_BYTES and not buffer.is_nested:
                self._kept.append((buffer, buffer._version, buffer.detach().clone()))
            else:
                self._uncopied.append((buffer, buffer._version))

    def are_same(self) -> bool:
        """Whether they are what they were."""
        untouched = all(buffer._version == version for buffer, version in self._uncopied)
        replaced = any(not _holds(now, held) for now, held in self._dictionaries)
        return untouched and not replaced and next(self._changed(), None) is None

    def put_back(self) -> None:
        """Make them what they were, also those that others took the place of."""
        with torch.no_grad():
            for buffer, before in list(self._changed()):
                write_back(buffer, before)
        self._kept = [(buffer, buffer._version, before) for buffer, _, before in self._kept]
        for now, held in self._dictionaries:
            if not _holds(now, held):  # else a thread that calls the model would miss buffers for a moment
                now.clear()
                now.update(held)

    def _changed(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for buffer, version, before in self._kept:
            if is_changed(buffer, before, version):
                yield buffer, before


def _holds(now: dict[str, torch.Tensor | None], held: dict[str, torch.Tensor | None]) -> bool:
    """Whether a dictionary has the same tensors under the same names."""
    return now.keys() == held.keys() and all(now[name] is held[name] for name in held)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def buffer_bytes(model: Any) -> int:
    """How much memory the buffers of a model take; anything but a module has none."""
    return sum(map(_bytes, model.buffers())) if isinstance(model, nn.Module) else 0


def _is_written_to(buffer: torch.Tensor) -> bool:
    """Whether a call may write to it and its numbers can be read."""
    return not (buffer.is_inference() or buffer.is_meta)


@contextlib.contextmanager
def buffers_restored(model: Any) -> Iterator[None]:
    """Meanwhile a call may write to the model's buffers, or put others in their place."""
    held = HeldBuffers(model)
    try:
        yield
    finally:
        held.put_back()


def eager_results(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the model gives without any compiler; the call's arguments are not written to."""
    own_args, own_kwargs = copy_of((args, kwargs))
    with buffers_restored(model), dynamo.running_eager():
        return model(*own_args, **own_kwargs)


def shows_wrong(got: Any, run: Callable[[], Any]) -> bool:
    """Whether a result is none that the model gives; one that gives others each time shows nothing.

    Args:
        got: the result.
        run: makes the call in eager mode.
    """
    wanted = run()
    return not is_same(got, wanted) and is_same(run(), wanted)


def is_same(got: Any, wanted: Any) -> bool:
    """Whether two results are the same but for rounding; where they hold floats, those count alone."""
    pairs = [[leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)] for result in (got, wanted)]
    if [tensor.shape for tensor in pairs[0]] != [tensor.shape for tensor in pairs[1]]:
        return False
    both = list(zip(*pairs, strict=True))
    floats = [(a, b) for a, b in both if b.is_floating_point()]
    return all(_is_near(a, b) for a, b in floats) if floats else all(torch.equal(a, b) for a, b in both)


def _is_near(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    apart = _APART if wanted.element_size() > 2 else _APART_IN_HALF
    a, b = (torch.nan_to_num(tensor.detach().float(), posinf=0, neginf=0) for tensor in (got, wanted))
    return bool((a - b).norm() <= apart * b.norm())
