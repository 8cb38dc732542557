"""Ids and weights that leave the graph: what the graph returns of them is made of re-routed ones.

What receives them is not run. The part of the graph from the selection to its output runs on made-up activations,
as traced and rewritten: with S = K no bit differs, and with S = 1 the rewritten graph returns what the original
makes of merged ids and weights, or of the new ids where duplicates are not merged.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from ..gate import Evidence, Gate, Skip, SkipReason, Use
from ..graph import nodes
from ..graph.run_part import ValueOf, copied, plain_number
from ..reroute_dispatch import Rewrite, RoutingSettings, reroute_dispatch

_Picked = namedtuple("_Picked", ("values", "indices"))
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2
MERGED = "what the traced code makes of merged ids and weights; code outside the graph was not run"
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError)
_REARRANGING = nodes.VALUE_PRESERVING | {"transpose", "permute", "repeat_interleave", "repeat", "index"}


def verify_outside(gate: Gate, module: GraphModule | None, value_of: ValueOf) -> str | Skip:
    """What is shown of a gate whose ids leave its graph, in words, or the refusal where it is wrong."""
    if module is None:
        return _unproven(gate, "its graph has no module")
    copy, twin = _copied_graph(module, gate)
    similarity = _leading_input(copy.graph)
    done = reroute_dispatch(twin, similarity, RoutingSettings(1))
    if isinstance(done, Skip):
        return replace(done, node=gate.selection)
    try:
        return _compare(gate, module, twin, copy, done, similarity, value_of)
    except _FAILURES as error:
        return _unproven(gate, f"it could not be run: {type(error).__name__}: {str(error).splitlines()[0][:120]}")


def _unproven(gate: Gate, detail: str) -> Skip:
    return Skip(SkipReason.UNVERIFIED, gate.selection, detail, evidence=Evidence.EXPERTS)


@dataclass(frozen=True)
class _Twins:
    """A gate as traced and as rewritten, with what both are run on and where they are compared."""

    gate: Gate
    done: Rewrite
    original: _Part
    rewritten: _Part
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
) -> str | Skip:
    drawn: dict[str, Any] = {}
    names = {node.name: node for node in module.graph.nodes}
    twins = {node.name: node for node in copy.graph.nodes}
    start = _choice(gate)
    matrix = torch.rand(gate.num_experts, gate.num_experts, generator=torch.Generator().manual_seed(1))
    matrix = matrix.to(_device(gate))
    both = _Twins(
        gate,
        done,
        original=_Part(module, gate.selection, value_of, drawn),
        rewritten=_Part(copy, twin.selection, lambda node: value_of(names[node.name]), drawn),
        outputs=_returned(gate),
        wanted=_returned(twin),
        start=start,
        given={twins[node.name]: value for node, value in start.items()} | {similarity: matrix},
        matrix=matrix,
    )
    if not _all_equal(both.run(), both.run_rewritten(gate.top_k)):
        return _unproven(gate, "with S = K it differs from the original")
    return _prove_wiring(both)


def _prove_wiring(both: _Twins) -> str | Skip:
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
    if weights is None:
        return "what the traced code makes of the new ids; code outside the graph was not run"
    return MERGED


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
    return bool(((got - wanted).abs() <= _TOLERANCE.get(weights.dtype, _HALF_TOLERANCE) * wanted.abs().max()).all())


def _all_equal(left: list[Any], right: list[Any]) -> bool:
    return all(_equal(a, b) for a, b in zip(left, right, strict=True))


def _routing_node(done: Rewrite) -> Node:
    source = nodes.operand(done.new_ids) if done.merged else done.new_ids
    assert source is not None
    return source


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
    behind = _Part(gate.selection.graph.owning_module, gate.selection, lambda _: None, {})._behind  # type: ignore[arg-type]
    return [node for node in ends if node in behind]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    return type(a) is type(b) and a == b


def _leading_input(graph: Graph) -> Node:
    with graph.inserting_before(next(iter(graph.nodes))):
        return graph.placeholder("sere_verified_similarity")


def _copied_graph(module: GraphModule, gate: Gate) -> tuple[GraphModule, Gate]:
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


class _Part:
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
                values[node] = copied(given[node]) if node in given else self._compute(node, values)
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
            return copied(self._drawn[node.name]) if nodes.writers(node) else self._drawn[node.name]
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


def _closure(start: Node) -> set[Node]:
    found, pending = {start}, [start]
    while pending:
        fresh = [node for node in nodes.followers(pending.pop()) if node not in found]
        found.update(fresh)
        pending.extend(fresh)
    return found


def _in_order(graph: Graph, needed: set[Node]) -> list[Node]:
    return [node for node in graph.nodes if node in needed]
