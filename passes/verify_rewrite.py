"""Prove, by running it, that a rewritten gate computes what re-routing defines, without an oracle for the model.

The part of the graph from the selection to where its tokens come together again runs on made-up activations, once as
traced and once rewritten:

- with S = K the results are equal bit for bit;
- with S = 1 and only two primary experts, so that almost every token names an expert twice, the rewritten result is
  the sum over slots of what the *original* dispatch gives for that slot alone, at its original weight. There no
  token names an expert twice, so the original shows what the sum has to be.

Where the tokens do not come together in the graph, because ids and weights leave it, the second comparison is with
what the original makes of merged ids and weights: bit for bit, and no expert twice in a token. Where the weights are
not known it is with what the original makes of the new ids. `Proof` says which it was. Uses that keep the original ids
(look-ups) are held fixed in these two: that they are right to keep them only the sum over slots shows.
"""

from __future__ import annotations

import enum
from collections import namedtuple
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .extract_dispatch import find_exit
from .gate import Gate, Skip, SkipReason, Use
from .graph import nodes
from .graph.run_part import Part, ValueOf, plain_number
from .reroute_dispatch import Rewrite, RoutingSettings, reroute_dispatch

_Picked = namedtuple("_Picked", ("values", "indices"))
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError)


def tolerance(dtype: torch.dtype) -> float:
    """How far results that are equal but for rounding may be apart, relative to their largest."""
    return _TOLERANCE.get(dtype, _HALF_TOLERANCE)


class Proof(enum.Enum):
    """What was shown of a gate's rewrite: with S = K no bit changes, and with S < K what the value says."""

    SUM = "the sum over slots"  # of the original dispatch, each slot run alone
    MERGED = "what the traced code makes of merged ids and weights; code outside the graph was not run"
    KIND = "what the traced code makes of the new ids; duplicates by the kind of its dispatch"


def verify_rewrite(gate: Gate, value_of: ValueOf = lambda node: None) -> Proof | Skip:
    """What is proven of a gate's rewrite, or the refusal where it is wrong. The graph is not changed.

    Args:
        gate: found, not yet rewritten.
        value_of: what graph inputs and attributes hold, see `evaluate.ValueOf`.
    """
    module = gate.selection.graph.owning_module
    if module is None:
        return _unproven(gate, "its graph has no module")
    copy, twin = _copied(module, gate)
    similarity = _leading_input(copy.graph)
    done = reroute_dispatch(twin, similarity, RoutingSettings(1))
    if isinstance(done, Skip):
        return replace(done, node=gate.selection)
    try:
        return _compare(gate, module, twin, copy, done, similarity, value_of)
    except _FAILURES as error:
        return _unproven(gate, f"it could not be run: {type(error).__name__}: {str(error).splitlines()[0][:120]}")


def _unproven(gate: Gate, detail: str) -> Skip:
    return Skip(SkipReason.UNVERIFIED, gate.selection, detail, evidence=5)


@dataclass(frozen=True)
class _Twins:
    """A gate as traced and as rewritten, with what both are run on and where they are compared."""

    gate: Gate
    done: Rewrite
    original: Part
    rewritten: Part
    outputs: list[Node]
    wanted: list[Node]  # the same in the rewritten graph
    start: dict[Node, Any]
    given: dict[Node, Any]
    matrix: torch.Tensor

    def run(self, changed: dict[Node, Any] | None = None) -> list[Any]:
        """The outputs as traced, from what the selection chose and from values exchanged for others."""
        return self.original.run(self.outputs, self.start | (changed or {}))

    def run_rewritten(self, select_top_k: int) -> list[Any]:
        """The outputs of the rewritten graph."""
        routing = _routing_node(self.done)
        one = routing.args
        position = 3 if self.done.merged else 2
        routing.args = (*one[:position], select_top_k, *one[position + 1 :])
        results = self.rewritten.run(self.wanted, self.given)
        routing.args = one
        return results


