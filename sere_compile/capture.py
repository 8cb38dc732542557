"""`compile`: torch.compile with a second way to capture a model, for gates that the first never puts into a graph.

An expert loop over data-dependent sizes (`for mask, expert in ...: rows = torch.where(mask)`) breaks Dynamo's graph
inside the loop. Dynamo then skips the whole frame, gate included. Two of its options capture such sizes as symbols, and
make some other models raise, or be skipped in their turn. What a backend gets is what was captured, so that the choice
cannot be a backend's: it is made here, around the calls.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .backend import sere_backend
from .compiler import dynamo
from .compiler.missing_gates import gate_runs

log = logging.getLogger(__name__)

_SCALARS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


def compile(
    model: Any,
    *,
    capture: str = "auto",
    mode: str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    **options: Any,
) -> Any:
    """`torch.compile(model, backend="sere")` that can also capture data-dependent expert loops.

    With capture="auto" the first call is traced with Dynamo's dynamic-shape capture. If that raises, or puts no gate
    into a graph, the model is compiled as torch.compile does by default, from then on.

    Args:
        model: an nn.Module or a function.
        capture: "auto", or "default" for what torch.compile does.
        mode: as torch.compile takes it.
        fullgraph: as torch.compile takes it.
        dynamic: as torch.compile takes it.
        **options: see `SereConfig`.

    Returns:
        What torch.compile returns: a module for a module, a function for a function.

    Raises:
        ConfigError: an unknown option or value.
    """
    sere_backend.config.replace(capture=capture)  # raises for an unknown value
    backend = sere_backend.with_options(**options)

    def compiled() -> Any:
        return torch.compile(model, backend=backend, mode=mode, fullgraph=fullgraph, dynamic=dynamic)

    result = compiled()
    if capture == "default":
        return result
    if not isinstance(model, nn.Module):
        return functools.wraps(model)(_AutoCapture(model, result, compiled()))
    result.forward = _AutoCapture(model, result.forward, compiled().forward)
    return result


class _AutoCapture:
    """Calls a model compiled with dynamic-shape capture until that proves to be no help, then one without."""

    def __init__(self, model: Any, captured: Callable[..., Any], plain: Callable[..., Any]) -> None:
        self._model = model
        self._captured = captured
        self._plain = plain
        self._dynamic: bool | None = None  # unknown before the first call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._dynamic is False:
            return self._plain(*args, **kwargs)
        if self._dynamic:
            with dynamo.dynamic_shape_capture():
                return self._captured(*args, **kwargs)
        return self._first_call(args, kwargs)

    def _first_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A frame that an earlier compile skipped would be skipped again, whatever is captured now.
        dynamo.forget_codes(self._model)
        untouched = _versions(self._model, args, kwargs)
        before = gate_runs.count
        try:
            with dynamo.dynamic_shape_capture():
                result = self._captured(*args, **kwargs)
        except Exception as error:  # what capture raises has no common class; it is logged or raised
            self._give_up(f"it raises {type(error).__name__}: {_first_line(error)}")
            if untouched is None or untouched != _versions(self._model, args, kwargs):
                error.add_note(
                    "Dynamo's dynamic-shape capture raised, and the call may have changed its arguments already. It is "
                    "switched off now: the next call is compiled as torch.compile does by default."
                )
                raise
            return self._plain(*args, **kwargs)
        if gate_runs.count > before:
            self._dynamic = True
            return result
        self._give_up("it puts no gate into a graph")
        unchanged = untouched is not None and untouched == _versions(self._model, args, kwargs)
        return self._plain(*args, **kwargs) if unchanged else result

    def _give_up(self, reason: str) -> None:
        self._dynamic = False
        dynamo.forget_codes(self._model)
        log.info("compiling without dynamic-shape capture: %s", reason)


def _versions(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
    """Counters of in-place changes of everything a call could change, None where that cannot be told (a cache)."""
    leaves = tree_leaves((args, kwargs))
    if isinstance(model, nn.Module):
        leaves += [*model.parameters(), *model.buffers()]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    known = all(isinstance(leaf, (torch.Tensor, *_SCALARS)) for leaf in leaves)
    if not known or any(tensor.is_inference() for tensor in tensors):
        return None
    return [tensor._version for tensor in tensors]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
