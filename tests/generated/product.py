"""Every way into the product: a program goes in, something to call and reasons come out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

import sere_compile
from sere_compile import GateNotFoundError, SereConfig, SimilarityProfile

Call = Callable[..., Any]
Inputs = tuple[torch.Tensor, ...]


@dataclass
class Outcome:
    """What the product made of a program.

    Attributes:
        call: runs it.
        operators: how many re-routing operators its graphs hold, counted as they reach the inner compiler.
        reasons: warnings and refusals, in the product's words.
        explained: asks the product for its report; gives reasons, and how many gates it claims to re-route.
    """

    call: Call
    operators: int = 0
    reasons: list[str] = field(default_factory=list)
    explained: Callable[[], tuple[list[str], int]] = lambda: ([], 0)


class _Messages(logging.Handler):
    def __init__(self, outcome: Outcome) -> None:
        super().__init__(logging.WARNING)
        self._outcome = outcome

    def emit(self, record: logging.LogRecord) -> None:
        self._outcome.reasons.append(record.getMessage())


@contextmanager
def heard(outcome: Outcome) -> Iterator[None]:
    """Collect the product's warnings as reasons."""
    logger, handler = logging.getLogger("sere_compile"), _Messages(outcome)
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def count_operators(graph: GraphModule) -> int:
    """Operators of the product's namespace that re-route."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return sum("sere" in name and "route" in name for name in names)


def enter(tracer: str, model: nn.Module, inputs: Inputs, config: SereConfig) -> Outcome:
    """Hand a model to the product.

    Args:
        tracer: a choice of the dimension "tracer".
        model: with its profile attached, if there is one.
        inputs: for tracers that trace ahead of the first call.
        config: without `inner`.
    """
    outcome = Outcome(model)

    def inner(graph: GraphModule, example_inputs: list[Any]) -> Call:
        outcome.operators += count_operators(graph)
        return graph.forward

    if tracer == "dynamo":
        outcome.call = torch.compile(model, backend=sere_compile.SereBackend(config.replace(inner=inner)))
        outcome.explained = lambda: _explained(model, inputs, config)
    elif tracer == "capture auto":
        options = {name: getattr(config, name) for name in ("select_top_k", "threshold", "min_active")}
        outcome.call = sere_compile.compile(model, capture="auto", inner=inner, **options)
        outcome.explained = lambda: _explained(model, inputs, config.replace(capture="auto"))
    else:
        _rewrite(tracer, model, inputs, config, outcome)
    return outcome


def _explained(model: nn.Module, inputs: Inputs, config: SereConfig) -> tuple[list[str], int]:
    torch._dynamo.reset()
    with torch.no_grad():
        report = sere_compile.explain(model, *inputs, config=config)
    reasons = [f"{row.name}: {row.reason}" for row in report if row.reason]
    return reasons + ([report.hint] if report.hint else []), len(report.rewritten)


def _rewrite(tracer: str, model: nn.Module, inputs: Inputs, config: SereConfig, outcome: Outcome) -> None:
    # The profile that `attach` left on the model, as a user of `rewrite` hands it over.
    profile = next((v for v in model.__dict__.values() if isinstance(v, SimilarityProfile)), None)
    with torch.no_grad():
        traced = AHEAD[tracer](model, inputs)
    with heard(outcome):
        try:
            done = sere_compile.rewrite(traced, profile=profile, config=config)
        except GateNotFoundError as refused:
            outcome.reasons.append(str(refused))
            done = traced
    outcome.operators = count_operators(done if isinstance(done, GraphModule) else done.graph_module)
    outcome.call = done if isinstance(done, GraphModule) else done.module()


def _exported(model: nn.Module, inputs: Inputs) -> Any:
    return torch.export.export(model, inputs)


def _make_fx(model: nn.Module, inputs: Inputs) -> GraphModule:
    return make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)


def _symbolic(model: nn.Module, inputs: Inputs) -> GraphModule:
    graph = symbolic_trace(model)
    ShapeProp(graph).propagate(*inputs)
    return graph


# The tracers that trace ahead of the first call.
AHEAD: dict[str, Callable[[nn.Module, Inputs], Any]] = {
    "export": _exported,
    "make_fx": _make_fx,
    "symbolic_trace": _symbolic,
}


def traces_without_us(tracer: str, model: nn.Module, calls: list[Inputs]) -> bool:
    """Whether torch alone takes the program: what it cannot do is no fault of the product."""
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            if tracer in AHEAD:
                AHEAD[tracer](model, calls[0])
                return True
            compiled = torch.compile(model, backend="eager")
            for inputs in calls:
                compiled(*inputs)
    except Exception:  # noqa: BLE001 - whatever torch raises, it does not take the program
        return False
    return True
