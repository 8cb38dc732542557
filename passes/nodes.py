"""One view of a node for every tracer.

Dynamo graphs hold torch functions and tensor methods, torch.export and AOT graphs hold ATen overloads,
`make_fx` graphs hold ATen overloads over fake or real values. Passes ask this module what a node *is*
(`kind`), what it works on (`argument`, `operands`) and what it yields (`shape`, `value`), and never look at
`node.target` themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

# Different spellings of one operation. The left side is what a tracer records, the right side is the name
# that passes use. A spelling that is missing here keeps its own name.
_SPELLINGS = {
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "special_softmax": "softmax",
    "_to_copy": "to",
    "float": "to",
    "double": "to",
    "half": "to",
    "bfloat16": "to",
    "int": "to",
    "long": "to",
    "type": "to",
    "type_as": "to",
    "reshape": "view",
    "flatten": "view",
    "ravel": "view",
    "unflatten": "view",
    "view_as": "view",
    "reshape_as": "view",
    "_unsafe_view": "view",
    "t": "transpose",
    "swapaxes": "transpose",
    "alias": "detach",
    "lift_fresh_copy": "clone",
    "matmul": "matmul",
    "mm": "matmul",
    "__matmul__": "matmul",
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "itruediv": "div_",
    "floordiv": "floor_divide",
    "ifloordiv": "floor_divide_",
    "multiply": "mul",
    "imul": "mul_",
    "iadd": "add_",
    "isub": "sub_",
    "__add__": "add",
    "__mul__": "mul",
    "_index_put_impl": "index_put",
    "_unsafe_index": "index",
    "index_put": "index_put",
    "setitem": "index_put_",
    "_grouped_mm": "grouped_mm",
    "__eq__": "eq",
}

# Operations that return their tensor operand's values in the same order: views, casts and copies.
VALUE_PRESERVING = frozenset(
    {"view", "to", "clone", "contiguous", "detach", "unsqueeze", "squeeze", "expand", "expand_as"}
)
# ... and those whose result may share memory with the operand, so that a write to one is seen in the other.
ALIASING = VALUE_PRESERVING - {"clone"} | {"transpose", "permute", "slice", "select", "chunk", "split", "unbind"}


def raw_name(node: Node) -> str:
    """The operation's name as the tracer wrote it, without namespace and overload."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return name if namespace in ("aten", "prims") else f"{namespace}.{name}"
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name.rpartition("::")[2]
    if isinstance(target, str):
        return target
    return getattr(target, "__name__", type(target).__name__)


def kind(node: Node) -> str:
    """Canonical name of the operation, without the mark of an in-place variant (`div_` is `div`).

    `placeholder`, `get_attr`, `output` and `call_module` nodes have their opcode as kind. Indexing is split:
    `index` takes at least one index tensor, `slice` takes only numbers, slices, None and Ellipsis, and
    `item` picks one result of an operation that returns several.
    """
    if node.op not in ("call_function", "call_method"):
        return node.op
    name = _SPELLINGS.get(raw_name(node), raw_name(node))
    if name == "getitem":
        return _kind_of_getitem(node)
    if name == "index_select":
        return "index"
    return name[:-1] if _marks_in_place(name) else name


def _kind_of_getitem(node: Node) -> str:
    source, index = node.args
    if isinstance(source, Node) and not isinstance(value(source), torch.Tensor) and isinstance(index, int):
        return "item"
    parts = index if isinstance(index, (tuple, list)) else (index,)
    return "index" if any(isinstance(part, Node) and is_tensor(part) for part in parts) else "slice"


def _marks_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def writes(node: Node) -> list[Node]:
    """The tensor operands that this node changes in place."""
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        bound = [(a, node.args[i] if i < len(node.args) else node.kwargs.get(a.name)) for i, a in enumerate(arguments)]
        return [v for a, v in bound if a.alias_info is not None and a.alias_info.is_write and isinstance(v, Node)]
    name = _SPELLINGS.get(raw_name(node), raw_name(node))
    written = [v for v in (node.kwargs.get("out"),) if isinstance(v, Node)]
    if _marks_in_place(name) and node.args and isinstance(node.args[0], Node):
        written.append(node.args[0])
    return written


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or by keyword. ATen, torch functions and methods agree on both."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def operand(node: Node) -> Node | None:
    """The tensor that a unary or reducing operation works on."""
    found = argument(node, 0, "input") if node.args or "input" in node.kwargs else node.kwargs.get("self")
    return found if isinstance(found, Node) else None


def operands(node: Node) -> Iterator[Node]:
    """Every node among the arguments that yields a tensor."""
    return (source for source in node.all_input_nodes if is_tensor(source))


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
    """Sizes (int or SymInt), or None where the tracer recorded no tensor."""
    found = value(node)
    return tuple(found.shape) if hasattr(found, "shape") else None


def last_size(node: Node) -> int | None:
    """Size of the last dimension where it is a plain number, else None."""
    sizes = shape(node)
    return sizes[-1] if sizes and isinstance(sizes[-1], int) else None


def is_floating(node: Node) -> bool:
    """Whether the node yields a floating-point tensor."""
    dtype = getattr(value(node), "dtype", None)
    return dtype is not None and dtype.is_floating_point


def same_shape(left: Node, right: Node) -> bool:
    """Whether both nodes yield tensors whose recorded sizes are written the same (symbols included)."""
    a, b = shape(left), shape(right)
    return a is not None and b is not None and len(a) == len(b) and all(str(x) == str(y) for x, y in zip(a, b, strict=True))


def leading_count(node: Node) -> Any:
    """Product of all sizes but the last, as a number or a symbolic expression that compares without guarding."""
    sizes = shape(node) or ()
    return math.prod(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes[:-1])


def is_model_state(node: Node) -> bool:
    """Whether the tracer says that a graph input or attribute is a parameter, buffer or constant of the model."""
    if node.op == "get_attr":
        return True
    if isinstance(value(node), torch.nn.Parameter) or node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"):
        return True
    # torch.export tells by prefix only, parameters, buffers and constants apart from the user's inputs.
    return "val" in node.meta and str(node.target).startswith(("p_", "b_", "c_"))


def parameter_root(node: Node) -> Node | None:
    """The graph input or attribute that the node is a view, cast or transpose of, or None."""
    seen: Node | None = node
    while seen is not None and seen.op not in ("placeholder", "get_attr"):
        if kind(seen) not in VALUE_PRESERVING | {"transpose", "permute", "slice"}:
            return None
        seen = operand(seen)
    return seen


def index_tensors(node: Node) -> list[Node]:
    """The index tensors of an `index`, `index_put` or `index_select`, in order."""
    if raw_name(node) == "index_select":
        found: Any = argument(node, 2, "index")
    else:
        found = argument(node, 1, "indices")
    parts: Sequence[Any] = found if isinstance(found, (tuple, list)) else (found,)
    return [part for part in parts if isinstance(part, Node)]


def source_line(node: Node) -> str:
    """`file.py:123` of the user's code behind the node, or an empty text."""
    lines = [line for line in (node.meta.get("stack_trace") or "").splitlines() if line.lstrip().startswith("File ")]
    if not lines:
        return ""
    parts = lines[-1].split('"')
    number = lines[-1].partition("line ")[2].partition(",")[0]
    return f"{parts[1].rpartition('/')[2]}:{number}" if len(parts) > 1 else ""
