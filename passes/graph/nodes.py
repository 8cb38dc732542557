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
    "numpy_T": "transpose",
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
    "imod": "remainder_",
    "mod": "remainder",
    "ipow": "pow_",
    "iand": "bitwise_and_",
    "ior": "bitwise_or_",
    "ixor": "bitwise_xor_",
    # Not in-place: Python's `&`, `|` and `~`, whose functions end in an underscore to dodge keywords.
    "and_": "bitwise_and",
    "or_": "bitwise_or",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__iand__": "bitwise_and_",
    "__ior__": "bitwise_or_",
    "__add__": "add",
    "__mul__": "mul",
    "_index_put_impl": "index_put",
    "_unsafe_index": "index",
    "index_put": "index_put",
    "setitem": "index_put_",
    "_grouped_mm": "grouped_mm",
    "_cdist_forward": "cdist",
    "_euclidean_dist": "cdist",
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
        return _without_namespace(target._schema.name)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return _without_namespace(target._qualified_op_name)
    if isinstance(target, str):
        return target
    return getattr(target, "__name__", type(target).__name__)


def _without_namespace(qualified: str) -> str:
    namespace, _, name = qualified.partition("::")
    return name if namespace in ("aten", "prims") else f"{namespace}.{name}"


def kind(node: Node) -> str:
    """Canonical name of the operation, without the mark of an in-place variant (`div_` is `div`).

    `placeholder`, `get_attr`, `output` and `call_module` nodes have their opcode as kind. Indexing is split:
    `index` takes at least one index tensor, `slice` takes only numbers, slices, None and Ellipsis, `unsqueeze`
    adds dimensions and takes everything, and `item` picks one result of an operation that returns several.
    """
    if node.op not in ("call_function", "call_method"):
        return node.op
    name = _SPELLINGS.get(raw_name(node), raw_name(node))
    if name == "getitem":
        return _kind_of_getitem(node)
    if name == "getattr" and node.args[1] in ("T", "mT", "H", "mH"):
        return "transpose"
    if name == "index_select":
        return "index"
    return name[:-1] if _marks_in_place(name) else name


def _kind_of_getitem(node: Node) -> str:
    source, index = node.args
    if isinstance(source, Node) and not is_tensor(source) and isinstance(index, int):
        return "item"
    parts = index if isinstance(index, (tuple, list)) else (index,)
    if all(part is None or part is Ellipsis or part == slice(None) for part in parts):
        return "unsqueeze"
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
    in_place = _marks_in_place(name) or node.kwargs.get("inplace") is True
    if in_place and node.args and isinstance(node.args[0], Node):
        written.append(node.args[0])
    return written


# Operations that ask a tensor for its sizes, type or device, not for its numbers.
_DESCRIBING = frozenset(
    {"size", "dim", "sym_size", "sym_numel", "numel", "_assert_tensor_metadata"}
    | {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}
    | {"new_empty", "new_zeros", "new_ones", "new_full"}
)
_DESCRIBED_BY_OTHER = frozenset({"to", "view_as", "reshape_as", "expand_as", "type_as"})
_DESCRIBING_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "layout", "itemsize", "is_cuda"})


def reads_numbers(node: Node, source: Node) -> bool:
    """Whether the result depends on the numbers in `source`, not only on its sizes, type or device."""
    name = raw_name(node)
    if name == "getattr":
        return node.args[1] not in _DESCRIBING_ATTRIBUTES
    if name in _DESCRIBED_BY_OTHER:
        return operand(node) is source
    return name not in _DESCRIBING


def picked(node: Node, position: int) -> list[Node]:
    """The nodes that take one result out of a top-k or sort: a tracer may write `r[1]` and `r.indices` apart."""
    found = []
    for user in node.users:
        by_number = kind(user) == "item" and int(user.args[1]) % 2 == position  # type: ignore[arg-type]
        by_name = raw_name(user) == "getattr" and user.args[1] == ("values", "indices")[position]
        if by_number or by_name:
            found.append(user)
    return found


