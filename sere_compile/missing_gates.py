"""Tell the user when a compiled callable re-routes nothing, once, and as soon as it is certain."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from .config import SereConfig
from .dynamo import current_call
from .errors import GateNotFoundError
from .passes import Findings, Skip
from .passes.nodes import source_line

log = logging.getLogger(__name__)


class _GateRuns(threading.local):
    """How many graphs with gates this thread has run."""

    count = 0


gate_runs = _GateRuns()


@dataclass
class _Call:
    """The last call of one compiled callable that ran a graph without gates."""

    function: Callable[[], Any]  # weak: an id alone may come back for another callable
    frame: FrameType | None
    gate_runs: int
    nearest: Skip | None = None
    settled: bool = False


class _Calls(threading.local):
    """What this thread knows of its compiled callables, by their identity."""

    def __init__(self) -> None:
        self.by_callable: dict[int, _Call] = {}


_calls = _Calls()


def watch(
    compiled: Callable[..., Any], findings: Findings, config: SereConfig, *, whole_call: bool
) -> Callable[..., Any]:
    """Tell now if the graph is all that will run; else when the callable ran once and is called again.

    Dynamo breaks a callable into graphs, and gates may follow in a later one: that none did is certain when a second
    call begins.

    Raises:
        GateNotFoundError: with strict=True, in place of the warning.
    """
    if whole_call:
        tell(findings.nearest_miss, config)
        return compiled

    def watched(*arguments: Any) -> Any:
        _note(findings.nearest_miss, config)
        return compiled(*arguments)

    return watched


def _note(nearest: Skip | None, config: SereConfig) -> None:
    """Record that a graph without gates runs, and tell if the callable's last call ran no gate at all."""
    frame = current_call()
    if frame is None:
        return
    # The wrapper's code is shared by all compiled callables, what it wraps is not.
    function = frame.f_locals.get("fn", frame.f_code)
    call = _calls.by_callable.get(id(function))
    if call is None or call.function() is not function:
        call = _calls.by_callable[id(function)] = _Call(weakref.ref(function), frame, gate_runs.count)
    if call.settled:
        return
    call.nearest = max((call.nearest, nearest), key=lambda skip: -1 if skip is None else skip.evidence)
    if call.frame is not frame:
        # Holding the frame keeps its id from being used again; it is let go of once this is settled.
        call.settled, call.frame = True, None
        if call.gate_runs == gate_runs.count:
            tell(call.nearest, config)


def tell(nearest: Skip | None, config: SereConfig) -> None:
    """Warn or raise that nothing is re-routed, with the nearest candidate."""
    text = (
        "sere found no MoE gate in the compiled code: it runs unchanged. "
        f"{describe_nearest_miss(nearest)} print(sere_compile.explain(model, *inputs)) shows more."
    )
    if config.strict:
        raise GateNotFoundError(text)
    log.warning(text)


def describe_nearest_miss(skip: Skip | None) -> str:
    """One sentence on the selection that looked most like a gate."""
    if skip is None:
        return "It holds no top-k selection at all."
    line = source_line(skip.node)
    return f"The nearest candidate is {skip.node.name}{f' at {line}' if line else ''}: {skip}."
