"""What a node writes in place, and who sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from .arguments import operand
from .kinds import ALIASING, kind, marks_in_place, spelling

# Views of all parts of a tensor, of which `item` picks one.
_SPLITTING = frozenset({"chunk", "split", "tensor_split", "hsplit", "vsplit", "dsplit", "unbind"})


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
        return [n for a, v in bound if a.alias_info is not None and a.alias_info.is_write for n in _nodes_in(v)]
    name = spelling(node)
    written = _nodes_in(node.kwargs.get("out"))
    in_place = marks_in_place(name) or node.kwargs.get("inplace") is True
    if in_place and node.args:
        written += _nodes_in(node.args[0])
    return written


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
