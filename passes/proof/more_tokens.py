"""More tokens than a traced call had, for graphs that serve any number of them.

What a graph does to tokens beyond a place, such as dropping them, a proof on few tokens cannot show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from ..graph import nodes
from ..graph.run_part import plain_number
from .region import Region

_TOKENS = 512  # at most
_LARGEST = 1 << 23  # numbers in one tensor of a region that runs on more tokens


def more_tokens(region: Region) -> dict[Any, int]:
    """A number for a symbol that counts a region's tokens; empty where the graph serves one number, or no more fit."""
    found = {size.node.expr: size.node.hint for node in region.graph.nodes for size in symbolic(node)}
    hints = {expression: hint for expression, hint in found.items() if isinstance(hint, int)}  # no data's sizes
    ids = list(symbolic(region.gate.ids))
    for symbol in sorted({symbol for size in ids for symbol in size.node.expr.free_symbols}, key=str):
        now, tokens = hints.get(symbol), count(region.gate.ids, {}) // region.gate.top_k
        if now is None or not 0 < tokens < _TOKENS:
            continue
        # A multiple: the program may have asked whether the number is even.
        more = now * (1 << int(math.log2(_TOKENS / tokens)))
        while more > now:
            sizes = {symbol: more}
            if is_served(ids[0], hints | sizes, symbol) and _largest(region, sizes) <= _LARGEST:
                return sizes
            more //= 2
    return {}


def symbolic(node: Node) -> Iterator[torch.SymInt]:
    """The symbolic sizes of a tensor, or the symbolic number, that a node yields."""
    found = nodes.value(node)
    for size in getattr(found, "shape", ()) or (found,):
        if isinstance(size, torch.SymInt):
            yield size


def is_served(size: torch.SymInt, numbers: dict[Any, Any], symbol: Any) -> bool:
    """Whether the graph's guards let a call with these numbers through; another graph serves it where not."""
    env = size.node.shape_env
    bounds = env.bound_sympy(symbol)
    if not bool(bounds.lower <= numbers[symbol] <= bounds.upper):
        return False
    return not any(guard.expr.subs(numbers) == False for guard in env.guards)  # noqa: E712 - a sympy constant


def _largest(region: Region, sizes: dict[Any, int]) -> int:
    """How many numbers the largest tensor has that there is more of."""
    found = ((count(node, sizes), count(node, {})) for node in region.graph.nodes)
    return max((count for count, before in found if count != before), default=0)


def count(node: Node, sizes: dict[Any, int]) -> int:
    """How many numbers a tensor has, with other numbers for some symbols."""
    return math.prod(int(plain_number(size, sizes) or 0) for size in getattr(nodes.value(node), "shape", ()))
