"""What lies between router logits and dispatch: its nodes, and what they may compute.

Which of these it is, only running it shows (`fuse_router.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...ops.route.op import KERNEL_MAX_EXPERTS, KERNEL_MAX_SLOTS
from ...ops.route.reference import Scoring
from ..gate import Gate, Skip, SkipReason
from ..graph import nodes
from ..graph.aliases import aliases
from ..graph.walk import walk

_PROJECTIONS = frozenset({"linear", "matmul", "addmm"})
_SCORING: Mapping[str, str] = {"softmax": "softmax", "sigmoid": "sigmoid"}
_ROUTINE = nodes.VALUE_PRESERVING | {
    "topk",
    "item",
    "gather",
    "sum",
    "div",
    "mul",
    "add",
    "getattr",
    "size",
    "sym_size",
}
# A mask over groups of experts, and what groups are ranked by.
_MASKING = frozenset({"bool", "invert", "logical_not", "bitwise_not", "masked_fill", "scatter", "zeros_like", "where"})
_RANKING = frozenset({"max", "amax"})
_LOGITS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class RoutingChain:
    """The nodes between logits and dispatch, in graph order, and the graph inputs that they read."""

    logits: Node
    inside: tuple[Node, ...]
    inputs: tuple[Node, ...]


@dataclass(frozen=True)
class Routing:
    """A routing that the chain's operations allow: the arguments of `sere.route` behind the logits."""

    bias: Node | None
    scoring: Scoring


def find_chain(gate: Gate) -> RoutingChain | Skip:
    """The chain of a gate, or why it cannot be replaced as a whole."""
    if gate.weights is None:
        return Skip(SkipReason.WEIGHTS_UNKNOWN, gate.ids, str(gate.weights_skip))
    if gate.form != "top-k":
        return Skip(SkipReason.NOT_TOP_K, gate.selection, f"but by {gate.form}")

    def projects(node: Node) -> bool:
        roots = map(nodes.parameter_root, nodes.operands(node))
        return nodes.kind(node) in _PROJECTIONS and gate.router_weight in roots

    def behind(node: Node) -> list[Node]:
        if node.op in ("placeholder", "get_attr") or projects(node):
            return []
        source = cast_like(node)
        return [*(node.all_input_nodes if source is None else [source]), *nodes.writers(node)]

    met = list(walk([*gate.all_ids, gate.weights], behind))
    projections = [node for node in met if projects(node)]
    if len(projections) > 1:
        return Skip(SkipReason.TWO_PROJECTIONS, projections[1], ", ".join(node.name for node in projections))
    if not projections:
        return Skip(SkipReason.NO_LOGITS, gate.selection, nodes.place(gate.selection))
    [logits] = projections
    inputs = {node for node in met if node.op in ("placeholder", "get_attr")}
    inside = set(met) - inputs - {logits}
    ordered = tuple(node for node in gate.selection.graph.nodes if node in inside)
    chain = RoutingChain(logits, ordered, tuple(sorted(inputs)))
    return _refusal(gate, chain) or chain


def cast_like(node: Node) -> Node | None:
    """What a node casts to the type of another tensor, `weights.type_as(hidden)`, or None."""
    return nodes.operand(node) if nodes.kind(node) == "to" and len(node.all_input_nodes) == 2 else None


def _refusal(gate: Gate, chain: RoutingChain) -> Skip | None:
    """Why a chain cannot be replaced, from its nodes alone."""
    logits, inside = chain.logits, chain.inside
    kinds = {nodes.kind(node) for node in inside}
    other = sorted(kinds - _ROUTINE - set(_SCORING) - (_MASKING | _RANKING if _groups(gate, inside) else set()))
    if other:
        few = ", ".join(other[:5]) + (", .." if len(other) > 5 else "")
        return Skip(SkipReason.OWN_OPERATIONS, gate.selection, few)
    sizes, ids = nodes.shape(logits), nodes.shape(gate.ids)
    assert gate.weights is not None
    if nodes.value(logits).dtype not in _LOGITS:
        return Skip(SkipReason.DTYPE, logits, f"its logits are {nodes.value(logits).dtype}")
    if sizes is None or ids is None or [str(n) for n in sizes[:-1]] != [str(n) for n in ids[:-1]]:
        return Skip(SkipReason.SHAPES, logits, "its logits have other tokens than its ids")
    if sizes[-1] != gate.num_experts or gate.num_experts > KERNEL_MAX_EXPERTS or gate.top_k > KERNEL_MAX_SLOTS:
        return Skip(SkipReason.SHAPES, logits, f"E = {sizes[-1]}, K = {gate.top_k}")
    if not nodes.same_shape(gate.weights, gate.ids):
        return Skip(SkipReason.SHAPES, gate.weights, "its weights have another shape than its ids")
    results = {*gate.all_ids, gate.weights}
    for node in inside:
        if any(written is logits or written not in inside for written in nodes.writes(node)):
            return Skip(SkipReason.SHARED_MEMORY, node, f"{node.name} writes to what others read")
        outside = [user for user in node.users if user not in inside]
        if outside and node not in results:
            detail = f"{outside[0].name} reads its {node.name} as well"
            return Skip(SkipReason.READ_ELSEWHERE, outside[0], detail)
    return _written(chain)


