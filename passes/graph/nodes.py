"""One view of a node for every tracer.

Dynamo graphs hold torch functions and tensor methods, torch.export and AOT graphs hold ATen
overloads, `make_fx` graphs hold ATen overloads over fake or real values. Passes ask this module
what a node *is* (`kinds.py`), what it works on (`arguments.py`), what it yields (`values.py`) and
what it writes (`memory.py`), and never look at `node.target` themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import Node

from .arguments import argument, operand
from .kinds import (
    ALIASING,
    FP8_BLOCKS_BY_ID,
    FP8_BLOCKS_SORTED,
    OUR_EXPERTS,
    PRODUCTS_BY_ID,
    VALUE_PRESERVING,
    kind,
    raw_name,
)
from .memory import bases, followers, viewed, writers, writes
from .values import (
    count,
    device,
    is_floating,
    is_tensor,
    last_size,
    leading_count,
    operands,
    place,
    same_shape,
    shape,
    shape_in_call,
    size_in_call,
    source_line,
    value,
)

__all__ = [
    "ALIASING",
    "CLAMPS",
    "FP8_BLOCKS_BY_ID",
    "FP8_BLOCKS_SORTED",
    "OUR_EXPERTS",
    "PRODUCTS_BY_ID",
    "VALUE_PRESERVING",
    "argument",
    "bases",
    "behind",
    "count",
    "device",
    "elementwise_users",
    "first_result",
    "followers",
    "index_tensors",
    "is_floating",
    "is_model_state",
    "is_parameter",
    "is_tensor",
    "kind",
    "last_size",
    "leading_count",
    "numbers_behind",
    "only_moves_ones",
    "operand",
    "operands",
    "parameter_root",
    "picked",
    "place",
    "raw_name",
    "reads_numbers",
    "same_shape",
    "shape",
    "shape_in_call",
    "size_in_call",
    "slot_source",
    "source_line",
    "value",
    "viewed",
    "writers",
    "writes",
]

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


def numbers_behind(node: Node) -> list[Node]:
    """The inputs of a node on whose numbers its result depends."""
    return [source for source in node.all_input_nodes if reads_numbers(node, source)]


def picked(node: Node, position: int) -> list[Node]:
    """The nodes that take one result of a top-k or sort, as `r[1]` or as `r.indices`."""
    found = []
    for user in node.users:
        by_number = kind(user) == "item" and int(user.args[1]) % 2 == position  # type: ignore[arg-type]
        by_name = raw_name(user) == "getattr" and user.args[1] == ("values", "indices")[position]
        if by_number or by_name:
            found.append(user)
    return found


# Operations whose first result is the tensor operand with other numbers, as decompositions write
# them.
_FIRST_OF_SEVERAL = frozenset({"log_sigmoid_forward", "native_layer_norm", "native_dropout"})


def first_result(node: Node) -> Node | None:
    """The elementwise operation whose first of several results the node picks, or None."""
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


CLAMPS = frozenset({"clamp", "clamp_min", "clamp_max"})
_MASKS = CLAMPS | {"masked_fill", "remainder"}


def slot_source(node: Node) -> Node | None:
    """The ids whose numbers a view, cast, copy or mask of ids passes on, slot by slot, or None.

    A mask puts constants in place of some ids: `where(real, ids, -1)`, `masked_fill(ids, padding,
    0)`, `clamp`, and the `ids % E` that `take_along_dim` is traced with.
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
    attribute = node.args[1] if raw_name(node) == "getattr" else raw_name(node)
    if attribute in ("T", "H", "numpy_T", "matrix_H"):
        return dims[::-1]
    if attribute in ("mT", "mH", "adjoint"):
        first, second = -1, -2
    if isinstance(first, int) and isinstance(second, int):
        dims[first], dims[second] = dims[second], dims[first]
        return dims
    return dims[::-1]


def is_model_state(node: Node) -> bool:
    """Whether a graph input or attribute is a parameter, buffer or constant of the model."""
    if node.op == "get_attr":
        return True
    if isinstance(value(node), torch.nn.Parameter) or node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"):
        return True
    # torch.export tells by prefix only, parameters, buffers and constants apart from the user's
    # inputs.
    return "val" in node.meta and str(node.target).startswith(("p_", "b_", "c_"))


def is_parameter(node: Node) -> bool:
    """Whether model state is known to be a parameter, and no buffer or constant."""
    module = node.graph.owning_module
    if node.op == "get_attr" and module is not None:
        return str(node.target) in dict(module.named_parameters(remove_duplicate=False))
    return isinstance(value(node), torch.nn.Parameter) or ("val" in node.meta and str(node.target).startswith("p_"))


def behind(node: Node, kinds: Collection[str]) -> Node:
    """What the node is made of by operations of some kinds alone, through their tensor operands."""
    while kind(node) in kinds and (source := operand(node)) is not None:
        node = source
    return node


def parameter_root(node: Node) -> Node | None:
    """The graph input or attribute that the node is a view, part, cast or transpose of, or None."""
    seen: Node | None = node
    while seen is not None and seen.op not in ("placeholder", "get_attr"):
        if kind(seen) not in VALUE_PRESERVING | {"transpose", "permute", "slice", "select", "to_local"}:
            return None
        seen = operand(seen)
    return seen


def exchanges(node: Node) -> bool:
    """Whether a node waits for other ranks: a collective, or a distributed tensor that is laid out anew."""
    if kind(node) in ("redistribute", "full_tensor"):
        return True
    return node.op == "call_function" and raw_name(node).startswith(("_c10d_functional", "c10d", "_dtensor"))


def index_tensors(node: Node) -> list[Node]:
    """The index tensors of an `index`, `index_put` or `index_select`, in order."""
    if raw_name(node) == "index_select":
        found: Any = argument(node, 2, "index")
    else:
        found = argument(node, 1, "indices")
    parts: Sequence[Any] = found if isinstance(found, (tuple, list)) else (found,)
    return [part for part in parts if isinstance(part, Node)]
