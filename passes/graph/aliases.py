"""Which nodes may share memory."""

from __future__ import annotations

from torch.fx import Node

from . import nodes
from .walk import walk


def aliases(tensor: Node) -> set[Node]:
    """Every node that may share memory with the tensor, through views and in-place results."""
    return set(walk([tensor], _neighbours))


def _neighbours(node: Node) -> list[Node]:
    near = [user for user in node.users if _shares_memory(user, node)]
    base = nodes.operand(node) if node.op in ("call_function", "call_method") else None
    if base is not None and _shares_memory(node, base):
        near.append(base)
    return near


def _shares_memory(result: Node, source: Node) -> bool:
    if nodes.operand(result) is not source:
        return False
    return nodes.viewed(result) is source or source in nodes.writes(result)