def _written(chain: RoutingChain) -> Skip | None:
    """The first write to the logits or an input while the chain runs: one operator reads once."""
    read = [chain.logits, *(node for node in chain.inputs if nodes.is_tensor(node))]
    held = {alias for tensor in read for alias in aliases(tensor)} - set(chain.inside)
    first, last = min(chain.logits, chain.inside[0]), chain.inside[-1]
    for node in chain.logits.graph.nodes:
        if first < node < last and held.intersection(nodes.writes(node)):
            return Skip(SkipReason.SHARED_MEMORY, node, f"{node.name} changes its logits or bias")
    return None


def _groups(gate: Gate, inside: tuple[Node, ...]) -> list[tuple[Any, ...]]:
    """The limits to groups that the chain's other selections allow, as arguments of `sere.route`."""
    limiting = []
    for node in inside:
        scores = nodes.operand(node)
        if nodes.kind(node) != "topk" or node is gate.selection or scores is None or not nodes.picked(node, 1):
            continue
        count, chosen = nodes.last_size(scores), nodes.argument(node, 1, "k")
        if chosen != count:
            limiting.append((count, chosen))
    if not limiting:
        return [(1, 1, "max", True)]
    count, chosen = limiting[0]
    fits = len(limiting) == 1 and isinstance(count, int) and gate.num_experts % count == 0 and isinstance(chosen, int)
    if not fits or count == gate.num_experts:
        return []
    infinite = any(value < -1e4 for value in _numbers(inside))
    return [(count, chosen, score, zero) for score in ("max", "top2") for zero in (not infinite, infinite)]


def _numbers(inside: tuple[Node, ...]) -> list[int | float]:
    """The numbers among the arguments of the chain's operations."""
    arguments = (value for node in inside for value in (*node.args, *node.kwargs.values()))
    return [value for value in arguments if isinstance(value, (int, float)) and not isinstance(value, bool)]


def possible_routings(gate: Gate, chain: RoutingChain) -> Iterator[Routing]:
    """Every routing that the chain's operations allow."""
    assert gate.weights is not None
    kinds = [nodes.kind(node) for node in chain.inside]
    scoring = next((_SCORING[kind] for kind in kinds if kind in _SCORING), "none")
    if scoring == "softmax" and "softmax" in kinds[kinds.index("topk") :]:
        scoring = "softmax_after"
    tensors = [node for node in chain.inputs if nodes.is_tensor(node)]
    if any(nodes.shape(node) != (gate.num_experts,) for node in tensors) or len(tensors) > 1:
        return
    bias = tensors[0] if tensors else None
    numbers = _numbers(chain.inside)
    divisors = _numbers(tuple(node for node in chain.inside if nodes.kind(node) == "div"))
    factors = [*(float(value) for value in numbers if value > 0), *(1 / value for value in divisors if value > 0)]
    scales = dict.fromkeys([1.0, *factors])
    # If the chain has an epsilon it is used: on most logits it makes no visible difference.
    epsilons = dict.fromkeys([*(value for value in numbers if 0 < value < 1e-3), 0.0])
    dtype = nodes.value(gate.weights).dtype
    for groups, scale, renormalize in itertools.product(_groups(gate, chain.inside), scales, (False, True)):
        for epsilon in epsilons if renormalize else (0.0,):
            yield Routing(bias, Scoring(gate.top_k, scoring, renormalize, epsilon, scale, dtype, *groups))
