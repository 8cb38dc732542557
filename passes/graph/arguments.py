"""Read and change the arguments of a call, whichever way they were passed."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or by keyword. ATen, torch functions and methods agree on both."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def operand(node: Node) -> Node | None:
    """The tensor that a unary or reducing operation works on."""
    found = argument(node, 0, "input") if node.args or "input" in node.kwargs else node.kwargs.get("self")
    return found if isinstance(found, Node) else None


def update_argument(node: Node, position: int, name: str, value: Any) -> None:
    """Change an argument where it stands; one that was left out becomes a keyword."""
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def operator_argument(node: Node, name: str) -> Any:
    """An argument of a registered operator by its name, or the operator's default.

    Raises:
        KeyError: the operator has no such argument.
    """
    position, default = _in_schema(node, name)
    return argument(node, position, name, default)


def update_operator_argument(node: Node, name: str, value: Any) -> None:
    """Change an argument of a registered operator by its name.

    Raises:
        KeyError: the operator has no such argument.
    """
    update_argument(node, _in_schema(node, name)[0], name, value)


def _in_schema(node: Node, name: str) -> tuple[int, Any]:
    """Position and default of an operator's argument."""
    assert isinstance(node.target, torch._ops.OpOverload), f"{node.name} calls no registered operator"
    for position, known in enumerate(node.target._schema.arguments):
        if known.name == name:
            return position, known.default_value if known.has_default_value() else None
    raise KeyError(f"{node.target} has no argument {name}")
