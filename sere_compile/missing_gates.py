"""Tell the user when a compiled callable re-routes nothing, once, and as soon as it is certain."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from .config import SereConfig
from .errors import GateNotFoundError
from .passes import Findings, Skip
from .passes.nodes import source_line

log = logging.getLogger(__name__)


class _GateRuns(threading.local):
    """How many graphs with gates this thread has run."""

    count = 0


gate_runs = _GateRuns()


def watch(
    compiled: Callable[..., Any], findings: Findings, config: SereConfig, *, whole_call: bool
) -> Callable[..., Any]:
    """Warn now if the graph is all that will run; else when it runs again and no gate ran in between.

    Raises:
        GateNotFoundError: with strict=True, in place of the warning.
    """
    if whole_call:
        tell(findings, config)
        return compiled
    return _Watched(compiled, findings, config)


class _Watched:
    """The first part of a callable that Dynamo broke into graphs: its second run starts a second call."""

    def __init__(self, compiled: Callable[..., Any], findings: Findings, config: SereConfig) -> None:
        self._compiled, self._findings, self._config = compiled, findings, config
        self._runs_before: int | None = None
        self._settled = False

    def __call__(self, *arguments: Any) -> Any:
        if not self._settled:
            if self._runs_before is None:
                self._runs_before = gate_runs.count
            else:
                self._settled = True
                if self._runs_before == gate_runs.count:
                    tell(self._findings, self._config)
        return self._compiled(*arguments)


def tell(findings: Findings, config: SereConfig) -> None:
    """Warn or raise that nothing is re-routed, with the nearest candidate."""
    text = (
        "sere found no MoE gate in the compiled code: it runs unchanged. "
        f"{describe_nearest_miss(findings.nearest_miss)} print(sere_compile.explain(model, *inputs)) shows more."
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
