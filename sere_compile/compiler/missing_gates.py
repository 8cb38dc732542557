"""Tell the user of gates that are not re-routed, once, and as soon as it is certain.

That a compiled callable holds no gate at all, or that some of its gates run outside every graph, is
certain when its second call begins: the first has compiled all that it runs.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable
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

log = logging.getLogger(__name__)


class _Runs(threading.local):
    """How many graphs this thread has run: of all, of those with gates, and of those with a re-routed gate."""

    graphs = 0
    with_gates = 0
    rewritten = 0


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


def watch(
    compiled: Callable[..., Any], findings: Findings, config: SereConfig, *, whole_call: bool
) -> Callable[..., Any]:
    """Tell now if the graph is all that will run; else when the callable ran once and is called again.

    Dynamo breaks a callable into graphs, and gates may follow in a later one: that none did is
    certain when a second call begins.

    Raises:
        GateNotFoundError: with strict=True, in place of the warning.
    """
    if whole_call:
        tell(findings.nearest_miss, config)

    def watched(*arguments: Any) -> Any:
        runs.graphs += 1
        if not whole_call:
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
    call.nearest = max((call.nearest, nearest), key=lambda skip: -1 if skip is None else skip.evidence)
    if call.frame is not frame:
        # Holding the frame keeps its id from being used again; it is let go of once this is
        # settled.
        call.settled, call.frame = True, None
        try:
            _settle(call, config)
        except GateNotFoundError as refusal:
            call.refusal = refusal
            raise
        return True
    call.routers += [weakref.ref(weight) for weight in weights]
    return False


def _settle(call: _Call, config: SereConfig) -> None:
    if call.runs_with_gates == runs.with_gates:
        tell(call.nearest, config)
        return
    outside = routers_outside([weight for ref in call.routers if (weight := ref()) is not None])
    if outside:
        _warn(
            f"these gates run outside every graph, where nothing is re-routed, while others are: {', '.join(outside)}. "
            "Dynamo gave up the code around them. sere_compile.compile(model, ...) captures expert loops; "
            "print(sere_compile.explain(model, *inputs)) names the lines.",
            config,
        )


def routers_outside(seen: list[torch.Tensor]) -> list[str]:
    """Names of routers beside experts whose code Dynamo skipped, in the model that the weights seen belong to.

    Another layer of the same code that was seen shows that its code gets into a graph: such a layer
    did not run.
    """
    owner = find_owner(seen[0]) if seen else None
    if owner is None:
        return []
    known, skipped = {id(weight) for weight in seen}, dynamo.skipped_codes()
    routers = list(routers_in(owner.root))
    captured = {type(router.modules[-1]) for router in routers if id(router.weight) in known}
    return [
        router.name
        for router in routers
        if id(router.weight) not in known
        and type(router.modules[-1]) not in captured
        and any(getattr(type(module).forward, "__code__", None) in skipped for module in _own(router.modules))
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
            _warn(f"the gate {skip.node.name}{f' at {line}' if line else ''} is not re-routed: {skip}.", config)


def tell(nearest: Skip | None, config: SereConfig) -> None:
    """Warn or raise that nothing is re-routed, with the nearest candidate."""
    text = (
        "sere found no MoE gate in the compiled code: it runs unchanged. "
        f"{describe_nearest_miss(nearest)} print(sere_compile.explain(model, *inputs)) shows more."
    )
    _warn(text, config)


def tell_no_graph(model: Any, config: SereConfig) -> None:
    """Warn that Dynamo made no graph of a model, so that no backend was called.

    Raises:
        GateNotFoundError: with strict=True, in place of the warning.
    """
    name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__qualname__", repr(model))
    breaks = dynamo.last_graph_break()
    _warn(
        f"Dynamo made no graph of {name}: all of it runs as it is, and nothing is re-routed. "
        f"{f'Dynamo says: {breaks} ' if breaks else ''}"
        "Code that loops over experts with sizes that depend on the data has to be captured as a whole: look at "
        "TORCH_LOGS=graph_breaks, or move router and top-k into a function or module of their own, which Dynamo then "
        "compiles by itself.",
        config,
    )


def _warn(text: str, config: SereConfig) -> None:
    if config.strict:
        raise GateNotFoundError(text)
    log.warning(text)


def describe_nearest_miss(skip: Skip | None) -> str:
    """One sentence on the selection that looked most like a gate."""
    if skip is None:
        return "It holds no top-k selection at all."
    line = source_line(skip.node)
    return f"The nearest candidate is {skip.node.name}{f' at {line}' if line else ''}: {skip}."
