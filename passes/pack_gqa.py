"""Attention of one query token reads keys and values as they are, not a copy per query head.

Grouped queries share keys and values. With a mask, PyTorch's fast kernels take no `enable_gqa`, so that
models copy them for each query head first. One token's query heads can stand where a longer
prompt's tokens would: rows of one attention over the same keys.

    k, v                     [B, H / G, L, D]         q = q.squeeze(2).unflatten(1, (H / G, G))
    K = k[:, :, None].expand(.., G, ..).reshape(..)   out = sdpa(q, k, v, mask)
    V = the same of v                            ->   out = out.flatten(1, 2).unsqueeze(2)
    out = sdpa(q, K, V, mask)    # q [B, H, 1, D]

Row g of group h attends to the keys of head h * G + g, which the copy would have held. That K is such
a copy follows from the shapes along its chain (case 1), and it holds at the call because nothing that
could write stands in between (case 2). Attention that is causal, drops numbers at random, or whose
mask does not lend itself to rows stays as it is, with a reason (case 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.nn.functional import scaled_dot_product_attention

from .graph import nodes

# Copies: between keys and what attention reads.
_COPIES = frozenset({"clone", "contiguous", "detach"})
_SYMBOLIC = (
    "the number of its heads is a symbol of the graph, as dynamic=True makes it: leave dynamic=None, or name the sizes "
    "that vary with torch._dynamo.mark_dynamic"
)
# What may stand between the copying and the attention, as far as it writes nothing.
_CHANGES_NOTHING = (
    nodes.ALIASING
    | {"clone", "repeat_interleave", "repeat", "index", "item", "getattr", "size", "sym_size", "sym_numel", "arange"}
    | {"add", "sub", "mul", "div", "floor_divide", "neg", "eq", "ne", "lt", "le", "gt", "ge", "where", "masked_fill"}
    | {"bitwise_and", "bitwise_or", "bitwise_not", "cat", "linear", "matmul", "softmax", "ones", "zeros", "ones_like"}
    | {"zeros_like", "full", "full_like", "scaled_dot_product_attention"}
)


@dataclass(frozen=True)
class PackedAttention:
    """What became of the attention calls of one token over copied keys and values.

    Attributes:
        packed: the results of those that read the keys and values themselves now.
        refused: why others stay as they are, by the name of their node.
    """

    packed: tuple[Node, ...]
    refused: dict[str, str]


def pack_gqa(graph: Graph) -> PackedAttention:
    """Replace attention of one query token over copied keys by attention over the keys.

    Args:
        graph: is changed where there is such attention. What it computes stays the same up to the order in which
            a kernel adds: PyTorch may choose another one for rows than for heads.
    """
    packed, refused = [], {}
    for node in list(graph.nodes):
        if nodes.kind(node) != "scaled_dot_product_attention" or not _is_one_token(node):
            continue
        copies = [nodes.argument(node, 1, "key"), nodes.argument(node, 2, "value")]
        if any(map(_counts_heads_by_symbol, copies)):
            refused[node.name] = _SYMBOLIC
            continue
        key, value = map(_source, copies)
        if key is None or value is None or key[1] != value[1]:
            continue
        reason = _refusal(node, key, value)
        if reason:
            refused[node.name] = reason
        else:
            packed.append(_pack(node, key[0], value[0], key[1]))
    return PackedAttention(tuple(packed), refused)


def _is_one_token(node: Node) -> bool:
    """Whether it attends from queries [B, H, 1, D]."""
    sizes = _sizes(nodes.argument(node, 0, "query"))
    return len(sizes) == 4 and _equal(sizes[2], 1)


def _counts_heads_by_symbol(copy: Any) -> bool:
    """Whether a node holds copies of keys, by the operations behind it, and how many is no number of the graph."""
    view = _without_copies(copy if isinstance(copy, Node) else None)
    if view is not None and nodes.kind(view) == "repeat_interleave":
        keys, times = nodes.operand(view), nodes.argument(view, 1, "repeats")
        return len(_sizes(keys)) == 4 and not (isinstance(times, int) and isinstance(_sizes(keys)[1], int))
    expanded = _without_copies(_operand(view, ("view",)))
    inserted = _operand(expanded, ("expand",))
    keys = _operand(inserted, ("unsqueeze", "view"))
    if [len(_sizes(node)) for node in (keys, inserted, expanded, view)] != [4, 5, 5, 4]:
        return False
    return not all(isinstance(size, int) for size in (_sizes(keys)[1], _sizes(expanded)[2], _sizes(view)[1]))


def _source(copy: Any) -> tuple[Node, int] | None:
    """The keys [B, H / G, L, D] of which a node [B, H, L, D] holds G copies per head, side by side, and G.

    Views keep the order of the numbers. So sizes tell what they did.
    """
    view = _without_copies(copy if isinstance(copy, Node) else None)
    if view is not None and nodes.kind(view) == "repeat_interleave":
        return _source_of_repeated(view)
    expanded = _without_copies(_operand(view, ("view",)))
    inserted = _operand(expanded, ("expand",))
    keys = _operand(inserted, ("unsqueeze", "view"))
    sizes = [_sizes(node) for node in (keys, inserted, expanded, view)]
    if keys is None or [len(found) for found in sizes] != [4, 5, 5, 4]:
        return None
    (batch, heads, *rest), copies = sizes[0], sizes[2][2]
    if not (isinstance(copies, int) and isinstance(heads, int)):
        return None
    expected = [(batch, heads, 1, *rest), (batch, heads, copies, *rest), (batch, heads * copies, *rest)]
    alike = all(_equal_sizes(found, wanted) for found, wanted in zip(sizes[1:], expected, strict=True))
    return (keys, copies) if alike and copies > 1 else None


def _source_of_repeated(node: Node) -> tuple[Node, int] | None:
    keys, copies, dim = nodes.operand(node), nodes.argument(node, 1, "repeats"), nodes.argument(node, 2, "dim")
    if len(_sizes(keys)) != 4 or dim not in (1, -3) or not isinstance(copies, int):
        return None
    return (keys, copies) if keys is not None and copies > 1 else None


def _operand(node: Node | None, kinds: tuple[str, ...]) -> Node | None:
    """What a node of one of these kinds works on."""
    return nodes.operand(node) if node is not None and nodes.kind(node) in kinds else None


def _sizes(node: Node | None) -> tuple[Any, ...]:
    return (nodes.shape(node) or ()) if node is not None else ()


def _without_copies(node: Node | None) -> Node | None:
    return None if node is None else nodes.behind(node, _COPIES)


def _equal(left: Any, right: Any) -> bool:
    """Whether sizes are the same, without asking symbols, which would specialise the graph."""
    return str(left) == str(right)


def _equal_sizes(left: Any, right: Any) -> bool:
    return len(left) == len(right) and all(map(_equal, left, right))


def _refusal(node: Node, key: tuple[Node, int], value: tuple[Node, int]) -> str:
    """Why attention over copied keys and values has to stay, or an empty text."""
    for position, name, neutral in ((4, "dropout_p", 0.0), (5, "is_causal", False), (7, "enable_gqa", False)):
        found = nodes.argument(node, position, name)
        if found is not None and (isinstance(found, Node) or found != neutral):
            return f"{name} is {found}"
    query, mask = nodes.argument(node, 0, "query"), nodes.argument(node, 3, "attn_mask")
    if not _equal(_sizes(query)[1], _sizes(key[0])[1] * key[1]):
        return "its queries have other heads than its keys"
    if isinstance(mask, Node) and not _serves_rows(mask):
        return f"its mask {_sizes(mask)} differs from head to head"
    for source, position, name in ((key[0], 1, "key"), (value[0], 2, "value")):
        steps = _between(source, nodes.argument(node, position, name), node)
        if (other := next(filter(_may_write, steps), None)) is not None:
            return f"{nodes.place(other)}, behind the copying of its {name}, may change what was copied"
    return ""


def _serves_rows(mask: Node) -> bool:
    """Whether a mask is one for all heads: its sizes broadcast over heads and rows alike."""
    sizes = nodes.shape(mask)
    return sizes is not None and all(_equal(size, 1) for size in sizes[-3:-1])


def _between(source: Node, copy: Node, reader: Node) -> Iterator[Node]:
    """What runs between the first step of a copying and the reader of the copy."""
    node = min(user for user in source.users if user is copy or _leads_to(user, copy))
    while node is not reader:
        yield node
        node = node.next


def _may_write(node: Node) -> bool:
    """Whether a node could change keys, values or copies: all but operations that are known to change nothing."""
    if node.op in ("placeholder", "get_attr"):
        return False
    return nodes.kind(node) not in _CHANGES_NOTHING or bool(nodes.writes(node))


def _leads_to(node: Node, end: Node) -> bool:
    seen: Node | None = end
    while seen is not None and seen is not node:
        seen = nodes.operand(seen)
    return seen is node


def _pack(node: Node, key: Node, value: Node, copies: int) -> Node:
    """Put attention over the keys in the place of a call, and drop the copies that nothing else reads."""
    query, mask = nodes.argument(node, 0, "query"), nodes.argument(node, 3, "attn_mask")
    heads = _sizes(key)[1]
    scale = nodes.argument(node, 6, "scale")
    graph = node.graph
    with graph.inserting_before(node):
        rows = graph.call_function(torch.squeeze, (query, 2))
        rows = graph.call_function(torch.unflatten, (rows, 1, (heads, copies)))
        out = graph.call_function(scaled_dot_product_attention, (rows, key, value), {"attn_mask": mask, "scale": scale})
        out = graph.call_function(torch.flatten, (out, 1, 2))
        out = graph.call_function(torch.unsqueeze, (out, 2))
    out.meta = dict(node.meta)
    node.replace_all_uses_with(out)
    _erase(dict.fromkeys([node, nodes.argument(node, 1, "key"), nodes.argument(node, 2, "value")]))
    return out


def _erase(unused: Iterable[Node]) -> None:
    """Erase calls that nothing reads any more, and the views and copies before them."""
    for end in unused:
        node: Node | None = end
        while node is not None and not node.users and _only_moves(node):
            source = nodes.operand(node)
            node.graph.erase_node(node)
            node = source


def _only_moves(node: Node) -> bool:
    moves = nodes.VALUE_PRESERVING | {"repeat_interleave", "scaled_dot_product_attention"}
    return nodes.kind(node) in moves and not nodes.writes(node)
