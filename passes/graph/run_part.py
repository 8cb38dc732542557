"""Run a graph on given values, in single precision where it was traced in half."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.fx.node import map_aggregate

from . import nodes
from .failures import program_errors

# What a graph input or attribute holds; None where only a call would know.
ValueOf = Callable[[Node], Any]

HALF = (torch.float16, torch.bfloat16)
_CASTS_TO_HALF = frozenset({"half", "bfloat16"})


def run_graph(
    graph: Graph, module: GraphModule | None, given: Mapping[Node, Any], *, single: bool = True
) -> dict[Node, Any]:
    """The value of every node of a graph; in-place operations write to copies of what is given.

    Args:
        graph: every placeholder of it is in `given`.
        module: holds attributes that are no tensors, and submodules.
        given: values by node; also of nodes that would be computed.
        single: casts to half precision become casts to float32.

    Raises:
        RuntimeError, TypeError, ValueError, IndexError: an operation does not take the values; see `FAILURES`.
    """
    values: dict[Node, Any] = {}
    with torch.no_grad(), _same_random_numbers(given):
        for node in graph.nodes:
            if node in given:
                values[node] = copied(given[node]) if nodes.writers(node) else given[node]
            elif node.op != "output":
                with program_errors():
                    values[node] = _compute(node, module, values, single)
    return values


def _compute(node: Node, module: GraphModule | None, values: dict[Node, Any], single: bool) -> Any:
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        assert module is not None
        held = getattr(module.get_submodule(owner), name)
        return copied(held) if nodes.writers(node) else held
    arguments, keywords = map_arg((node.args, node.kwargs), values.__getitem__)
    if nodes.kind(node) == "dropout" and isinstance(arguments[0], torch.Tensor):
        return arguments[0]  # which numbers are dropped depends on how many each expert gets
    if single:
        arguments, keywords = map_aggregate((arguments, keywords), _in_single)  # type: ignore[assignment]
    if node.op == "call_method":
        name = "float" if single and node.target in _CASTS_TO_HALF else str(node.target)
        return getattr(arguments[0], name)(*arguments[1:], **keywords)
    if node.op == "call_module":
        assert module is not None
        called = module.get_submodule(str(node.target))
        buffers = {name: buffer.clone() for name, buffer in called.named_buffers()}  # which it may write to
        return torch.func.functional_call(called, buffers, arguments, keywords)
    return node.target(*arguments, **keywords)  # type: ignore[operator]


def _in_single(argument: Any) -> Any:
    return torch.float32 if isinstance(argument, torch.dtype) and argument in HALF else argument


@contextmanager
def _same_random_numbers(given: Mapping[Node, Any]) -> Iterator[None]:
    """Noise of a router is the same in each run, and the caller's generators stay as they are."""
    devices = {v.device for v in given.values() if isinstance(v, torch.Tensor) and v.device.type == "cuda"}
    indices = [device.index or 0 for device in devices]
    with torch.random.fork_rng(devices=indices):
        torch.default_generator.manual_seed(0)
        for index in indices:
            torch.cuda.default_generators[index].manual_seed(0)
        yield


def plain_number(size: Any, sizes: Mapping[Any, int] | None = None) -> Any:
    """A symbolic size's value in the call that was traced, or with other numbers for its symbols; else as it is."""
    if not isinstance(size, torch.SymInt):
        return size
    found = size.node.expr.subs(sizes) if sizes else size.node.expr
    return int(found) if found.is_number else size.node.hint


def copied(found: Any) -> Any:
    """A copy that in-place operations of the graph may write to."""
    if isinstance(found, tuple):
        parts = [copied(part) for part in found]
        return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)
    return found.clone() if isinstance(found, torch.Tensor) else found
