"""Tell the user of gates that are not re-routed, once, and as soon as it is certain.

That a compiled callable holds no gate at all, or that some of its gates run outside every graph, is
certain when its first call ends. `sere_compile.compile` sees that end; a backend by itself knows of
it when the second call begins.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..config import SereConfig
from ..errors import GateNotFoundError
from ..experts.owner import find_owner, routers_in
from ..passes import Findings, Skip
from ..passes.graph.nodes import source_line
from . import dynamo
from .obstacle import diagnose, model_of

log = logging.getLogger(__name__)

# What tells a gate from others in another way to compile a model: its router's weight, else the line that selects.
GateKey = torch.Tensor | str


class _Runs(threading.local):
    """How many graphs this thread has run: of all, of those with gates, and of those with a re-routed gate."""

    graphs = 0
    with_gates = 0
    rewritten = 0
    as_traced = False  # meanwhile re-routed graphs run as they were traced, and count as re-routed


runs = _Runs()


@dataclass
class _Call:
    """The last call of one compiled callable that ran a graph without gates."""

    function: Callable[[], Any]  # weak: an id alone may come back for another callable
    frame: FrameType | None
    runs_with_gates: int
    nearest: Skip | None = None
    settled: bool = False
    refusal: GateNotFoundError | None = None  # with strict=True what every later call raises as well
    routers: list[Callable[[], torch.Tensor | None]] = field(default_factory=list)  # weights of the gates that ran


class _Calls(threading.local):
    """What this thread knows of its compiled callables, by their identity."""

    def __init__(self) -> None:
        self.by_callable: dict[int, _Call] = {}


_calls = _Calls()
# The call of `sere_compile.compile` under way, which reports when it ends, and not when the next one begins.
_watched: ContextVar[OneCall | None] = ContextVar("sere call", default=None)


@dataclass
class OneCall:
    """What the graphs of one call show, for a caller that knows when it ends.

    Attributes:
        nearest: of the selections that are no gates, the one that looked most like one.
        routers: weights of the gates that ran.
        settled: whether all there is to say was said at compile time.
        held: weights of the gates that ran in graphs of a call that was made again, which said why each stays.
        refusal: with strict=True what such a call raised.
        trying: whether the call is made again, in another way, if no gate is re-routed in this one.
        told: warnings of what was compiled for it, in each way.
        kept_back: warnings of one way, for when it is known whether the call was made in another; see `warn`.
        clear: gates that this way re-routes, or warns of, if any warning is kept back.
    """

    nearest: Skip | None = None
    routers: list[torch.Tensor] = field(default_factory=list)
    settled: bool = False
    held: list[torch.Tensor] = field(default_factory=list)
    refusal: GateNotFoundError | None = None
    trying: bool = False
    told: set[str] = field(default_factory=set)
    kept_back: list[tuple[logging.Logger, str, GateKey | None]] = field(default_factory=list)
    clear: list[GateKey] = field(default_factory=list)
    _was_held: bool = False
    _before: int = field(default_factory=lambda: runs.with_gates)

    def forget(self) -> None:
        """The call is made again, in another way: what graphs hold then may be less."""
        self._was_held = self.was_one_graph
        self.held, self.routers, self.settled, self._before = self.routers, [], False, runs.with_gates
        self.trying, self.clear = False, []

    def give_warnings(self) -> None:
        """Those that were kept back: all, or of a way that was given up those of gates that are not `clear` now."""
        for logger, text, gate in self.kept_back:
            if self.trying or (gate is not None and not any(_is_same(gate, other) for other in self.clear)):
                self.give(logger, text)
        self.kept_back = []

    def give(self, logger: logging.Logger, text: str) -> None:
        """Warn, once in a call."""
        if text not in self.told:
            self.told.add(text)
            logger.warning(text)

    @property
    def was_held(self) -> bool:
        """Whether all of it was a graph with gates, in this way or one that was given up."""
        return self._was_held or self.was_one_graph

    @property
    def was_one_graph(self) -> bool:
        """Whether all of it was a graph with gates: such a graph is not watched, and tells of no routers."""
        return runs.with_gates > self._before and not self.routers


@contextlib.contextmanager
def one_call() -> Iterator[OneCall]:
    """Graphs that run meanwhile leave it to the caller to report, with `settle`."""
    call = OneCall()
    token = _watched.set(call)
    try:
        yield call
    finally:
        _watched.reset(token)
        call.give_warnings()


def warn(logger: logging.Logger, text: str, *gate: GateKey) -> None:
    """Warn of what was compiled, once in the call under way.

    In a call that may be made again this waits for its end: a gate that one way cannot re-route another may.

    Args:
        logger: gives the warning.
        text: of it.
        gate: that is not re-routed; without, the warning is of what was re-routed.
    """
    call = _watched.get()
    if call is None:
        logger.warning(text)
    elif call.trying:
        call.kept_back.append((logger, text, *(gate or (None,))))
    else:
        call.give(logger, text)
        call.clear += gate


def note_rerouted(gates: Callable[[], Iterable[GateKey]]) -> None:
    """Tell the call under way which gates a graph re-routes that runs now, if it asks."""
    call = _watched.get()
    if call is not None and call.kept_back:
        call.clear += gates()


def _is_same(left: GateKey, right: GateKey) -> bool:
    """Whether two keys are of one gate; a line that is not known is of none."""
    if isinstance(left, str) and isinstance(right, str):
        return left == right != ""
    return left is right


def settle(
    call: OneCall, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], config: SereConfig, *, captured: bool
) -> None:
    """Report what a call of a model has shown.

    Raises:
        GateNotFoundError: with strict=True, in place of the warning.
    """
    if call.settled or call.was_held:
        return
    module, seen = model_of(model), [*call.routers, *call.held]
    outside = routers_outside(module, seen) if module is not None else []
    if call.refusal is not None and (outside or not seen):
        raise call.refusal
    if outside and (seen or call.nearest is None):
        tell_outside(outside, model, args, kwargs, config, captured=captured)
    elif not seen:
        tell(call.nearest, config)


def watch(
    compiled: Callable[..., Any], findings: Findings, config: SereConfig, *, whole_call: bool
) -> Callable[..., Any]:
    """Tell now if the graph is all that will run; else when the callable ran once and is called again.

    Dynamo breaks a callable into graphs, and gates may follow in a later one: that none did is
    certain when a second call begins.

    Raises:
        GateNotFoundError: with strict=True, in place of the warning.
    """
    trying = (call := _watched.get()) is not None and call.trying
    if whole_call and not trying:
        if call is not None:
            call.settled = True
        tell(findings.nearest_miss, config)

    def watched(*arguments: Any) -> Any:
        if dynamo.is_fake_call():  # it is compiled still
            return compiled(*arguments)
        runs.graphs += 1
        if not whole_call or trying:
            _note(config, findings.nearest_miss, [])
        return compiled(*arguments)

    return watched


def watch_others(config: SereConfig) -> Callable[[list[torch.Tensor]], bool]:
    """What a graph with gates calls with their weights whenever it runs, until the answer is True.

    Raises:
        GateNotFoundError: with strict=True, other gates of the model run outside every graph.
    """
    return lambda weights: _note(config, None, weights)


def _note(config: SereConfig, nearest: Skip | None, weights: list[torch.Tensor]) -> bool:
    """Record that a graph runs, and report what the callable's last call has shown.

    Returns:
        Whether nothing is left to report.
    """
    if (watched := _watched.get()) is not None:
        watched.nearest = _nearer(watched.nearest, nearest)
        watched.routers += weights
        return False
    frame = dynamo.current_call()
    if frame is None:
        return False
    # The wrapper's code is shared by all compiled callables, what it wraps is not.
    function = frame.f_locals.get("fn", frame.f_code)
    call = _calls.by_callable.get(id(function))
    if call is None or call.function() is not function:
        call = _calls.by_callable[id(function)] = _Call(weakref.ref(function), frame, runs.with_gates)
    if call.refusal is not None:
        raise GateNotFoundError(str(call.refusal))
    if call.settled:
        return True
    call.nearest = _nearer(call.nearest, nearest)
    if call.frame is not frame:
        # Holding the frame keeps its id from being used again; it is let go of once this is
        # settled.
        call.settled, call.frame = True, None
        try:
            _settle(call, frame, config)
        except GateNotFoundError as refusal:
            call.refusal = refusal
            raise
        return True
    call.routers += [weakref.ref(weight) for weight in weights]
    return False


def _nearer(left: Skip | None, right: Skip | None) -> Skip | None:
    return max((left, right), key=lambda skip: -1 if skip is None else skip.evidence)


def _settle(call: _Call, frame: FrameType, config: SereConfig) -> None:
    """Report what one call has shown; `frame` is the next one's."""
    function, args = frame.f_locals.get("fn"), frame.f_locals.get("args", ())
    kwargs = frame.f_locals.get("kwargs", {})
    if call.runs_with_gates == runs.with_gates:
        model = model_of(function)
        if call.nearest is None and model is not None and (outside := routers_outside(model, [])):
            tell_outside(outside, model, args, kwargs, config)
        else:
            tell(call.nearest, config)
        return
    seen = [weight for ref in call.routers if (weight := ref()) is not None]
    owner = find_owner(seen[0]) if seen else None
    if owner is not None and (outside := routers_outside(owner.root, seen)):
        tell_outside(outside, model_of(function) or function, args, kwargs, config)


