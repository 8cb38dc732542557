"""Replace what lies between router logits and dispatch by `sere.route`, one kernel.

    logits = linear(hidden, router_weight)                logits = linear(hidden, router_weight)
    probs = softmax(logits, -1)                           routed = sere.route(logits, None, K, "softmax", True, ..)
    values, ids = topk(probs, K)                    ->    weights, ids = routed[0], routed[1]
    weights = (values / values.sum(-1)).to(dtype)

Like the experts (`fuse_experts.py`), the chain is not read off its nodes: its operations leave a few candidates, and
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
from torch.fx.node import map_aggregate

from ..ops.route.op import KERNEL_MAX_EXPERTS, KERNEL_MAX_SLOTS
from ..ops.route.reference import Rerouting, Scoring, route_reference
from .gate import Gate, Skip, SkipReason
from .graph import nodes
from .reroute_dispatch import aliases

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
# Draws of made-up logits; a difference that shows in one token of ten is missed once in 10 ** 7 then, with one token.
_DRAWS = 16
# In the graph's dtypes, rounded where the graph rounds. What the numbers mean is compared in float32.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_EXACT = 1e-5
# Shifts of the made-up logits: to where a 0 outside the groups would win, and to where sums of sigmoids are some 1e-20
# and what is added to them tells.
_NEGATIVE, _TINY = 4.25, 48.0


@dataclass(frozen=True)
class _Chain:
    """The nodes from the logits (not included) to ids and weights, in graph order, and the graph inputs they read."""

    logits: Node
    inside: tuple[Node, ...]
    inputs: tuple[Node, ...]


def fuse_router(gate: Gate, sizes: Mapping[Node, int], device: torch.device) -> Gate | Skip:
    """Replace the gate's scoring, selection and weighing by `sere.route`. Runs before the gate is re-routed.

    Args:
        gate: a gate of the graph.
        sizes: numbers for the graph inputs that are symbolic sizes, as one call would have them.
        device: where the graph runs.

    Returns:
        The gate with new ids and weights, or why the graph is unchanged.
    """
    chain = _chain(gate)
    if isinstance(chain, Skip):
        return chain
    options = _confirmed(gate, chain, list(_candidates(gate, chain)), sizes, device)
    return options if isinstance(options, Skip) else _replace(gate, chain, options)


def _chain(gate: Gate) -> _Chain | Skip:
    if gate.weights is None:
        return Skip(SkipReason.WEIGHTS_UNKNOWN, gate.ids, str(gate.weights_skip))
    if gate.form != "top-k":
        return Skip(SkipReason.NOT_TOP_K, gate.selection, f"but by {gate.form}")
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
            if logits is not None:
                return Skip(SkipReason.TWO_PROJECTIONS, node)
            logits = node
        elif node.op in ("placeholder", "get_attr"):
            inputs.add(node)
        else:
            inside.add(node)
            source = _cast_like(node)
            pending.extend(node.all_input_nodes if source is None else [source])
            pending.extend(nodes.writers(node))
    if logits is None:
        return Skip(SkipReason.NO_LOGITS, gate.selection)
    ordered = tuple(node for node in gate.selection.graph.nodes if node in inside)
    chain = _Chain(logits, ordered, tuple(sorted(inputs)))
    return _refusal(gate, chain) or chain


def _cast_like(node: Node) -> Node | None:
    """What a node casts to the type of another tensor, `weights.type_as(hidden)`, or None."""
    return nodes.operand(node) if nodes.kind(node) == "to" and len(node.all_input_nodes) == 2 else None


def _sources(node: Node) -> list[Node]:
    return [source for source in node.all_input_nodes if nodes.is_tensor(source)]


def _refusal(gate: Gate, chain: _Chain) -> Skip | None:
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


def _written(chain: _Chain) -> Skip | None:
    """The first write to the logits or to an input while the chain runs: one operator reads them all at one place."""
    read = [chain.logits, *(node for node in chain.inputs if nodes.is_tensor(node))]
    held = {alias for tensor in read for alias in aliases(tensor)} - set(chain.inside)
    first, last = min(chain.logits, chain.inside[0]), chain.inside[-1]
    for node in chain.logits.graph.nodes:
        if first < node < last and held.intersection(nodes.writes(node)):
            return Skip(SkipReason.SHARED_MEMORY, node, f"{node.name} changes its logits or bias")
    return None


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
    infinite = any(value < -1e4 for value in _numbers(inside))
    return [(count, chosen, score, zero) for score in ("max", "top2") for zero in (not infinite, infinite)]


def _numbers(inside: tuple[Node, ...]) -> list[int | float]:
    """The numbers among the arguments of the chain's operations."""
    arguments = (value for node in inside for value in (*node.args, *node.kwargs.values()))
    return [value for value in arguments if isinstance(value, (int, float)) and not isinstance(value, bool)]


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
    numbers = _numbers(chain.inside)
    divisors = _numbers(tuple(node for node in chain.inside if nodes.kind(node) == "div"))
    factors = [*(float(value) for value in numbers if value > 0), *(1 / value for value in divisors if value > 0)]
    scales = dict.fromkeys([1.0, *factors])
    # Where the chain has one it is taken: on most logits none can be told from one.
    epsilons = dict.fromkeys([*(value for value in numbers if isinstance(value, float) and 0 < value < 1e-3), 0.0])
    dtype = nodes.value(gate.weights).dtype
    for groups, scale, renormalize in itertools.product(_groups(gate, chain.inside), scales, (False, True)):
        for epsilon in epsilons if renormalize else (0.0,):
            yield (bias, gate.top_k, scoring, renormalize, epsilon, scale, dtype, *groups)


