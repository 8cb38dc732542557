"""`explain`: what re-routing would do to a model, without changing what it computes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .backend import SereBackend
from .compiler import dynamo
from .compiler.eager_selections import WatchSelections
from .compiler.kept_aside import KeptAside
from .compiler.observed_graph import observer, on_lines, on_whole_call
from .compiler.obstacle import diagnose
from .compiler.same_numbers import buffers_restored, eager_results, shows_wrong
from .config import SereConfig, given_config
from .errors import expect
from .experts.owner import routers_in
from .report import REWRITTEN, SKIPPED, GateReport, GateRow
from .similarity.profile_file import some

_OUTSIDE = "it ran outside every graph"


def explain(model: Any, *args: Any, config: SereConfig | None = None, **kwargs: Any) -> GateReport:
    """Trace one call of a model and report every gate: what would be done, and why not.

    The model runs once, unchanged, without gradients and without probing. Where Dynamo breaks it
    into several graphs or skips a frame, it runs a second time, in eager mode and on copies of the
    arguments, to find gates that no graph shows; arguments that cannot be copied leave that out.
    What runs leave in the model, in its buffers (1 GiB of them, the smallest first) and attributes, is put back.

    Args:
        model: an nn.Module or function, compiled or not.
        *args: passed to the model.
        config: options to explain with; the defaults of the backend otherwise.
        **kwargs: passed to the model.

    Returns:
        A report whose `str()` is a table.

    Raises:
        ArgumentError: `model` cannot be called.
        ConfigError: `config` is no `SereConfig`.
    """
    expect(model, Callable, "explain takes a torch.nn.Module or a function")
    config = given_config(config)
    original = getattr(model, "_orig_mod", model)
    aside = KeptAside(original).restored() if isinstance(original, nn.Module) else contextlib.nullcontext()
    with aside, buffers_restored(original):
        return _explain(model, args, kwargs, config)


def _explain(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], config: SereConfig) -> GateReport:
    if config.capture == "default":
        return GateReport(rows := _rows(model, args, kwargs, config), _hint(rows, model, args, kwargs))
    again = _copied((args, kwargs))
    seen: tuple[GateRow, ...] = ()
    results: list[Any] = []
    # A frame that was compiled or skipped without capture would stay so, and the other way round.
    dynamo.forget_codes(getattr(model, "_orig_mod", model))
    try:
        with dynamo.dynamic_shape_capture():
            seen = rows = _rows(model, args, kwargs, config, results)
    except Exception as error:  # what capture raises has no common class
        if again is None:
            raise
        reason = f"dynamic-shape capture raises {type(error).__name__}"
    else:
        is_rewritten = any(row.status == REWRITTEN for row in rows)
        is_wrong = is_rewritten and again is not None and _is_wrong(model, again, results[0])
        if again is None or (is_rewritten and not is_wrong):
            return GateReport(rows, _hint(rows, model, args, kwargs, captured=True))
        seen = () if is_wrong else seen
        gives = "gives other numbers than the model in eager mode"
        reason = f"dynamic-shape capture {gives if is_wrong else 'lets no gate be re-routed'}"
    dynamo.forget_codes(getattr(model, "_orig_mod", model))
    with dynamo.graphs_before_loops():
        rows = _joined(seen, _rows(model, again[0], again[1], config))
    hint = _hint(rows, model, again[0], again[1], captured=True)
    return GateReport(rows, f"Traced without capture, as sere_compile.compile then does: {reason}. {hint}".strip())


def _joined(seen: tuple[GateRow, ...], rows: tuple[GateRow, ...]) -> tuple[GateRow, ...]:
    """The rows of a trace without capture, and those of what only graphs with capture held: why that stays."""
    outside = {row.name for row in rows if row.reason.startswith(_OUTSIDE)}
    still = {row.name for row in seen if row.reason.startswith(_OUTSIDE)}
    kept = {row.name: row for row in rows if row.name not in outside or row.name in still or not seen}
    return tuple({**{row.name: row for row in seen if outside or not rows}, **kept}.values())


def _is_wrong(model: Any, call: Any, result: Any) -> bool:
    """Whether a result is none that the model gives for these arguments, as `sere_compile.compile` asks."""
    original = getattr(model, "_orig_mod", model)

    def run() -> Any:
        args, kwargs = copy.deepcopy(call)
        with torch.no_grad(), _same_chance():
            return eager_results(original, args, kwargs)

    return shows_wrong(result, run)


@contextlib.contextmanager
def _same_chance() -> Iterator[None]:
    """Random numbers are the same in each run, and the caller's generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def _rows(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], config: SereConfig, results: list[Any] | None = None
) -> tuple[GateRow, ...]:
    """The gates of one call, in graphs and outside; what it gave goes to `results`."""
    rows: dict[str, GateRow] = {}
    lines: set[str] = set()

    def observe(row: GateRow) -> None:
        rows.setdefault(row.name, row)

    backend = SereBackend(config.replace(capture="default"), explaining=True)
    original = getattr(model, "_orig_mod", model)
    again = _copied((args, kwargs))
    whole_calls: list[bool] = []
    tokens = observer.set(observe), on_whole_call.set(lambda: whole_calls.append(True)), on_lines.set(lines.update)
    try:
        with dynamo.unlimited_recompiles(), torch.no_grad(), dynamo.without_own_compile(original):
            with _same_chance(), dynamo.running:
                result = torch.compile(original, backend=backend)(*args, **kwargs)
            if results is not None:
                results.append(result)
            if not whole_calls and again is not None:
                for row in _rows_outside(original, *again, known=frozenset(rows), lines=lines):
                    observe(row)
    finally:
        observer.reset(tokens[0])
        on_whole_call.reset(tokens[1])
        on_lines.reset(tokens[2])
    return tuple(rows.values())


