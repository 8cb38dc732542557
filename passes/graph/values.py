"""What a node yields: the value that the tracer recorded, its shape, and its line of code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import Node


def value(node: Node) -> Any:
    """The fake or real value the tracer recorded for the node, or None."""
    for key in ("example_value", "val", "tensor_meta"):
        if key in node.meta:
            return node.meta[key]
    if node.op == "get_attr" and node.graph.owning_module is not None:
        owner, _, name = str(node.target).rpartition(".")
        return getattr(node.graph.owning_module.get_submodule(owner), name, None)
    return None


def is_tensor(node: Node) -> bool:
    """Whether the node yields one tensor."""
    return isinstance(value(node), torch.Tensor) or hasattr(value(node), "stride")


def shape(node: Node) -> tuple[Any, ...] | None:
    """Sizes, or None where the tracer recorded no tensor: numbers, and expressions for what a graph is free in.

    A SymInt that is compared makes a graph one for the answer; an expression is equal to itself alone.
    """
    found = value(node)
    return tuple(map(_without_guards, found.shape)) if hasattr(found, "shape") else None


def _without_guards(size: Any) -> Any:
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else expression


def device(node: Node) -> torch.device:
    """The device of the node's value; the CPU where none is recorded, as by symbolic_trace."""
    return getattr(value(node), "device", torch.device("cpu"))


def last_size(node: Node) -> int | None:
    """Size of the last dimension where it is a plain number, else None."""
    sizes = shape(node)
    return sizes[-1] if sizes and isinstance(sizes[-1], int) else None


def is_floating(node: Node) -> bool:
    """Whether the node yields a floating-point tensor."""
    dtype = getattr(value(node), "dtype", None)
    return dtype is not None and dtype.is_floating_point


def same_shape(left: Node, right: Node) -> bool:
    """Whether both nodes yield tensors with the same recorded sizes, symbols included."""
    a, b = shape(left), shape(right)
    return (
        a is not None
        and b is not None
        and len(a) == len(b)
        and all(str(x) == str(y) for x, y in zip(a, b, strict=True))
    )


def leading_count(node: Node) -> Any:
    """Product of all sizes but the last: a number, or an expression that compares without guards."""
    return math.prod((shape(node) or ())[:-1])


def count(node: Node) -> Any:
    """How many numbers a tensor holds, in the same form."""
    return math.prod(shape(node) or ())


def shape_in_call(node: Node, sizes: Mapping[Node, int]) -> tuple[int, ...]:
    """The shape in one call, without asking the symbols: that would specialise the graph.

    Args:
        node: yields a tensor.
        sizes: numbers for the graph inputs that are symbolic sizes. Others are as in the call that was traced.
    """
    symbols = {value(given).node.expr: size for given, size in sizes.items() if isinstance(value(given), torch.SymInt)}
    return tuple(_in_call(size, symbols) for size in value(node).shape)


def size_in_call(node: Node, sizes: Mapping[Node, int]) -> int:
    """The number that a node yields in one call, as `shape_in_call`."""
    return sizes[node] if node in sizes else int(value(node).node.hint)


def _in_call(size: Any, symbols: Mapping[Any, int]) -> int:
    if not isinstance(size, torch.SymInt):
        return size
    number = size.node.expr.subs(symbols)
    return int(number if number.is_number else size.node.hint)


def operands(node: Node) -> Iterator[Node]:
    """Every node among the arguments that yields a tensor."""
    return (source for source in node.all_input_nodes if is_tensor(source))


def place(node: Node) -> str:
    """The node and the user's line behind it, `topk at model.py:123`, for the detail of a refusal."""
    line = source_line(node)
    return f"{node.name} at {line}" if line else node.name


def source_line(node: Node) -> str:
    """`file.py:123` of the user's code behind the node, or an empty text."""
    lines = [line for line in (node.meta.get("stack_trace") or "").splitlines() if line.lstrip().startswith("File ")]
    if not lines:
        return ""
    parts = lines[-1].split('"')
    number = lines[-1].partition("line ")[2].partition(",")[0]
    return f"{parts[1].rpartition('/')[2]}:{number}" if len(parts) > 1 else ""
