"""Replace what lies between router logits and dispatch by `sere.route`, one kernel.

    logits = linear(hidden, router_weight)                logits = linear(hidden, router_weight)
    probs = softmax(logits, -1)                           routed = sere.route(logits, top_k=K, scoring="softmax", ..)
    values, ids = topk(probs, K)                    ->    weights, ids = routed[0], routed[1]
    weights = (values / values.sum(-1)).to(dtype)

Like the experts (`fuse_experts.py`), the chain is not read off its nodes: its operations leave a
few candidates, and the one that computes the chain's own ids and weights on made-up logits is taken
(case 1), limited to groups of experts too (case 2). A chain with an operation that no candidate has
(case 3), whose inner results others read (case 4), or whose numbers no candidate gives (case 5)
stays as it is, with a reason. Logits that the model returns do not matter: they stay.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from ..ops.route.reference import Rerouting, route_reference
from .evidence.routing_chain import Routing, RoutingChain, cast_like, find_chain, possible_routings
from .gate import Gate, Skip, SkipReason
from .graph import nodes

# Draws of made-up logits. With one token each, a difference that shows in half of all tokens is
# missed once in 65,000 times.
_DRAWS = 16
# In the graph's dtypes, rounded where the graph rounds. What the numbers mean is compared in
# float32.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_EXACT = 1e-5
# Shifts of the made-up logits: to where a 0 outside the groups would win, and to where sums of
# sigmoids are about 1e-20, so that an epsilon added to them shows.
_NEGATIVE, _TINY = 4.25, 48.0


def fuse_router(gate: Gate, sizes: Mapping[Node, int], device: torch.device) -> Gate | Skip:
    """Replace scoring, selection and weighing by `sere.route`, before the gate is re-routed.

    Args:
        gate: a gate of the graph.
        sizes: numbers for the graph inputs that are symbolic sizes, as one call would have them.
        device: where the graph runs.

    Returns:
        The gate with new ids and weights, or why the graph is unchanged.
    """
    chain = find_chain(gate)
    if isinstance(chain, Skip):
        return chain
    routing = _confirmed(gate, chain, list(possible_routings(gate, chain)), sizes, device)
    return routing if isinstance(routing, Skip) else _replace(gate, chain, routing)


def _confirmed(
    gate: Gate, chain: RoutingChain, candidates: list[Routing], sizes: Mapping[Node, int], device: torch.device
) -> Routing | Skip:
    """The candidate that computes the chain's results in all draws, as rounded and in float32."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        for exact in (False, True):
            module = _module(gate, chain, exact=exact)
            for draw in range(_DRAWS if candidates else 0):
                logits, values = _draw(chain, candidates[0], draw, sizes, generator, exact=exact)
                weights, ids = module(logits.clone(), *values.values())
                order = ids.sort(-1).indices  # an unsorted top-k promises the same experts, not their order
                candidates = [
                    candidate
                    for candidate in candidates
                    if _agree((weights, ids), order, _routed(logits, values, candidate, exact=exact), exact=exact)
                ]
                if not candidates:
                    break
    return candidates[0] if candidates else Skip(SkipReason.OTHER_ROUTING, gate.selection, nodes.place(gate.selection))


def _draw(
    chain: RoutingChain,
    candidate: Routing,
    draw: int,
    sizes: Mapping[Node, int],
    generator: torch.Generator,
    *,
    exact: bool,
) -> tuple[torch.Tensor, dict[Node, Any]]:
    """Made-up logits and inputs, in the graph's dtypes or all in float32."""
    shape = nodes.shape_in_call(chain.logits, sizes)
    bias, scoring, grouped = candidate.bias, candidate.scoring.scoring, candidate.scoring.num_groups > 1
    logits = _logits(shape, generator)
    # Below 0, where the value outside the groups matters; otherwise sums in 16 bits would tie.
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
    logits: torch.Tensor, values: Mapping[Node, Any], candidate: Routing, *, exact: bool
) -> tuple[torch.Tensor, ...]:
    scoring = dataclasses.replace(candidate.scoring, dtype=torch.float32) if exact else candidate.scoring
    bias = None if candidate.bias is None else values[candidate.bias]
    return route_reference(logits, bias, scoring, Rerouting())


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
    """Random orders of 4, 3.875, ..: distinct in bfloat16 where the selection can reach."""
    keys = torch.rand(shape, generator=generator, device=generator.device)
    return 4 - keys.argsort(-1).clamp(max=64) / 8


def _module(gate: Gate, chain: RoutingChain, *, exact: bool) -> GraphModule:
    """The chain as a function of the logits and the chain's inputs that returns (weights, ids).

    With `exact` nothing is rounded to 16 bits: all that would be is float32.
    """
    assert gate.weights is not None
    graph = Graph()
    mapped = {node: graph.placeholder(f"arg_{node.name}") for node in (chain.logits, *chain.inputs)}
    for node in chain.inside:
        source = cast_like(node)
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
        node.update_arg(2, False)  # half_to_float
    if node.target in ("bfloat16", "half"):
        node.target = "float"


def _replace(gate: Gate, chain: RoutingChain, routing: Routing) -> Gate:
    graph = gate.selection.graph
    old_weights = gate.weights
    assert old_weights is not None
    ready = chain.logits if routing.bias is None else max(chain.logits, routing.bias)
    arguments = {"bias": routing.bias, **vars(routing.scoring)}
    with graph.inserting_before(next(node for node in chain.inside if ready < node)):
        routed = graph.call_function(torch.ops.sere.route.default, (chain.logits,), arguments)
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
