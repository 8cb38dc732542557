"""`compile`: torch.compile with a second way to capture a model, for gates that the first never puts into a graph.

An expert loop over data-dependent sizes (`for mask, expert in ...: rows = torch.where(mask)`) breaks Dynamo's graph
inside the loop. Dynamo then skips the whole frame, gate included. Two of its options capture such sizes as symbols, and
make some other models raise, or be skipped in their turn. What a backend gets is what was captured, so that the choice
cannot be a backend's: it is made here, around the calls.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .backend import sere_backend
from .compiler import dynamo, missing_gates
from .compiler.held_warnings import held_warnings
from .compiler.kept_aside import KeptAside, Remembered, remember_generators
from .compiler.missing_gates import runs
from .compiler.same_numbers import (
    MOST_BYTES,
    HeldBuffers,
    buffer_bytes,
    buffers_restored,
    copy_of,
    eager_results,
    shows_wrong,
)
from .config import SereConfig
from .errors import GateNotFoundError, expect

log = logging.getLogger(__name__)

_NO_GATE = "it lets no gate be re-routed"
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

    With capture="auto" the first call is traced with Dynamo's dynamic-shape capture. If that raises, lets
    no gate be re-routed, or gives other numbers than the model before anything is re-routed, the model is
    compiled as torch.compile does by default, from then on. That is tried on copies of the arguments, and
    not where they hold more than tensors and plain values, such as a cache. The
    end of the first call says which gates no graph holds, and which line of code keeps them out; with
    strict=True it raises, as every later call does.

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
        ArgumentError: `model` cannot be called.
        ConfigError: an unknown option or value.
        GateNotFoundError: of every call, with strict=True: a gate of the model is not re-routed.
    """
    expect(model, Callable, "compile takes a torch.nn.Module or a function")
    sere_backend.config.replace(capture=capture)  # raises for an unknown value
    backend = sere_backend.with_options(**options)

    def compiled() -> Any:
        return torch.compile(model, backend=backend, mode=mode, fullgraph=fullgraph, dynamic=dynamic)

    result = compiled()
    captured = compiled() if capture == "auto" else None
    if not isinstance(model, nn.Module):
        return functools.wraps(model)(_Compiled(model, result, captured, backend.config))
    result.forward = _Compiled(model, result.forward, None if captured is None else captured.forward, backend.config)
    return result


