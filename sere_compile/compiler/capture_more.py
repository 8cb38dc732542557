"""Three lines of many MoE layers at which Dynamo breaks a graph, and what is traced of them instead.

- `torch.zeros_like(logits, requires_grad=True)`: where no gradients are taken the factory gives the same tensor, which
  stays in the graph as it is written.
- A function of `torch.jit.script` that stands in a `torch.autograd.Function`: traced as the Python that it was made of,
  as Dynamo does where such a function stands anywhere else.
- `warnings.warn(..)`: is given when the graph has run, as Dynamo does with what
  `torch._dynamo.config.reorderable_logging_functions` names. The warning itself is the same; the line that it names is
  that of the compiled frame.

A layer that keeps what it dispatched (`self.batch_index = ..`) is one graph then, in which what is kept and what is
dispatched can be told apart. Without these places in Dynamo nothing changes.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch.fx import Graph, Node

from ..passes.graph import nodes

_FACTORIES = (torch.zeros, torch.zeros_like, torch.ones, torch.ones_like, torch.full, torch.full_like)
_active: ContextVar[bool] = ContextVar("sere captures more", default=False)


@contextlib.contextmanager
def capturing_more() -> Iterator[None]:
    """Trace these lines; where Dynamo is another than we know, they break the graph as before."""
    _install()
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


@functools.cache
def _install() -> None:
    from torch._dynamo.variables import functions, misc  # here, because importing Dynamo takes seconds
    from torch._dynamo.variables import torch as factories

    skipped, deferred = getattr(functions, "SkipFunctionVariable", None), getattr(misc, "DebuggingVariable", None)
    _wrap(getattr(factories, "TorchInGraphFunctionVariable", None), _made_without_gradients)
    _wrap(skipped, _scripted(functions.UserFunctionVariable))
    if deferred is not None:
        _wrap(skipped, _warned(deferred))


def _wrap(kind: type | None, instead: Callable[..., Any]) -> None:
    """Ask `instead` first wherever Dynamo traces a call of one kind; it gives None for calls that are not its own."""
    own = getattr(kind, "call_function", None)
    if kind is None or own is None:
        return

    @functools.wraps(own)
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        made = instead(own, self, tx, args, kwargs) if _active.get() else None
        return own(self, tx, args, kwargs) if made is None else made

    kind.call_function = call_function  # type: ignore[attr-defined]


def asking_for_gradients(compiled: Callable[..., Any], graph: Graph) -> Callable[..., Any]:
    """A compiled graph whose results ask for gradients where the program's do: inner compilers lose that."""
    results = graph.output_node().args[0]
    places = [n for n, result in enumerate(results) if isinstance(result, Node) and _asks(result)]  # type: ignore[arg-type]
    if not places:
        return compiled

    def run(*arguments: Any) -> Any:
        found = compiled(*arguments)
        for place in places:
            found[place].requires_grad_()
        return found

    return run


def _asks(node: Node) -> bool:
    while written := nodes.writes(node):  # what is written in place is returned
        node = written[0]
    return node.op == "call_function" and node.kwargs.get("requires_grad") is True


def _made_without_gradients(own: Callable[..., Any], function: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    asked = kwargs.get("requires_grad")
    if asked is None or torch.is_grad_enabled() or not asked.is_python_constant():
        return None
    if asked.as_python_constant() is not True or all(function.value is not known for known in _FACTORIES):
        return None
    made = own(function, tx, args, {name: given for name, given in kwargs.items() if name != "requires_grad"})
    made.as_proxy().node.update_kwarg("requires_grad", True)
    made.requires_grad = True  # what the program sees if it asks
    return made


def _scripted(traced: type) -> Callable[..., Any]:
    def call(_own: Callable[..., Any], function: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        written = getattr(function.value, "_torchdynamo_inline", None)
        if not isinstance(function.value, torch.jit.ScriptFunction) or written is None:
            return None
        return traced(written).call_function(tx, args, kwargs)

    return call


def _warned(deferred: type) -> Callable[..., Any]:
    def call(_own: Callable[..., Any], function: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if function.value is not warnings.warn or function.source is None:
            return None
        given = [*args, *(kwargs[name] for name in ("message", "category") if name in kwargs)]
        if len(args) > 2 or len(given) not in (1, 2) or not set(kwargs) <= {"message", "category", "stacklevel"}:
            return None
        if not all(one.is_python_constant() for one in given):
            return None
        from torch._dynamo.variables import ConstantVariable

        tx.debug_locals.append((deferred(function.value, source=function.source), given))
        return ConstantVariable.create(None)

    return call