def tell_outside(
    outside: Sequence[str],
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    config: SereConfig,
    *,
    captured: bool = False,
) -> None:
    """Warn of gates that no graph holds, and name the line that keeps them out; see `diagnose`.

    Raises:
        GateNotFoundError: with strict=True, in place of the warning.
    """
    _warn(
        f"these gates run outside every graph, where nothing is re-routed: {', '.join(outside)}. "
        f"{diagnose(model, args, kwargs, captured=captured)}",
        config,
    )


def routers_outside(model: nn.Module, seen: Sequence[torch.Tensor]) -> list[str]:
    """Names of routers beside experts whose code Dynamo skipped, in a model.

    Another layer of the same code that was seen shows that its code gets into a graph: such a layer
    did not run.

    Args:
        model: the outermost module.
        seen: weights of the gates that graphs held.
    """
    known, skipped = {id(weight) for weight in seen}, dynamo.skipped_codes()
    routers = list(routers_in(model))
    captured = {type(router.modules[-1]) for router in routers if id(router.weight) in known}
    return [
        router.name
        for router in routers
        if id(router.weight) not in known
        and type(router.modules[-1]) not in captured
        and any(getattr(dynamo.forward_of(module), "__code__", None) in skipped for module in _own(router.modules))
    ]


def _own(modules: tuple[nn.Module, ...]) -> list[nn.Module]:
    """Modules of the model's own classes: Dynamo never compiles a call of nn.Linear for itself."""
    return [module for module in modules if not type(module).__module__.startswith("torch.")]