def followers(node: Node) -> list[Node]:
    """Every node that sees what this one did: its users, and the later users of the memory that it writes.

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


# Operations whose first result is the tensor operand with other numbers, as decompositions write them.
_FIRST_OF_SEVERAL = frozenset({"log_sigmoid_forward", "native_layer_norm", "native_dropout"})


def first_result(node: Node) -> Node | None:
    """The operation whose only result of interest the node picks, elementwise over its operand, or None."""
    source = operand(node)
    picks = source is not None and kind(node) == "item" and node.args[1] == 0
    return source if picks and source is not None and raw_name(source) in _FIRST_OF_SEVERAL else None


def elementwise_users(node: Node) -> list[Node]:
    """The users, and for one that returns several tensors its first result."""
    found: list[Node] = []
    for user in node.users:
        firsts = [item for item in user.users if first_result(item) is user] if operand(user) is node else []
        found += firsts or [user]
    return found


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or by keyword. ATen, torch functions and methods agree on both."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def operand(node: Node) -> Node | None:
    """The tensor that a unary or reducing operation works on."""
    found = argument(node, 0, "input") if node.args or "input" in node.kwargs else node.kwargs.get("self")
    return found if isinstance(found, Node) else None


CLAMPS = frozenset({"clamp", "clamp_min", "clamp_max"})
_MASKS = CLAMPS | {"masked_fill", "remainder"}


def slot_source(node: Node) -> Node | None:
    """The ids whose numbers a view, cast, copy or mask of ids passes on, slot by slot, or None.

    A mask puts constants in place of some ids: `where(real, ids, -1)`, `masked_fill(ids, padding, 0)`, `clamp`, and
    the `ids % E` that `take_along_dim` is traced with.
    """
    name = kind(node)
    if name in VALUE_PRESERVING:
        return operand(node)
    if writes(node):
        return None
    if name == "where":
        source = argument(node, 1, "self", node.kwargs.get("input"))
    else:
        source = operand(node) if name in _MASKS else None
    return source if isinstance(source, Node) and same_shape(node, source) else None


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


def device(node: Node) -> torch.device:
    """Where the node's value lies; symbolic_trace records that of parameters only, the CPU is taken for the others."""
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
    """Whether both nodes yield tensors whose recorded sizes are written the same (symbols included)."""
    a, b = shape(left), shape(right)
    return (
        a is not None
        and b is not None
        and len(a) == len(b)
        and all(str(x) == str(y) for x, y in zip(a, b, strict=True))
    )


def only_moves_ones(node: Node) -> bool:
    """Whether a view or permutation keeps the numbers in order: einsum is traced with such detours."""
    source = operand(node)
    if kind(node) not in ("view", "permute", "transpose") or source is None:
        return False
    before, after = shape(source), shape(node)
    if before is None or after is None:
        return False
    if kind(node) == "view":
        return [str(n) for n in before if str(n) != "1"] == [str(n) for n in after if str(n) != "1"]
    # By dimension, not by size: the transpose of a square has the same sizes.
    moved = [dim for dim in _permutation(node, len(before)) if str(before[dim]) != "1"]
    return moved == sorted(moved)


def _permutation(node: Node, rank: int) -> list[int]:
    """Which dimension of the operand each dimension of a transposed or permuted tensor is."""
    dims = list(range(rank))
    if kind(node) == "permute":
        given: Any = node.args[1:] if len(node.args) > 2 else argument(node, 1, "dims")
        return [int(dim) % rank for dim in given]
    first, second = (argument(node, 1, "dim0"), argument(node, 2, "dim1"))
    if raw_name(node) == "getattr":
        if node.args[1] in ("T", "H"):
            return dims[::-1]
        first, second = -1, -2
    if isinstance(first, int) and isinstance(second, int):
        dims[first], dims[second] = dims[second], dims[first]
        return dims
    return dims[::-1]


def leading_count(node: Node) -> Any:
    """Product of all sizes but the last, as a number or a symbolic expression that compares without guarding."""
    return _product((shape(node) or ())[:-1])


def count(node: Node) -> Any:
    """How many numbers a tensor holds, in the same form."""
    return _product(shape(node) or ())


def _product(sizes: tuple[Any, ...]) -> Any:
    return math.prod(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)


def is_model_state(node: Node) -> bool:
    """Whether the tracer says that a graph input or attribute is a parameter, buffer or constant of the model."""
    if node.op == "get_attr":
        return True
    if isinstance(value(node), torch.nn.Parameter) or node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"):
        return True
    # torch.export tells by prefix only, parameters, buffers and constants apart from the user's inputs.
    return "val" in node.meta and str(node.target).startswith(("p_", "b_", "c_"))


def parameter_root(node: Node) -> Node | None:
    """The graph input or attribute that the node is a view, part, cast or transpose of, or None."""
    seen: Node | None = node
    while seen is not None and seen.op not in ("placeholder", "get_attr"):
        if kind(seen) not in VALUE_PRESERVING | {"transpose", "permute", "slice", "select"}:
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