def _rows_outside(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, known: frozenset[str], lines: set[str]
) -> Iterator[GateRow]:
    """Gates of an eager run that no graph held, neither as a gate nor as a refused selection.

    Args:
        model: to run.
        args: of the run.
        kwargs: of the run.
        known: names of gates that graphs held.
        lines: `file.py:123` of all code that graphs hold.
    """
    with WatchSelections() as watch:
        model(*args, **kwargs)
    for selection in watch.found:
        owner = watch.owners.find(selection.weight)
        name = owner.name if owner is not None else selection.place
        if selection.place in lines or name in known:
            continue
        reason = f"{_OUTSIDE}, at {selection.place}"
        yield GateRow(name, selection.num_experts, selection.top_k, None, "", None, "", SKIPPED, reason)


def _copied(value: Any) -> Any:
    """A deep copy, or None of what cannot be copied."""
    try:
        return copy.deepcopy(value)
    except (RuntimeError, TypeError, NotImplementedError):
        return None


def _hint(
    rows: tuple[GateRow, ...], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, captured: bool = False
) -> str:
    if any(row.reason.startswith(_OUTSIDE) for row in rows):
        why = diagnose(model, args, kwargs, captured=captured)
        return f"Dynamo skipped or broke the code of gates that ran outside every graph. {why}"
    if any(row.num_experts for row in rows):
        return ""
    if rows:
        return "No selection above is an MoE gate that a graph shows."
    why = dynamo.recompile_limit_hint() or _hidden_selection(model)
    return f"No graph held a top-k selection. {why}"


def _hidden_selection(model: Any) -> str:
    """Why nothing selects, in a graph or out of all, by what is known of the model's weights."""
    module = getattr(model, "_orig_mod", model)
    routers = [router.name for router in routers_in(module)] if isinstance(module, nn.Module) else []
    if not routers:
        return "Is the model an MoE, and does Dynamo trace it (TORCH_LOGS=graph_breaks)?"
    return (
        f"The model has what looks like routers ({some(routers)}), and no top-k of PyTorch selects experts by them. "
        "Where a kernel does (use_kernels=True, MXFP4), there is nothing to re-route: load the model without it, "
        "gpt-oss with Mxfp4Config(dequantize=True), whose experts sere_compile.pack_experts packs again."
    )
