"""What a node writes in place, and who sees it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import Node

from .arguments import operand
from .kinds import ALIASING, kind, marks_in_place, spelling

# Views of all parts of a tensor, of which `item` picks one.
_SPLITTING = frozenset({"chunk", "split", "tensor_split", "hsplit", "vsplit", "dsplit", "unbind"})


# Statistics that these change where a flag says so, of which no schema tells.
_UPDATES = {
    "batch_norm": "training",
    "native_batch_norm": "training",
    "cudnn_batch_norm": "training",
    "miopen_batch_norm": "training",
    "instance_norm": "use_input_stats",
}
_STATISTICS = ("running_mean", "running_var")


def viewed(node: Node) -> Node | None:
    """What a node may share memory with as a view, a cast, or one of several parts; None for any other operation."""
    source = operand(node)
    if kind(node) == "item":
        return source if source is not None and kind(source) in _SPLITTING else None
    return source if kind(node) in ALIASING else None


def bases(node: Node) -> Iterator[Node]:
    """The node, and everything that it is a view of, one after the other: the last one owns the memory."""
    base: Node | None = node
    while base is not None:
        yield base
        base = viewed(base)


def writes(node: Node) -> list[Node]:
    """The tensor operands that this node changes in place."""
    if node.op not in ("call_function", "call_method"):
        return []
    schema = _schema(node)
    if schema is not None:
        arguments = schema.arguments
        bound = [(a, node.args[i] if i < len(node.args) else node.kwargs.get(a.name)) for i, a in enumerate(arguments)]
        marked = [n for a, v in bound if a.alias_info is not None and a.alias_info.is_write for n in _nodes_in(v)]
        return marked + _unmarked(node)
    name = spelling(node)
    written = _nodes_in(node.kwargs.get("out"))
    in_place = marks_in_place(name) or node.kwargs.get("inplace") is True
    if in_place and node.args:
        written += _nodes_in(node.args[0])
    return written + _unmarked(node)


def _unmarked(node: Node) -> list[Node]:
    """What an operation changes by what it does, though neither its name nor its schema says so."""
    name = kind(node)
    if name in _UPDATES:
        given = _by_name(node, (*("input", "weight", "bias"), *_STATISTICS, _UPDATES[name]))
        return [] if given.get(_UPDATES[name]) is False else _nodes_in([given.get(name) for name in _STATISTICS])
    if name in ("embedding", "embedding_bag"):
        given = _by_name(node, ())
        return [] if given.get("max_norm") is None else _nodes_in(given.get("weight"))
    return []


def _by_name(node: Node, of_builtin: tuple[str, ...]) -> Mapping[str, Any]:
    """A call's arguments by their names, with defaults; of a function without a signature the first ones' are given."""
    schema = _schema(node)
    if schema is not None:
        defaults = {a.name: a.default_value for a in schema.arguments}
    elif inspect.isfunction(node.target):
        defaults = {name: p.default for name, p in inspect.signature(node.target).parameters.items()}
    else:
        defaults = dict.fromkeys(of_builtin)
    return {**defaults, **dict(zip(defaults, node.args, strict=False)), **node.kwargs}


def _schema(node: Node) -> torch.FunctionSchema | None:
    """Of an operator, also one that is called without naming an overload, where it has but one."""
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = target.overloads()
        target = getattr(target, overloads[0]) if len(overloads) == 1 else target
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def _nodes_in(value: Any) -> list[Node]:
    """A node, or those in a list of tensors."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [found for found in values if isinstance(found, Node)]


def followers(node: Node) -> list[Node]:
    """Every node that sees what this one did: its users, and later users of memory that it writes.

    An in-place operation need not have users: `mask.scatter_(1, ids, 1)` is read through `mask`.
    """
    found = dict.fromkeys(node.users)
    for written in writes(node):
        for base in bases(written):
            found.update(dict.fromkeys(user for user in base.users if user > node))
    return list(found)


def writers(node: Node) -> list[Node]:
    """The in-place operations on the tensor, directly or through a view of it."""
    found: list[Node] = []
    for user in node.users:
        if node in writes(user):
            found.append(user)
        elif viewed(user) is node:
            found += writers(user)
    return found