def tell_refused(skips: Iterable[Skip], config: SereConfig) -> None:
    """Warn of selections that are gates by all evidence and cannot be re-routed; others of the model may be.

    Raises:
        GateNotFoundError: with strict=True, in place of the warning.
    """
    for skip in skips:
        if skip.is_refused_gate:
            line = source_line(skip.node)
            where = f" at {line}" if line else ""
            _warn(f"the gate {skip.node.name}{where} is not re-routed: {skip}.", config, line)


def tell(nearest: Skip | None, config: SereConfig) -> None:
    """Warn or raise that nothing is re-routed, with the nearest candidate."""
    text = (
        "sere found no MoE gate in the compiled code: it runs unchanged. "
        f"{describe_nearest_miss(nearest)} print(sere_compile.explain(model, *inputs)) shows more. "
        f"{dynamo.recompile_limit_hint()}"
    )
    _warn(text.strip(), config)


def tell_no_graph(
    model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], config: SereConfig, *, captured: bool
) -> None:
    """Warn that Dynamo made no graph of a model, so that no backend was called; see `diagnose`.

    Raises:
        GateNotFoundError: with strict=True, in place of the warning.
    """
    name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__qualname__", repr(model))
    _warn(
        f"Dynamo made no graph of {name}: all of it runs as it is, and nothing is re-routed. "
        f"{diagnose(model, args, kwargs, captured=captured)}",
        config,
    )


def _warn(text: str, config: SereConfig, *gate: GateKey) -> None:
    if config.strict:
        raise GateNotFoundError(text)
    warn(log, text, *gate)


def describe_nearest_miss(skip: Skip | None) -> str:
    """One sentence on the selection that looked most like a gate."""
    if skip is None:
        return "It holds no top-k selection at all."
    line = source_line(skip.node)
    return f"The nearest candidate is {skip.node.name}{f' at {line}' if line else ''}: {skip}."