def _compare(
    gate: Gate, module: GraphModule, twin: Gate, copy: GraphModule, done: Rewrite, similarity: Node, value_of: ValueOf
) -> Proof | Skip:
    drawn: dict[str, Any] = {}
    names = {node.name: node for node in module.graph.nodes}
    twins = {node.name: node for node in copy.graph.nodes}
    exit_node = find_exit(gate)
    if exit_node is not None and exit_node.name not in twins:
        return _unproven(gate, f"{exit_node.name} is gone")
    start = _choice(gate)
    matrix = torch.rand(gate.num_experts, gate.num_experts, generator=torch.Generator().manual_seed(1))
    matrix = matrix.to(_device(gate))
    both = _Twins(
        gate,
        done,
        original=Part(module, gate.selection, value_of, drawn),
        rewritten=Part(copy, twin.selection, lambda node: value_of(names[node.name]), drawn),
        outputs=[exit_node] if exit_node is not None else _returned(gate),
        wanted=[twins[exit_node.name]] if exit_node is not None else _returned(twin),
        start=start,
        given={twins[node.name]: value for node, value in start.items()} | {similarity: matrix},
        matrix=matrix,
    )
    if not _all_equal(both.run(), both.run_rewritten(gate.top_k)):
        return _unproven(gate, "with S = K it differs from the original")
    return _prove_wiring(both) if exit_node is None else _prove_sum(both, exit_node)


def _prove_sum(both: _Twins, exit_node: Node) -> Proof | Skip:
    """S = 1 inside the graph."""
    [got] = both.run_rewritten(1)
    expected = _sum_of_slots(both.gate, both.original, exit_node, both.start, both.matrix)
    error = float((got.double() - expected).abs().max()) if got.numel() else 0.0
    scale = float(expected.abs().max()) if got.numel() else 1.0
    if not error <= tolerance(got.dtype) * max(scale, 1e-6):
        return _unproven(both.gate, f"with S = 1 it is off by {error:.2g} of {scale:.2g} from the sum over slots")
    return Proof.SUM


def _prove_wiring(both: _Twins) -> Proof | Skip:
    """S = 1 where the slots are not summed in the graph, or with weights that are not known."""
    gate = both.gate
    kept = [use.consumer for use in gate.uses if not use.kind.dispatches and _reads(use.read, gate.all_ids)]
    weights = gate.weights if both.done.merged else None
    ids, *values = both.original.run([gate.ids, *kept], both.start)
    new_ids = torch.ops.sere.reroute.default(ids, both.matrix, 1, 0.0, 0)
    changed = dict(zip(kept, values, strict=True))
    if weights is not None:
        [old] = both.original.run([weights], both.start)
        rerouted = new_ids
        new_ids, changed[weights] = torch.ops.sere.reroute_merged.default(ids, old, both.matrix, 1, 0.0, 0)
        if not _is_merged(new_ids, changed[weights], rerouted, old):
            return _unproven(gate, "with S = 1 a token names an expert twice, or not with the sum of its weights")
    if not _all_equal(both.run(changed | dict.fromkeys(gate.all_ids, new_ids)), both.run_rewritten(1)):
        made_of = "the new ids" if weights is None else "merged ids and weights"
        return _unproven(gate, f"with S = 1 what is returned is not made of {made_of}")
    return Proof.KIND if weights is None else Proof.MERGED


def _reads(read: Node, ids: tuple[Node, ...]) -> bool:
    """Whether what a use reads is the ids, or a view, cast or mask of them."""
    node: Node | None = read
    while node is not None and node not in ids:
        node = nodes.slot_source(node)
    return node is not None


def _is_merged(ids: torch.Tensor, weights: torch.Tensor, rerouted: torch.Tensor, original: torch.Tensor) -> bool:
    """Whether no token names an expert twice, each with the weights of all slots that were re-routed to it."""
    ordered = ids.sort(-1)[0]
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        return False
    size = int(torch.maximum(ids.max(), rerouted.max())) + 1
    table = torch.zeros(*ids.shape[:-1], size, dtype=torch.float64, device=ids.device)
    got = table.scatter_add(-1, ids.long(), weights.double())
    wanted = table.scatter_add(-1, rerouted.long(), original.double())
    return bool(((got - wanted).abs() <= tolerance(weights.dtype) * wanted.abs().max()).all())


def _all_equal(left: list[Any], right: list[Any]) -> bool:
    return all(_equal(a, b) for a, b in zip(left, right, strict=True))


def _routing_node(done: Rewrite) -> Node:
    source = nodes.operand(done.new_ids) if done.merged else done.new_ids
    assert source is not None
    return source


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
