"""Run a part of a graph, from nodes whose values are given to the nodes that are wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from . import nodes

_REARRANGING = nodes.VALUE_PRESERVING | {"transpose", "permute", "repeat_interleave", "repeat", "index"}
# What a graph input or attribute holds; None where only a call would know.
ValueOf = Callable[[Node], Any]


class Part:
    """Evaluates nodes of one graph on made-up activations.

    Activations that do not depend on `start` are random, drawn once a node; graph inputs and attributes are what
    `value_of` says, or random as well; sizes, masks, indices and fresh tensors are computed.
    """

    def __init__(self, module: GraphModule, start: Node, value_of: ValueOf, drawn: dict[str, Any]) -> None:
        self.module = module
        self._value_of = value_of
        self._drawn = drawn  # by name: two versions of a graph share what they read
        self._behind = _closure(start)

    def run(self, wanted: list[Node], given: Mapping[Node, Any]) -> list[Any]:
        """The values of `wanted` when those of `given` are fixed.

        Raises:
            RuntimeError, TypeError, ValueError, IndexError: an operation does not take the made-up values.
        """
        needed = self._needed(wanted, given)
        values: dict[Node, Any] = {}
        with torch.no_grad():
            for node in _in_order(self.module.graph, needed):
                values[node] = _copied(given[node]) if node in given else self._compute(node, values)
        return [values[node] for node in wanted]

    def _needed(self, wanted: list[Node], given: Mapping[Node, Any]) -> set[Node]:
        last = max(wanted)
        needed: set[Node] = set()
        pending = list(wanted)
        while pending:
            node = pending.pop()
            if node in needed:
                continue
            needed.add(node)
            if node not in given:
                # A write that depends on the start has to happen; one that does not is part of a random value.
                pending += [w for w in nodes.writers(node) if w < last and w in self._behind]
                if not self._is_drawn(node):
                    pending += node.all_input_nodes
        return needed

    def _is_drawn(self, node: Node) -> bool:
        if node.op == "placeholder":
            return True
        if node in self._behind or node.op == "get_attr" or not nodes.is_floating(node):
            return False
        if nodes.kind(node) in _REARRANGING:  # slots of one token hold the same row
            return False
        return any(nodes.reads_numbers(node, source) for source in nodes.operands(node))

    def _compute(self, node: Node, values: dict[Node, Any]) -> Any:
        if self._is_drawn(node) or node.op == "get_attr":
            if node.name not in self._drawn:
                self._drawn[node.name] = self._draw(node)
            return _copied(self._drawn[node.name]) if nodes.writers(node) else self._drawn[node.name]
        arguments, keywords = map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "call_method":
            return getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
        if node.op == "call_module":
            return self.module.get_submodule(str(node.target))(*arguments, **keywords)
        return node.target(*arguments, **keywords)  # type: ignore[operator]

    def _draw(self, node: Node) -> Any:
        known = self._value_of(node) if node.op in ("placeholder", "get_attr") else None
        if known is not None and not isinstance(known, torch._subclasses.FakeTensor):
            return known.detach() if isinstance(known, torch.Tensor) else plain_number(known)
        like = nodes.value(node)
        if not hasattr(like, "shape"):
            return plain_number(like)
        sizes = [plain_number(size) for size in like.shape]
        if not like.dtype.is_floating_point:
            return torch.zeros(sizes, dtype=like.dtype, device=nodes.device(node))
        generator = torch.Generator().manual_seed(len(self._drawn))
        # Positive: what is drawn may be scores, and a dispatch may take weights above 0 for its mask.
        drawn = torch.rand(sizes, generator=generator) + 0.05
        return drawn.to(device=nodes.device(node), dtype=like.dtype)


def plain_number(size: Any) -> Any:
    """A symbolic size's value in the call that was traced; anything else as it is."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _copied(found: Any) -> Any:
    """A copy that in-place operations of the graph may write to."""
    if isinstance(found, tuple):
        parts = [_copied(part) for part in found]
        return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)
    return found.clone() if isinstance(found, torch.Tensor) else found


def _closure(start: Node) -> set[Node]:
    found, pending = {start}, [start]
    while pending:
        fresh = [node for node in nodes.followers(pending.pop()) if node not in found]
        found.update(fresh)
        pending.extend(fresh)
    return found


def _in_order(graph: Graph, needed: set[Node]) -> list[Node]:
    return [node for node in graph.nodes if node in needed]
