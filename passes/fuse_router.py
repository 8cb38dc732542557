"""Replace what lies between router logits and dispatch by `sere.route`, one kernel.

    logits = linear(hidden, router_weight)                logits = linear(hidden, router_weight)
    probs = softmax(logits, -1)                           routed = sere.route(logits, None, K, "softmax", True, ..)
    values, ids = topk(probs, K)                    ->    weights, ids = routed[0], routed[1]
    weights = (values / values.sum(-1)).to(dtype)

Like the experts (`lower_experts.py`), the chain is not read off its nodes: its operations leave a few candidates, and
the one that gives the chain's own ids and weights on made-up logits is taken (case 1), limited to groups of experts
too (case 2). A chain with an operation that no candidate has (case 3), whose inner results others read (case 4), or
whose numbers no candidate gives (case 5) stays as it is, with a reason. Logits that the model returns do not matter:
they stay.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..ops.route.op import KERNEL_MAX_EXPERTS, KERNEL_MAX_SLOTS
from ..ops.route.reference import Rerouting, Scoring, route_reference
from . import nodes
from .gate import Gate
from .rewrite_gating import aliases

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
# Draws of made-up logits; a difference that shows in one token of ten is missed once in 10 ** 7 then, with one token.
_DRAWS = 16
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class _Chain:
    """The nodes from the logits (not included) to ids and weights, in graph order, and the graph inputs they read."""

    logits: Node
    inside: tuple[Node, ...]
    inputs: tuple[Node, ...]


def fuse_router(gate: Gate, sizes: Mapping[Node, int], device: torch.device) -> Gate | str:
    """Replace the gate's scoring, selection and weighing by `sere.route`. Runs before the gate is re-routed.

    Args:
        gate: a gate of the graph.
        sizes: numbers for the graph inputs that are symbolic sizes, as one call would have them.
        device: where the graph runs.

    Returns:
        The gate with new ids and weights, or why the graph is unchanged.
    """
    chain = _chain(gate)
    if isinstance(chain, str):
        return chain
    options = _confirmed(gate, chain, list(_candidates(gate, chain)), sizes, device)
    return options if isinstance(options, str) else _replace(gate, chain, options)


def _chain(gate: Gate) -> _Chain | str:
    if gate.weights is None:
        return f"its routing weights could not be told: {gate.weights_skip}"
    if gate.form != "top-k":
        return f"it selects by {gate.form}"
    logits: Node | None = None
    inside: set[Node] = set()
    inputs: set[Node] = set()
    pending = [*gate.all_ids, gate.weights]
    while pending:
        node = pending.pop()
        if node in inside or node in inputs or node is logits:
            continue
        if nodes.kind(node) in _PROJECTIONS and any(
            nodes.parameter_root(s) is gate.router_weight for s in _sources(node)
        ):
            logits = node
        elif node.op in ("placeholder", "get_attr"):
            inputs.add(node)
        else:
            inside.add(node)
            pending.extend(node.all_input_nodes)
            pending.extend(nodes.writers(node))
    if logits is None:
        return "its logits could not be told"
    ordered = tuple(node for node in gate.selection.graph.nodes if node in inside)
    return _refusal(gate, logits, ordered) or _Chain(logits, ordered, tuple(sorted(inputs)))


def _sources(node: Node) -> list[Node]:
    return [source for source in node.all_input_nodes if nodes.is_tensor(source)]


def _refusal(gate: Gate, logits: Node, inside: tuple[Node, ...]) -> str | None:
    """Why a chain cannot be replaced, from its nodes alone."""
    kinds = {nodes.kind(node) for node in inside}
    other = sorted(kinds - _ROUTINE - set(_SCORING) - (_MASKING | _RANKING if _groups(gate, inside) else set()))
    if other:
        return f"its routing has operations of its own ({', '.join(other)})"
    sizes, ids = nodes.shape(logits), nodes.shape(gate.ids)
    assert gate.weights is not None
    if sizes is None or ids is None or [str(n) for n in sizes[:-1]] != [str(n) for n in ids[:-1]]:
        return "its logits have other tokens than its ids"
    if sizes[-1] != gate.num_experts or gate.num_experts > KERNEL_MAX_EXPERTS or gate.top_k > KERNEL_MAX_SLOTS:
        return "it has more experts or slots than the kernel takes"
    if not nodes.same_shape(gate.weights, gate.ids):
        return "its weights have another shape than its ids"
    results = {*gate.all_ids, gate.weights}
    for node in inside:
        if any(written is logits or written not in inside for written in nodes.writes(node)):
            return f"{node.name} writes to what others read"
        outside = [user for user in node.users if user not in inside]
        if outside and node not in results:
            return f"{outside[0].name} reads its {node.name} as well"
    moved = aliases(logits) - set(inside)
    late = [n for n in gate.selection.graph.nodes if logits < n < inside[-1] and set(nodes.writes(n)) & moved]
    return f"{late[0].name} changes its logits" if late else None


def _groups(gate: Gate, inside: tuple[Node, ...]) -> list[tuple[Any, ...]]:
    """The limits to groups that the selections ahead of the gate's own allow, as arguments of `sere.route`."""
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
    return [(count, chosen, score, zero) for score in ("max", "top2") for zero in (True, False)]


