"""Prove, by running it, that a rewritten gate computes what re-routing defines, without an oracle for the model.

The part of the graph from the selection to where its tokens come together again runs on made-up activations, once as
traced and once rewritten:

- with S = K the results are equal bit for bit;
- with S = 1 and only two primary experts, so that almost every token names an expert twice, the rewritten result is
  the sum over slots of what the *original* dispatch gives for that slot alone, at its original weight. There no
  token names an expert twice, so the original shows what the sum has to be.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from . import nodes
from .evaluate import Part, ValueOf, plain_number
from .extract_dispatch import find_exit
from .gate import Gate, Skip, SkipReason, Use
from .rewrite_gating import Rewrite, RoutingSettings, rewrite_gate

_Picked = namedtuple("_Picked", ("values", "indices"))
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError)


def verify_rewrite(gate: Gate, value_of: ValueOf = lambda node: None) -> Skip | None:
    """None where the rewrite of a gate is right, else the refusal. The graph is not changed.

    Args:
        gate: found, not yet rewritten.
        value_of: what graph inputs and attributes hold, see `evaluate.ValueOf`.
    """
    module = gate.selection.graph.owning_module
    if module is None:
        return _unproven(gate, "its graph has no module")
    copy, twin = _copied(module, gate)
    similarity = _leading_input(copy.graph)
    done = rewrite_gate(twin, similarity, RoutingSettings(1))
    if isinstance(done, Skip):
        return replace(done, node=gate.selection)
    try:
        return _compare(gate, module, twin, copy, done, similarity, value_of)
    except _FAILURES as error:
        return _unproven(gate, f"it could not be run: {type(error).__name__}: {str(error).splitlines()[0][:120]}")


def _unproven(gate: Gate, detail: str) -> Skip:
    return Skip(SkipReason.UNVERIFIED, gate.selection, detail, evidence=5)


def _compare(
    gate: Gate, module: GraphModule, twin: Gate, copy: GraphModule, done: Rewrite, similarity: Node, value_of: ValueOf
) -> Skip | None:
    drawn: dict[str, Any] = {}
    original = Part(module, gate.selection, value_of, drawn)
    names = {node.name: node for node in module.graph.nodes}
    rewritten = Part(copy, twin.selection, lambda node: value_of(names[node.name]), drawn)
    exit_node = find_exit(gate)
    outputs = [exit_node] if exit_node is not None else _returned(gate)
    twins = {node.name: node for node in copy.graph.nodes}
    if exit_node is not None and exit_node.name not in twins:
        return _unproven(gate, f"{exit_node.name} is gone")
    start = _choice(gate)
    matrix = torch.rand(gate.num_experts, gate.num_experts, generator=torch.Generator().manual_seed(1))
    matrix = matrix.to(_device(gate))
    given = {twins[node.name]: value for node, value in start.items()} | {similarity: matrix}
    wanted = [twins[node.name] for node in outputs] if exit_node is not None else _returned(twin)

    before = original.run(outputs, start)
    routing = _routing_node(done)
    one = routing.args
    routing.args = tuple(
        gate.top_k if argument is one[_position(done)] and i == _position(done) else argument
        for i, argument in enumerate(one)
    )
    same = rewritten.run(wanted, given)
    routing.args = one
    if not all(_equal(a, b) for a, b in zip(before, same, strict=True)):
        return _unproven(gate, "with S = K it differs from the original")
    if exit_node is None or gate.weights is None:
        return None  # what sums the slots is not in the graph, or proven by its kind alone
    [got] = rewritten.run(wanted, given)
    expected = _sum_of_slots(gate, original, exit_node, start, matrix)
    error = float((got.double() - expected).abs().max()) if got.numel() else 0.0
    scale = float(expected.abs().max()) if got.numel() else 1.0
    tolerance = _TOLERANCE.get(got.dtype, _HALF_TOLERANCE)
    if not error <= tolerance * max(scale, 1e-6):
        return _unproven(gate, f"with S = 1 it is off by {error:.2g} of {scale:.2g} from the sum over slots")
    return None


def _routing_node(done: Rewrite) -> Node:
    source = nodes.operand(done.new_ids) if done.merged else done.new_ids
    assert source is not None
    return source


def _position(done: Rewrite) -> int:
    """Of S among the operator's arguments."""
    return 3 if done.merged else 2


