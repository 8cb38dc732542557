"""Run a graph as it was traced, and report what would be done to its gates: the graph behind `explain`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from torch.fx import GraphModule

from ..experts.owner import Owners
from ..passes import Skip
from ..passes.graph.nodes import source_line
from ..report import GateRow
from .gate_matrices import named_entry
from .gate_plan import GatePlan
from .report_rows import row_of, row_of_skip

# Where `explain` collects rows. Not part of a backend: two explaining backends have to be equal, or
# each would leave a compiled version of its own in Dynamo's cache.
observer: ContextVar[Callable[[GateRow], None]] = ContextVar("observer", default=lambda row: None)
# ... and is told that one graph was all of the call, so that nothing ran outside.
on_whole_call: ContextVar[Callable[[], None]] = ContextVar("on_whole_call", default=lambda: None)
# ... and which lines of the user's code the graph holds.
on_lines: ContextVar[Callable[[frozenset[str]], None]] = ContextVar("on_lines", default=lambda lines: None)


class ObservedGraph:
    """A graph as it was traced, that reports its gates and refused selections to `observer` whenever it runs."""

    def __init__(
        self, original: GraphModule, plans: list[GatePlan], skips: Sequence[Skip], *, whole_call: bool
    ) -> None:
        self._original = original.forward
        self._lines = frozenset(source_line(node) for node in original.graph.nodes)
        self._plans = plans
        self._skips = skips
        self._whole_call = whole_call

    def __call__(self, *arguments: Any) -> Any:
        """Report, then run the original graph."""
        report, owners = observer.get(), Owners()
        on_lines.get()(self._lines)
        if self._whole_call:
            on_whole_call.get()()
        for plan in self._plans:
            report(row_of(plan, named_entry(plan, plan.weight(arguments), owners)))
        for skip in self._skips:
            report(row_of_skip(skip))
        return self._original(*arguments)
