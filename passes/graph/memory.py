"""What a node writes in place, and who sees it."""

from __future__ import annotations

import torch
from torch.fx import Node

from .arguments import operand
from .kinds import ALIASING, kind, marks_in_place, spelling


def writes(node: Node) -> list[Node]:
    """The tensor operands that this node changes in place."""
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        bound = [(a, node.args[i] if i < len(node.args) else node.kwargs.get(a.name)) for i, a in enumerate(arguments)]
        return [v for a, v in bound if a.alias_info is not None and a.alias_info.is_write and isinstance(v, Node)]
    name = spelling(node)
    written = [v for v in (node.kwargs.get("out"),) if isinstance(v, Node)]
    in_place = marks_in_place(name) or node.kwargs.get("inplace") is True
    if in_place and node.args and isinstance(node.args[0], Node):
        written.append(node.args[0])
    return written


def followers(node: Node) -> list[Node]:
    """Every node that sees what this one did: its users, and later users of memory that it writes.

    An in-place operation need not have users: `mask.scatter_(1, ids, 1)` is read through `mask`.
    """
    found = dict.fromkeys(node.users)
    for written in writes(node):
        base: Node | None = written
        while base is not None:
            found.update(dict.fromkeys(user for user in base.users if user > node))
            base = operand(base) if kind(base) in ALIASING else None
    return list(found)


def writers(node: Node) -> list[Node]:
    """The in-place operations on the tensor, directly or through a view of it."""
    found: list[Node] = []
    for user in node.users:
        if node in writes(user):
            found.append(user)
        elif kind(user) in ALIASING and operand(user) is node:
            found += writers(user)
    return found