def _sum_of_slots(
    gate: Gate, part: Part, exit_node: Node, start: dict[Node, Any], matrix: torch.Tensor
) -> torch.Tensor:
    """The sum over k of the original dispatch with new expert k alone, float64 like the exit's value.

    A slot's expert stands first, at the slot's weight; distinct others stand behind it at weight 0. What the exit
    holds besides the experts (a residual) is counted once.
    """
    routing_weights = gate.weights
    assert routing_weights is not None
    ids, weights = part.run([gate.ids, routing_weights], start)
    new = torch.ops.sere.reroute.default(ids, matrix, 1, 0.0, 0)
    others = torch.arange(gate.top_k, device=ids.device)

    def alone(first: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        inside = (first[..., None] + others) % gate.num_experts
        # An id that names no expert stands in its slot as it is.
        inside[..., 0] = first
        table = torch.zeros_like(weights)
        table[..., 0] = weight
        chosen = dict.fromkeys(gate.all_ids, inside.to(ids.dtype))
        [result] = part.run([exit_node], start | chosen | {routing_weights: table})
        return result.double()

    nothing = alone(new[..., 0], torch.zeros_like(weights[..., 0]))
    total = nothing.clone()
    for slot in range(gate.top_k):
        total += alone(new[..., slot], weights[..., slot]) - nothing
    return total


def _choice(gate: Gate) -> dict[Node, Any]:
    """What the selection chose: in each token expert 0 or 1 first, then distinct others."""
    scores = nodes.operand(gate.selection)
    assert scores is not None
    sizes = [plain_number(size) for size in nodes.shape(scores) or ()]
    generator = torch.Generator().manual_seed(2)
    ranks = torch.rand(sizes, generator=generator).argsort(-1)  # [..., columns], distinct in a token
    rows = torch.arange(ranks[..., 0].numel()).view(ranks.shape[:-1])
    first = (rows % 2)[..., None]
    ids = torch.cat([first, ranks[ranks != first].view(*ranks.shape[:-1], -1)], -1)
    device, dtype = _device(gate), nodes.value(scores).dtype
    if gate.form == "steps":
        level = torch.arange(sizes[-1], 0, -1, dtype=torch.float32).expand(ids.shape) / sizes[-1]
        return {scores: torch.zeros(sizes).scatter(-1, ids, level).to(device=device, dtype=dtype)}
    width = sizes[-1] if gate.form == "sort" else int(nodes.argument(gate.selection, 1, "k"))
    ids = ids[..., :width].contiguous().to(device)
    if nodes.is_tensor(gate.selection):
        return {gate.selection: ids}
    values = torch.rand(ids.shape, generator=generator).sort(-1, descending=True)[0] + 0.1
    return {gate.selection: _Picked(values.to(device=device, dtype=dtype), ids)}


def _device(gate: Gate) -> torch.device:
    recorded = getattr(nodes.value(gate.ids), "device", None)
    return recorded if recorded is not None else nodes.device(gate.router_weight)


def _returned(gate: Gate) -> list[Node]:
    """The nodes that the graph returns and that depend on the selection's ids or weights."""
    ends: list[Node] = []
    for node in gate.selection.graph.output_node().all_input_nodes:
        ends.append(node)
    behind = Part(gate.selection.graph.owning_module, gate.selection, lambda _: None, {})._behind  # type: ignore[arg-type]
    return [node for node in ends if node in behind]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    return type(a) is type(b) and a == b


def _leading_input(graph: Graph) -> Node:
    with graph.inserting_before(next(iter(graph.nodes))):
        return graph.placeholder("sere_verified_similarity")


def _copied(module: GraphModule, gate: Gate) -> tuple[GraphModule, Gate]:
    """A copy of the graph that shares parameters, and the gate in it."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(module.graph, mapping)
    graph.output(output)
    copy = GraphModule(module, graph)
    # GraphModule may renumber nothing: names are those of the original.
    old_output = module.graph.output_node()
    mapping[old_output] = copy.graph.output_node()

    def moved(node: Node | None) -> Node | None:
        return None if node is None else mapping[node]

    twin = replace(
        gate,
        selection=mapping[gate.selection],
        ids=mapping[gate.ids],
        values=moved(gate.values),
        router_weight=mapping[gate.router_weight],
        router_input=mapping[gate.router_input],
        uses=tuple(Use(mapping[use.consumer], mapping[use.read], use.kind) for use in gate.uses),
        weights=moved(gate.weights),
        all_ids=tuple(mapping[node] for node in gate.all_ids),
    )
    return copy, twin
