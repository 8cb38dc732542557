"""Which columns of a tensor a node takes: slices, narrowed and split tensors of every tracer."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from . import nodes


def columns_of(node: Node, source: Node | None) -> tuple[int, int] | None:
    """(start, stop) if the node is a range of columns of `source`, otherwise whole; else None."""
    if source is None or nodes.last_size(node) is None or nodes.last_size(source) is None:
        return None
    wide, narrow = nodes.shape(source) or (), nodes.shape(node) or ()
    if len(wide) != len(narrow) or any(str(a) != str(b) for a, b in zip(wide[:-1], narrow[:-1], strict=True)):
        return None
    start = _first_column(node, source, len(wide) - 1)
    return None if start is None else (start, start + int(narrow[-1]))


def cut_from(node: Node) -> Node | None:
    """What a range of columns was taken from, None for any other part of a tensor."""
    source = nodes.operand(node)
    if source is not None and nodes.kind(node) == "item":
        source = nodes.operand(source)
    return source if source is not None and columns_of(node, source) is not None else None


def _first_column(node: Node, source: Node, last: int) -> int | None:
    match nodes.raw_name(node):
        case "getitem" if nodes.kind(node) == "slice" and nodes.operand(node) is source:
            index = node.args[1]
            part = index[-1] if isinstance(index, tuple) else index
            full = not isinstance(index, tuple) or Ellipsis in index or len(index) == last + 1
            if not full or (last > 0 and not isinstance(index, tuple)) or not isinstance(part, slice):
                return None
            start: Any = 0 if part.start is None else part.start
            step: Any = part.step
        case "slice" | "slice_copy" if nodes.operand(node) is source:
            if nodes.argument(node, 1, "dim", 0) not in (-1, last):
                return 0  # all columns of some rows
            start, step = nodes.argument(node, 2, "start", 0) or 0, nodes.argument(node, 4, "step", 1)
        case "narrow" if nodes.operand(node) is source and nodes.argument(node, 1, "dim") in (-1, last):
            start, step = nodes.argument(node, 2, "start"), 1
        case "getitem" if nodes.kind(node) == "item":
            return _start_of_part(node, source, last)
        case _:
            return None
    if not isinstance(start, int) or step not in (None, 1):
        return None
    return start + int(nodes.last_size(source) or 0) if start < 0 else start


def _start_of_part(node: Node, source: Node, last: int) -> int | None:
    """Where a part of `split` or `chunk` begins."""
    parts, number = node.args
    assert isinstance(parts, Node)
    if nodes.kind(parts) not in ("split", "split_with_sizes", "chunk") or nodes.operand(parts) is not source:
        return None
    if nodes.argument(parts, 2, "dim", 0) not in (-1, last) or not isinstance(number, int) or number < 0:
        return None
    sizes = [tuple(part.shape)[-1] for part in nodes.value(parts) or ()]
    return sum(sizes[:number]) if all(isinstance(size, int) for size in sizes) else None


def constant(found: Any) -> float | None:
    """The number that an argument is, written out or as a tensor filled with it, or None."""
    if isinstance(found, Node) and nodes.kind(found) in ("full", "scalar_tensor", "full_like", "new_full"):
        found = found.args[-1] if nodes.kind(found) != "scalar_tensor" else found.args[0]
    elif isinstance(found, Node) and nodes.raw_name(found) == "tensor" and found.args:
        found = found.args[0]
    return found if isinstance(found, (int, float)) and not isinstance(found, bool) else None