class _Compiled:
    """A compiled model that tells when nothing of it is re-routed.

    With `captured` it is called with dynamic-shape capture until that proves to be no help.
    """

    def __init__(
        self, model: Any, plain: Callable[..., Any], captured: Callable[..., Any] | None, config: SereConfig
    ) -> None:
        self._model = model
        self._plain = plain
        self._captured = captured
        self._config = config
        self._dynamic: bool | None = None if captured is not None else False  # None before the first call
        self._settled = False
        self._refusal: GateNotFoundError | None = None
        self._routers: list[weakref.ref[torch.Tensor]] = []  # of the gates that the first call's graphs held

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._refusal is not None:
            raise GateNotFoundError(str(self._refusal))
        before = runs.graphs
        with missing_gates.one_call() as call:
            if self._dynamic is None:
                with _warnings_of_one_call() as made_again:
                    result = self._first_call(call, made_again, args, kwargs)
            elif self._dynamic:
                result = self._call_captured(args, kwargs)
            else:
                result = self._call_plain(args, kwargs)
        if not self._settled:
            self._settled = True
            self._routers = [weakref.ref(weight) for weight in (*call.routers, *call.held)]
            self._settle(call, args, kwargs, no_graph=runs.graphs == before)
        elif self._routers and call.nearest is not None and not call.routers:
            self._tell_lost(call)
        return result

    def _tell_lost(self, call: missing_gates.OneCall) -> None:
        """Say once that what was compiled anew for a later call re-routes nothing; with strict=True this raises."""
        lost = any(ref() is not None for ref in self._routers)
        self._routers = []
        if not lost:  # the weights were replaced
            return
        try:
            missing_gates.tell(call.nearest, self._config)
        except GateNotFoundError as refusal:
            self._refusal = refusal
            raise

    def _settle(
        self, call: missing_gates.OneCall, args: tuple[Any, ...], kwargs: dict[str, Any], *, no_graph: bool
    ) -> None:
        """Say what was not re-routed; with strict=True this raises, and every later call does."""
        captured = self._captured is not None
        try:
            if no_graph and call.refusal is None:
                missing_gates.tell_no_graph(self._model, args, kwargs, self._config, captured=captured)
            else:
                missing_gates.settle(call, self._model, args, kwargs, self._config, captured=captured)
        except GateNotFoundError as refusal:
            self._refusal = refusal
            raise

    def _call_captured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._captured is not None
        with dynamo.running, dynamo.dynamic_shape_capture():
            return self._captured(*args, **kwargs)

    def _call_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As torch.compile does by default; where capture was to be tried, with graphs of what is ahead of loops."""
        with dynamo.running, contextlib.nullcontext() if self._captured is None else dynamo.graphs_before_loops():
            return self._plain(*args, **kwargs)

    def _first_call(
        self,
        call: missing_gates.OneCall,
        made_again: Callable[[], None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        # A frame that an earlier compile skipped would be skipped again, whatever is captured now.
        dynamo.forget_codes(self._model)
        # What its code keeps in attributes, lists and objects, and may read in the next call.
        aside = KeptAside(self._model).remember() if isinstance(self._model, nn.Module) else None
        untouched: _Untouched | None = None
        random_state = _RandomState(self._model, args, kwargs)
        call.trying = True
        is_tried = _versions(self._model, args, kwargs) is not None and _can_be_put_back(self._model, aside)
        try:
            is_right = not is_tried or self._captures_right(args, kwargs, random_state, aside)
            if is_right:
                made_again()
                is_tried, untouched, before = False, _Untouched(self._model, args, kwargs), runs.rewritten
                result = self._call_captured(args, kwargs)
        except Exception as error:  # what capture raises has no common class; it is logged or raised
            self._give_up(f"it raises {type(error).__name__}: {_first_line(error)}")
            if not is_tried and not self._can_be_made_again(untouched, aside, args, kwargs):
                error.add_note(
                    "Dynamo's dynamic-shape capture raised, and the call may have changed its arguments already. It is "
                    "switched off now: the next call is compiled as torch.compile does by default."
                )
                raise
            refusal = dynamo.raised_by_backend(error, GateNotFoundError)
            return self._start_again(call, made_again, args, kwargs, random_state, refusal)
        if not is_right:
            return self._start_again(call, made_again, args, kwargs, random_state)
        if runs.rewritten > before:
            self._dynamic = True
            return result
        self._give_up(_NO_GATE)
        if not self._can_be_made_again(untouched, aside, args, kwargs):
            return result
        return self._start_again(call, made_again, args, kwargs, random_state)

    def _captures_right(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], random_state: _RandomState, aside: Remembered | None
    ) -> bool:
        """Whether capture lets a gate be re-routed, and its graphs as traced give what the model gives.

        The call is made on copies of its arguments: captured, with its graphs as they were traced, and in eager mode.
        Everything is put back.
        """

        @contextlib.contextmanager
        def put_back() -> Iterator[None]:
            try:
                yield
            finally:
                random_state.restore()
                if aside is not None:
                    aside.put_back()

        def run() -> Any:
            with put_back():  # the buffers are put back already
                return eager_results(self._model, args, kwargs)

        before, own = runs.rewritten, copy_of((args, kwargs))
        runs.as_traced = True
        try:
            with put_back(), buffers_restored(self._model):
                shown = self._call_captured(*own)
        finally:
            runs.as_traced = False
            is_rewritten, runs.rewritten = runs.rewritten > before, before
        if not is_rewritten:
            self._give_up(_NO_GATE)
            return False
        if shows_wrong(shown, run):
            self._give_up("before anything is re-routed it gives other numbers than the model in eager mode")
            return False
        return True

    def _start_again(
        self,
        call: missing_gates.OneCall,
        made_again: Callable[[], None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        random_state: _RandomState,
        refusal: GateNotFoundError | None = None,
    ) -> Any:
        """Make the call in the other way, now that capture is given up."""
        random_state.restore()
        call.forget()
        made_again()
        call.refusal = refusal
        return self._call_plain(args, kwargs)

    def _can_be_made_again(
        self, untouched: _Untouched | None, aside: Remembered | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether a call has left all as it was; what it has kept aside is put back for that."""
        if untouched is None or not untouched.is_shown(args, kwargs):
            return False
        if aside is not None:
            if not aside.is_all_known():
                return False
            aside.put_back()
        return True

    def _give_up(self, reason: str) -> None:
        self._dynamic = False
        dynamo.forget_codes(self._model)
        log.info("compiling without dynamic-shape capture: %s", reason)


@contextlib.contextmanager
def _warnings_of_one_call() -> Iterator[Callable[[], None]]:
    """Warnings inside are given at the end, those of a call that is made again once.

    Yields a function that says that the call is made again. What is warned of in the first try alone is given too: it
    may be said once in a process.
    """
    first, given = 0, list[warnings.WarningMessage]()

    def made_again() -> None:
        nonlocal first
        first = len(given)

    try:
        with held_warnings() as given:
            yield made_again
    finally:
        again = {(one.category, str(one.message)) for one in given[first:]}
        for place, one in enumerate(given):
            if place >= first or (one.category, str(one.message)) not in again:
                warnings.showwarning(one.message, one.category, one.filename, one.lineno, one.file, one.line)


class _RandomState:
    """The state of torch's, Python's and numpy's generators: a call that is made again draws the same numbers."""

    def __init__(self, *holders: Any) -> None:
        leaves = tree_leaves(holders[1:])
        if isinstance(holders[0], nn.Module):
            leaves += [*holders[0].parameters(), *holders[0].buffers()]
        devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)}
        self._cpu, self._others = torch.get_rng_state(), remember_generators()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}

    def restore(self) -> None:
        """Draw from here on what was drawn since this was made."""
        torch.set_rng_state(self._cpu)
        self._others()
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


class _Untouched:
    """What shows that a call has changed neither its arguments nor the parameters and buffers of the model."""

    def __init__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model, self._versions = model, _versions(model, args, kwargs)
        self._buffers = HeldBuffers(model)

    def is_shown(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether it is shown after a call with these arguments."""
        if self._versions is None or self._versions != _versions(self._model, args, kwargs):
            return False
        return self._buffers.are_same()


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


def _can_be_put_back(model: Any, aside: Remembered | None) -> bool:
    """Whether a call can be tried: buffers, and what its code keeps aside, can be copied."""
    if not isinstance(model, nn.Module) or aside is None:
        return True
    return buffer_bytes(model) <= MOST_BYTES and not aside.has_uncopied


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
