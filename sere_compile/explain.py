"""`explain`: what re-routing would do to a model, without changing what it computes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from .backend import SereBackend
from .compiler import dynamo
from .compiler.eager_selections import WatchSelections
from .compiler.observed_graph import observer, on_whole_call
from .config import SereConfig
from .report import SKIPPED, GateReport, GateRow

_OUTSIDE = "it ran outside every graph"


def explain(model: Any, *args: Any, config: SereConfig | None = None, **kwargs: Any) -> GateReport:
    """Trace one call of a model and report every gate: what would be done, and why not.

    The model runs once, unchanged, without gradients and without probing. Where Dynamo breaks it
    into several graphs or skips a frame, it runs a second time, in eager mode and on copies of the
    arguments, to find gates that no graph shows; arguments that cannot be copied leave that out.

    Args:
        model: an nn.Module or function, compiled or not.
        *args: passed to the model.
        config: options to explain with; the defaults of the backend otherwise. With strict=True
            each gate is run, as traced and re-routed, and the report says what that proved.
        **kwargs: passed to the model.

    Returns:
        A report whose `str()` is a table.
    """
    rows: dict[str, GateRow] = {}

    def observe(row: GateRow) -> None:
        rows.setdefault(row.name, row)

    config = config or SereConfig()
    backend = SereBackend(config.replace(capture="default"), explaining=True)
    capture = dynamo.dynamic_shape_capture() if config.capture == "auto" else contextlib.nullcontext()
    original = getattr(model, "_orig_mod", model)
    again = _copied((args, kwargs))
    whole_calls: list[bool] = []
    tokens = observer.set(observe), on_whole_call.set(lambda: whole_calls.append(True))
    try:
        with dynamo.unlimited_recompiles(), capture, torch.no_grad(), dynamo.without_own_compile(original):
            torch.compile(original, backend=backend)(*args, **kwargs)
            if not whole_calls and again is not None:
                for row in _rows_outside(original, *again, seen=tuple(rows.values())):
                    observe(row)
    finally:
        observer.reset(tokens[0])
        on_whole_call.reset(tokens[1])
    found = tuple(rows.values())
    return GateReport(found, _hint(found))


def _rows_outside(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, seen: tuple[GateRow, ...]
) -> Iterator[GateRow]:
    """Gates of an eager run that no graph held, neither as a gate nor as a refused selection."""
    with WatchSelections() as watch:
        model(*args, **kwargs)
    for selection in watch.found:
        owner = watch.owners.find(selection.weight)
        name = owner.name if owner is not None else selection.place
        refused = any(row.num_experts is None and f"({selection.place})" in row.name for row in seen)
        if refused or any(row.name == name for row in seen):
            continue
        reason = f"{_OUTSIDE}, at {selection.place}"
        yield GateRow(name, selection.num_experts, selection.top_k, None, "", None, "", SKIPPED, reason)


def _copied(value: Any) -> Any:
    """A deep copy, or None of what cannot be copied."""
    try:
        return copy.deepcopy(value)
    except (RuntimeError, TypeError, NotImplementedError):
        return None


def _hint(rows: tuple[GateRow, ...]) -> str:
    if any(row.reason.startswith(_OUTSIDE) for row in rows):
        return (
            "Dynamo skipped or broke the code of gates that ran outside every graph. Compile with "
            "sere_compile.compile(model, ...), which captures expert loops, or see with torch.compile(fullgraph=True) "
            "what breaks the graph."
        )
    if any(row.num_experts for row in rows):
        return ""
    if rows:
        return "No selection above is an MoE gate that a graph shows."
    return "No graph held a top-k selection. Is the model an MoE, and does Dynamo trace it (TORCH_LOGS=graph_breaks)?"
