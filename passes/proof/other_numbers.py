"""Numbers of a call that are no tensors, such as a length. The next call may bring others.

A graph that serves any number has a symbol for it: `mask = arange(T) < length`. A proof with the traced call's alone
would show nothing of a later one that marks other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .more_tokens import count, is_served, symbolic
from .region import Region

_MOST_OF_ONE = 4  # other numbers that are made up for one symbol
_MOST = 8  # for all


def other_numbers(region: Region) -> list[dict[Any, int]]:
    """Numbers for the symbols of a region that count none of its tokens; each list of them is served by the graph."""
    sizes = {size.node.expr: size for node in region.graph.nodes for size in symbolic(node)}
    hints = {expr: size.node.hint for expr, size in sizes.items() if isinstance(size.node.hint, int)}  # no data's sizes
    tokens = {symbol for size in symbolic(region.gate.ids) for symbol in size.node.expr.free_symbols}
    free = sorted((expr for expr in hints if expr.is_symbol and expr not in tokens), key=str)
    many = count(region.gate.ids, {}) // region.gate.top_k
    found: list[dict[Any, int]] = []
    for symbol in free:
        served = (n for n in _likely(many, hints[symbol]) if is_served(sizes[symbol], hints | {symbol: n}, symbol))
        found += [{symbol: number} for number, _ in zip(served, range(_MOST_OF_ONE), strict=False)]
    return found[:_MOST]


def _likely(tokens: int, now: int) -> Iterator[int]:
    """Other numbers than one, that mark some tokens where it marks none, and the other way round."""
    likely = (tokens // 2, tokens, tokens - 1, 1, now // 2, now + 1, now - 1, 0, 2 * now)
    return (number for number in dict.fromkeys(likely) if number != now)