def _confirmed(
    gate: Gate, chain: _Chain, candidates: list[tuple[Any, ...]], sizes: Mapping[Node, int], device: torch.device
) -> tuple[Any, ...] | Skip:
    """The candidate that gives the chain's ids and weights in every draw: as the graph rounds, and without rounding."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        for exact in (False, True):
            module = _module(gate, chain, exact=exact)
            for draw in range(_DRAWS if candidates else 0):
                logits, values = _draw(chain, candidates[0], draw, sizes, generator, exact=exact)
                weights, ids = module(logits.clone(), *values.values())
                order = ids.sort(-1).indices  # an unsorted top-k promises the same experts, not their order
                candidates = [
                    options
                    for options in candidates
                    if _agree((weights, ids), order, _routed(logits, values, options, exact=exact), exact=exact)
                ]
                if not candidates:
                    break
    return candidates[0] if candidates else Skip(SkipReason.OTHER_ROUTING, gate.selection)


def _draw(
    chain: _Chain,
    options: tuple[Any, ...],
    draw: int,
    sizes: Mapping[Node, int],
    generator: torch.Generator,
    *,
    exact: bool,
) -> tuple[torch.Tensor, dict[Node, Any]]:
    """Made-up logits and inputs, in the graph's dtypes or all in float32."""
    symbols = {
        nodes.value(node).node.expr: size for node, size in sizes.items() if isinstance(nodes.value(node), torch.SymInt)
    }
    shape = tuple(
        int(n.node.expr.subs(symbols)) if isinstance(n, torch.SymInt) else n for n in nodes.shape(chain.logits) or ()
    )
    bias, scoring, grouped = options[0], options[2], options[7] > 1
    logits = _logits(shape, generator)
    # Below 0, where it matters what stands outside the groups; the other way sums of 16 bits would tie.
    negative = grouped and draw % 2 == 1
    by_bias = bias is not None and scoring == "sigmoid"
    if negative and not by_bias:
        logits -= _NEGATIVE
    if exact and draw % 4 == 2:
        logits -= _TINY

    def value(node: Node) -> Any:
        if not nodes.is_tensor(node):
            return sizes[node]
        number = torch.rand(nodes.shape(node) or (), generator=generator, device=generator.device) / 8
        number -= 2 * (negative and by_bias)
        return number if exact else number.to(nodes.value(node).dtype)

    values = {node: value(node) for node in chain.inputs}
    return logits if exact else logits.to(nodes.value(chain.logits).dtype), values


def _routed(
    logits: torch.Tensor, values: Mapping[Node, Any], options: tuple[Any, ...], *, exact: bool
) -> tuple[torch.Tensor, ...]:
    scoring = Scoring(*options[1:])
    if exact:
        scoring = dataclasses.replace(scoring, dtype=torch.float32)
    return route_reference(logits, values.get(options[0]), scoring, Rerouting())


def _agree(
    theirs: tuple[torch.Tensor, ...], order: torch.Tensor, ours: tuple[torch.Tensor, ...], *, exact: bool
) -> bool:
    if ours[1].shape != theirs[1].shape or theirs[0].shape != ours[0].shape:
        return False
    ranks = ours[1].sort(-1).indices
    if not torch.equal(ours[1].gather(-1, ranks), theirs[1].gather(-1, order)):
        return False
    expected, actual = theirs[0].gather(-1, order), ours[0].gather(-1, ranks)
    relative, absolute = (_EXACT, 0.0) if exact else (_TOLERANCE.get(expected.dtype, 1e-4), 1e-7)
    return torch.allclose(actual.double(), expected.double(), rtol=relative, atol=absolute)


def _logits(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random orders of numbers from 4 downwards, 1/8 apart: distinct in bfloat16 where the selection can reach."""
    keys = torch.rand(shape, generator=generator, device=generator.device)
    return 4 - keys.argsort(-1).clamp(max=64) / 8


def _module(gate: Gate, chain: _Chain, *, exact: bool) -> GraphModule:
    """The chain as a function of the logits and the chain's inputs that returns (weights, ids).

    With `exact` nothing is rounded to 16 bits: all that would be is float32.
    """
    assert gate.weights is not None
    graph = Graph()
    mapped = {node: graph.placeholder(f"arg_{node.name}") for node in (chain.logits, *chain.inputs)}
    for node in chain.inside:
        source = _cast_like(node)
        if source is None:
            mapped[node] = graph.node_copy(node, mapped.__getitem__)
        else:
            mapped[node] = graph.call_method("to", (mapped[source], nodes.value(node).dtype))
        if exact:
            _widen(mapped[node])
    graph.output((mapped[gate.weights], mapped[gate.ids]))
    return GraphModule(torch.nn.Module(), graph)


def _widen(node: Node) -> None:
    """Casts to 16 bits become casts to float32."""

    def wide(argument: Any) -> Any:
        return torch.float32 if argument in (torch.bfloat16, torch.float16) else argument

    node.args, node.kwargs = map_aggregate(node.args, wide), map_aggregate(node.kwargs, wide)
    if nodes.raw_name(node) == "_softmax":
        node.args = (*node.args[:2], False)  # half_to_float
    if node.target in ("bfloat16", "half"):
        node.target = "float"


def _replace(gate: Gate, chain: _Chain, options: tuple[Any, ...]) -> Gate:
    graph = gate.selection.graph
    old_weights = gate.weights
    assert old_weights is not None
    ready = max(node for node in (chain.logits, options[0]) if node is not None)
    with graph.inserting_before(next(node for node in chain.inside if ready < node)):
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
