"""What a node is: one name for every tracer's spelling of an operation."""

from __future__ import annotations

import torch
from torch.fx import Node

from .values import is_tensor

# Different spellings of one operation. The left side is what a tracer records, the right side is
# the name that passes use. A spelling that is missing here keeps its own name.
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
    # What Dynamo writes for `.T`, `.mT`, `.H` and `.mH` since torch 2.14; before, `getattr`.
    "numpy_T": "transpose",
    "mT": "transpose",
    "matrix_H": "transpose",
    "mH": "transpose",
    "adjoint": "transpose",
    "alias": "detach",
    "_get_data_attr": "detach",  # `x.data`, as Dynamo writes it
    "split_with_sizes": "split",
    "unsafe_split": "split",
    "unsafe_chunk": "chunk",
    "moveaxis": "movedim",
    "lift_fresh_copy": "clone",
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
    # Not in-place: Python's `&`, `|` and `~`, whose functions end in an underscore to dodge
    # keywords.
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
    "setitem": "index_put_",
    "_grouped_mm": "grouped_mm",
    "_cdist_forward": "cdist",
    "_euclidean_dist": "cdist",
    "__eq__": "eq",
    # A rank's part of a distributed tensor, as Dynamo writes it.
    "prim_to_local": "to_local",
    "prim_from_local": "from_local",
    "prim_redistribute": "redistribute",
}

_FROM_HUB = ("finegrained_fp8",)
# transformers' products with FP8 experts: of each row with the weight, of [E, N, M], that an id names, and of rows that
# are sorted by expert. Arguments: rows, weights, scales, then ids, or offsets and counts.
FP8_BLOCKS_BY_ID = "finegrained_fp8.w8a8_block_dynamic_fp8_matmul_batched"
FP8_BLOCKS_SORTED = "finegrained_fp8.w8a8_block_dynamic_fp8_matmul_grouped"
# All of an expert layer, by the ids that it is given.
OUR_EXPERTS = "sere.expert_mlp"
PRODUCTS_BY_ID = frozenset(
    {FP8_BLOCKS_BY_ID}
    | {f"finegrained_fp8.{name}_matmul_batched" for name in ("w8a8_tensor_dynamic_fp8", "mxfp_dynamic")}
)

# Attributes that are the tensor itself, or a view of it.
_ATTRIBUTES = dict.fromkeys(("T", "mT", "H", "mH"), "transpose") | {"data": "detach"}

# Operations that return their tensor operand's values in the same order: views, casts and copies.
VALUE_PRESERVING = frozenset(
    {"view", "to", "clone", "contiguous", "detach", "unsqueeze", "squeeze", "expand", "expand_as"}
)
# ... and those whose result may share memory with the operand, so that a write to one is seen in
# the other.
ALIASING = VALUE_PRESERVING - {"clone"} | {
    "transpose", "permute", "slice", "select", "narrow", "diagonal", "movedim", "swapdims", "as_strided", "unfold",
    "chunk", "split", "tensor_split", "hsplit", "vsplit", "dsplit", "unbind", "to_local", "broadcast_to",
}  # fmt: skip


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


def spelling(node: Node) -> str:
    """The operation's canonical name, with the mark of an in-place variant."""
    return _SPELLINGS.get(raw_name(node), raw_name(node))


def _without_namespace(qualified: str) -> str:
    namespace, _, name = qualified.partition("::")
    if namespace in ("aten", "prims"):
        return name
    # A kernel from a hub has its version in its namespace: _finegrained_fp8_0a1b2c3.
    hub = next((known for known in _FROM_HUB if namespace.lstrip("_").startswith(known)), None)
    return f"{hub or namespace}.{name}"


def kind(node: Node) -> str:
    """Canonical name of the operation, without the mark of an in-place variant (`div_` is `div`).

    `placeholder`, `get_attr`, `output` and `call_module` nodes have their opcode as kind. Indexing
    is split: `index` takes at least one index tensor or list, `slice` takes only numbers, slices, None and
    Ellipsis, `unsqueeze` adds dimensions and takes everything, and `item` picks one result of an
    operation that returns several.
    """
    if node.op not in ("call_function", "call_method"):
        return node.op
    name = spelling(node)
    if name == "getitem":
        return _kind_of_getitem(node)
    if name == "getattr" and node.args[1] in _ATTRIBUTES:
        return _ATTRIBUTES[node.args[1]]  # type: ignore[index]
    if name == "index_select":
        return "index"
    return name[:-1] if marks_in_place(name) else name


def _kind_of_getitem(node: Node) -> str:
    source, index = node.args
    if isinstance(source, Node) and not is_tensor(source) and isinstance(index, int):
        return "item"
    parts = index if isinstance(index, tuple) else (index,)
    if all(part is None or part is Ellipsis or part == slice(None) for part in parts):
        return "unsqueeze"
    gathers = any(isinstance(part, list) or (isinstance(part, Node) and is_tensor(part)) for part in parts)
    return "index" if gathers else "slice"


def marks_in_place(name: str) -> bool:
    """Whether a name is that of an in-place variant, `add_`, and not of a special method."""
    return name.endswith("_") and not name.endswith("__")
