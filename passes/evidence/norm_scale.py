"""Find the normalisation in front of a gate: the scale and mean of its hidden states per channel.

    variance = x.pow(2).mean(-1, keepdim=True)
    hidden = weight * (x * rsqrt(variance + eps))         ->    gain = weight, no bias
    hidden = layer_norm(x, (H,), weight, bias)            ->    gain = weight, bias = bias
    hidden = normalised * (1 + weight)                    ->    gain = 1 + weight

Behind the norm stand numbers of mean 0 and scale 1, whatever the layers before it did; behind its
gain g and bias b hidden states have scale |g| and mean b in each channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..graph import nodes

_PASSED = nodes.VALUE_PRESERVING | {"dropout", "item"}
_NORMS = frozenset({"layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"})
_ROOTS = frozenset({"rsqrt", "sqrt", "pow", "reciprocal"})


@dataclass(frozen=True)
class NormScale:
    """The norm that hidden states [.., H] come from.

    Attributes:
        gain: graph input or attribute [H] that multiplies, or None.
        offset: added to the gain.
        bias: graph input or attribute [H] that is added, or None.
    """

    gain: Node | None = None
    offset: float = 0.0
    bias: Node | None = None

    @property
    def parameters(self) -> tuple[Node, ...]:
        """Gain and bias, those that there are."""
        return tuple(node for node in (self.gain, self.bias) if node is not None)

    def apply(self, normal: torch.Tensor, value: Callable[[Node], Any]) -> torch.Tensor:
        """Standard normal numbers [.., H] at this scale and mean.

        Args:
            normal: numbers of mean 0 and scale 1.
            value: the tensor behind a graph input or attribute.
        """
        if self.gain is not None:
            normal = normal * (value(self.gain).to(normal) + self.offset)
        return normal if self.bias is None else normal + value(self.bias).to(normal)


def find_norm_scale(hidden: Node) -> NormScale | str:
    """The norm that made the hidden states, or a text that says what stands there instead."""
    node, bias = hidden, None
    while True:
        source = nodes.operand(node)
        if nodes.kind(node) in _PASSED and source is not None:
            node = source
            continue
        kind = nodes.kind(node)
        if kind in _NORMS:
            own = nodes.argument(node, 3, "bias") if "layer_norm" in kind else None
            return NormScale(_root(nodes.argument(node, 2, "weight")), 0.0, _root(own))
        if kind == "add" and bias is None:
            parameter, rest = _split(node)
            if parameter is not None and rest is not None and parameter[1] == 0.0:
                node, bias = rest, parameter[0]
                continue
        if kind in ("mul", "div"):
            parameter, rest = _split(node) if kind == "mul" else (None, None)
            if parameter is not None and rest is not None and _is_normalised(rest):
                return NormScale(parameter[0], parameter[1], bias)
            if _is_normalised(node):
                return NormScale(bias=bias)
        return f"{node.name} is no normalisation"


def _split(node: Node) -> tuple[tuple[Node, float] | None, Node | None]:
    """The parameter [H] of a sum or product, with what is added to it, and the other operand."""
    left, right = (*node.args, None)[:2]
    for parameter, rest in ((left, right), (right, left)):
        if isinstance(parameter, Node) and isinstance(rest, Node) and (found := _vector(parameter)) is not None:
            return found, rest
    return None, None


def _vector(node: Node) -> tuple[Node, float] | None:
    """The parameter [H] that a node is, and the number added to it."""
    offset = 0.0
    while nodes.kind(node) in (*nodes.VALUE_PRESERVING, "add"):
        if nodes.kind(node) == "add":
            numbers = [a for a in node.args if isinstance(a, (int, float))]
            if len(numbers) != 1:
                return None
            offset += float(numbers[0])
        sources = [source for source in node.all_input_nodes if nodes.is_tensor(source)]
        if not sources:
            return None
        node = sources[0]
    root = _root(node)
    return None if root is None else (root, offset)


def _root(node: Any) -> Node | None:
    """The model's vector behind a view or cast."""
    if not isinstance(node, Node):
        return None
    root = nodes.parameter_root(node)
    vector = root is not None and len(nodes.shape(root) or ()) == 1 and nodes.is_model_state(root)
    return root if vector else None


def _is_normalised(node: Node) -> bool:
    """Whether a tensor is a product or quotient with one number a row that is made by a root."""
    node = nodes.behind(node, _PASSED)
    if nodes.kind(node) not in ("mul", "div"):
        return False
    return any(_is_root(operand) for operand in nodes.operands(node))


def _is_root(node: Node) -> bool:
    node = nodes.behind(node, _PASSED)
    return nodes.kind(node) in _ROOTS and nodes.last_size(node) == 1
