"""Three lines of many MoE layers at which Dynamo breaks a graph, and what is traced of them instead.

- `torch.zeros_like(logits, requires_grad=True)`: where no gradients are taken the factory gives the same tensor, which
  stays in the graph as it is written. Where the program takes gradients later on, the graph ends there.
- A function of `torch.jit.script` that stands in a `torch.autograd.Function`: traced as the Python that it was made of,
  as Dynamo does where such a function stands anywhere else.
- `warnings.warn(..)`: is given when the graph has run, as Dynamo does with what
  `torch._dynamo.config.reorderable_logging_functions` names. The warning itself is the same; the line that it names is
  that of the compiled frame. Where the program could see when it is given (`catch_warnings`, `try`), the graph ends.

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
    from torch._dynamo.variables import ctx_manager, functions, misc  # here, because importing Dynamo takes seconds
    from torch._dynamo.variables import torch as factories

    skipped, deferred = getattr(functions, "SkipFunctionVariable", None), getattr(misc, "DebuggingVariable", None)
    if _watch_grad_mode(getattr(ctx_manager, "GradModeVariable", None)):
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


def _watch_grad_mode(kind: type | None) -> bool:
    """End the graph where gradients are switched on behind a factory that asks for them; False if that cannot be seen.

    Tracing knows its tensor as one that asks for none, and what is made of it from there on asks in the program.
    """
    own = getattr(kind, "_call_func", None)
    if kind is None or own is None:
        return False

    @functools.wraps(own)
    def switch(self: Any, tx: Any, values: Any) -> Any:
        if _active.get() and list(values) == [True] and not torch.is_grad_enabled() and _has_factory(tx.output.graph):
            from torch._dynamo.exc import unimplemented

            unimplemented(
                gb_type="gradients behind a factory that asks for them",
                context=str(values),
                explanation="sere-compile traced a factory with requires_grad=True as one without",
                hints=[],
            )
        return own(self, tx, values)

    kind._call_func = switch  # type: ignore[attr-defined]
    return True


def _has_factory(graph: Graph) -> bool:
    return any(node.kwargs.get("requires_grad") is True for node in graph.nodes)


def _made_without_gradients(own: Callable[..., Any], function: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    asked = kwargs.get("requires_grad")
    if asked is None or torch.is_grad_enabled() or not asked.is_python_constant():
        return None
    if asked.as_python_constant() is not True or all(function.value is not known for known in _FACTORIES):
        return None
    _, at_start = tx.output.tracing_context.global_context.global_state.get("grad_enabled", (None, True))
    if at_start:  # gradients are taken behind this block
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
        if not all(one.is_python_constant() for one in given) or not _may_come_later(tx):
            return None
        from torch._dynamo.variables import ConstantVariable

        # Those of a frame that is inlined are given by the one that is compiled: its own list is never read.
        tx.output.root_tx.debug_locals.append((deferred(function.value, source=function.source), given))
        return ConstantVariable.create(None)

    return call


def _may_come_later(tx: Any) -> bool:
    """Whether nothing in the program tells a warning now from one that is given when the graph has run."""
    from torch._dynamo import config
    from torch._dynamo.variables import ctx_manager

    if config.nested_graph_breaks or tx.output.current_tracer.parent is not None:  # a graph in the graph may run twice
        return False
    while tx is not None:
        block = tx.block_stack[-1] if tx.block_stack else None
        entry = tx.current_instruction.exn_tab_entry
        if entry is not None and (block is None or entry.target is not block.target):
            return False  # in `try`
        for block in tx.block_stack:
            context = block.with_context  # None in frames that are inlined, where it may be any
            if not isinstance(context, (ctx_manager.GradModeVariable, ctx_manager.AutocastModeVariable)):
                return False
        tx = tx.parent
    return True
