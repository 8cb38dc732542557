"""`explain`: what re-routing would do to a model, without changing what it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from . import dynamo
from .backend import SereBackend
from .bound_graph import observer
from .config import SereConfig
from .report import GateReport, GateRow


def explain(model: Any, *args: Any, config: SereConfig | None = None, **kwargs: Any) -> GateReport:
    """Trace one call of a model and report every gate: what would be done, and why not.

    The model runs once, unchanged, without gradients and without probing.

    Args:
        model: an nn.Module or function, compiled or not.
        *args: passed to the model.
        config: options to explain with; the defaults of the backend otherwise.
        **kwargs: passed to the model.

    Returns:
        A report whose `str()` is a table.
    """
    rows: dict[str, GateRow] = {}

    def observe(row: GateRow) -> None:
        rows.setdefault(row.name, row)

    config = config or SereConfig()
    backend = SereBackend(config.replace(strict=False, capture="default"), explaining=True)
    capture = dynamo.dynamic_shape_capture() if config.capture == "auto" else contextlib.nullcontext()
    original = getattr(model, "_orig_mod", model)
    # A compile of its own must not run into the limit that the user's compiles of the same code count against.
    limits = torch._dynamo.config.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20)
    token = observer.set(observe)
    try:
        with limits, capture, torch.no_grad(), _without_own_compile(original):
            torch.compile(original, backend=backend)(*args, **kwargs)
    finally:
        observer.reset(token)
    found = tuple(rows.values())
    return GateReport(found, "" if any(row.num_experts for row in found) else _hint(found))


def _hint(rows: tuple[GateRow, ...]) -> str:
    if rows:
        return "No selection above is an MoE gate that a graph shows."
    return "No graph held a top-k selection. Is the model an MoE, and does Dynamo trace it (TORCH_LOGS=graph_breaks)?"


@contextlib.contextmanager
def _without_own_compile(model: Any) -> Iterator[None]:
    """Calls of a module that was compiled in place (`model.compile()`) run its own code meanwhile."""
    own = getattr(model, "_compiled_call_impl", None)
    if own is None:
        yield
        return
    model._compiled_call_impl = None
    try:
        yield
    finally:
        model._compiled_call_impl = own