def _candidates(gate: Gate, chain: _Chain) -> Iterator[tuple[Any, ...]]:
    """Arguments of `sere.route` behind the logits that the chain's operations allow."""
    assert gate.weights is not None
    kinds = [nodes.kind(node) for node in chain.inside]
    scoring = next((_SCORING[kind] for kind in kinds if kind in _SCORING), "none")
    if scoring == "softmax" and "softmax" in kinds[kinds.index("topk") :]:
        scoring = "softmax_after"
    tensors = [node for node in chain.inputs if nodes.is_tensor(node)]
    if any(nodes.shape(node) != (gate.num_experts,) for node in tensors) or len(tensors) > 1:
        return
    bias = tensors[0] if tensors else None
    numbers = [value for node in chain.inside for value in node.args if isinstance(value, (int, float))]
    numbers += [value for node in chain.inside for value in node.kwargs.values() if isinstance(value, (int, float))]
    scales = dict.fromkeys([1.0, *(float(value) for value in numbers if value > 0 and not isinstance(value, bool))])
    epsilons = dict.fromkeys([0.0, *(value for value in numbers if isinstance(value, float) and 0 < value < 1e-3)])
    dtype = nodes.value(gate.weights).dtype
    for groups, scale, renormalize in itertools.product(_groups(gate, chain.inside), scales, (False, True)):
        for epsilon in epsilons if renormalize else (0.0,):
            yield (bias, gate.top_k, scoring, renormalize, epsilon, scale, dtype, *groups)


def _confirmed(
    gate: Gate, chain: _Chain, candidates: list[tuple[Any, ...]], sizes: Mapping[Node, int], device: torch.device
) -> tuple[Any, ...] | str:
    """The candidate that gives the chain's ids and weights in every draw."""
    symbols = {
        nodes.value(node).node.expr: size for node, size in sizes.items() if isinstance(nodes.value(node), torch.SymInt)
    }
    shape = tuple(
        int(n.node.expr.subs(symbols)) if isinstance(n, torch.SymInt) else n for n in nodes.shape(chain.logits) or ()
    )
    module = _module(gate, chain)
    generator = torch.Generator(device).manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        for draw in range(_DRAWS):
            # Below 0, where it matters what stands outside the groups; sums with a bias of 16 bits would tie there.
            shift = 2 * (draw % 2) if candidates and candidates[0][7] > 1 else 0
            logits = _logits(shape, generator).to(nodes.value(chain.logits).dtype)
            values: dict[Node, Any] = {
                node: torch.rand(nodes.shape(node) or (), generator=generator, device=device).to(
                    nodes.value(node).dtype
                )
                / 8
                - shift
                if nodes.is_tensor(node)
                else sizes[node]
                for node in chain.inputs
            }
            weights, ids = module(logits.clone(), *values.values())
            order = ids.sort(-1).indices  # an unsorted top-k promises the same experts, not their order
            candidates = [
                options
                for options in candidates
                if _agree((weights, ids), order, _routed(logits, values.get(options[0]), options))
            ]
            if not candidates:
                return "no routing of ours gives its ids and weights"
    return candidates[0]


def _routed(logits: torch.Tensor, bias: torch.Tensor | None, options: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    return route_reference(logits, bias, Scoring(*options[1:]), Rerouting())


def _agree(theirs: tuple[torch.Tensor, ...], order: torch.Tensor, ours: tuple[torch.Tensor, ...]) -> bool:
    if ours[1].shape != theirs[1].shape or theirs[0].shape != ours[0].shape:
        return False
    ranks = ours[1].sort(-1).indices
    if not torch.equal(ours[1].gather(-1, ranks), theirs[1].gather(-1, order)):
        return False
    expected, actual = theirs[0].gather(-1, order), ours[0].gather(-1, ranks)
    return torch.allclose(actual.double(), expected.double(), rtol=_TOLERANCE.get(expected.dtype, 1e-4), atol=1e-7)


def _logits(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random orders of numbers from 4 downwards, 1/8 apart: distinct in bfloat16 where the selection can reach."""
    keys = torch.rand(shape, generator=generator, device=generator.device)
    return 4 - keys.argsort(-1).clamp(max=64) / 8


def _module(gate: Gate, chain: _Chain) -> GraphModule:
    """The chain as a function of the logits and the chain's inputs that returns (weights, ids)."""
    assert gate.weights is not None
    graph = Graph()
    mapped = {node: graph.placeholder(f"arg_{node.name}") for node in (chain.logits, *chain.inputs)}
    for node in chain.inside:
        mapped[node] = graph.node_copy(node, mapped.__getitem__)
    graph.output((mapped[gate.weights], mapped[gate.ids]))
    return GraphModule(torch.nn.Module(), graph)


def _replace(gate: Gate, chain: _Chain, options: tuple[Any, ...]) -> Gate:
    graph = gate.selection.graph
    old_weights = gate.weights
    assert old_weights is not None
    with graph.inserting_before(chain.inside[0]):
        routed = graph.call_function(torch.ops.sere.route.default, (chain.logits, *options))
        weights = graph.call_function(operator.getitem, (routed, 0))
        ids = graph.call_function(operator.getitem, (routed, 1))
    routed.meta = {key: value for key, value in gate.selection.meta.items() if key != "tensor_meta"}
    weights.meta, ids.meta = dict(old_weights.meta), dict(gate.ids.meta)
    key = next((key for key in ("example_value", "val") if key in gate.ids.meta), None)
    if key is not None:
        routed.meta[key] = (nodes.value(old_weights), nodes.value(gate.ids))
    inside = set(chain.inside)
    for old, new in ((old_weights, weights), *((old_ids, ids) for old_ids in gate.all_ids)):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)
    for node in reversed(chain.inside):
        graph.erase_node(node)
    uses = tuple(
        dataclasses.replace(use, read=ids if use.read in gate.all_ids else use.read)
        for use in gate.uses
        if use.consumer not in inside
    )
    return dataclasses.replace(
        gate, selection=routed, ids=ids, all_ids=(ids,), values=None, weights=weights, uses=uses, is_sorted=True
    )
