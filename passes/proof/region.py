"""Cut out of a graph what a proof runs: from a router's logits and hidden states to where its tokens come together.

    hidden ──> router ──> logits ──> selection ──> ids, weights ──> dispatch ──> exit       the end that experts change
       └────────────────────────────────────────────────┴──> what else reads what a rewrite changes: further ends

The cut is a graph of its own. Its inputs are made up (logits, hidden states, other activations) or
are the model's state; between them everything is computed, also what is computed of the state
alone. Whatever a rewrite can change and the graph reads elsewhere than on the way to the exit is an
end as well.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from ..evidence.router import trace_router
from ..evidence.routing_weights import outer_consumers
from ..gate import Evidence, Gate, Skip, SkipReason, Use
from ..graph import nodes
from ..graph.arguments import update_argument
from ..graph.run_part import ValueOf, plain_number
from ..graph.state import computed_of_state
from ..graph.walk import walk
from .ends import Ends, find_ends

_PRODUCTS = frozenset({"linear", "matmul", "bmm", "addmm", "baddbmm", "einsum", "grouped_mm", "embedding", "cdist"})
_PRODUCTS |= {"scaled_dot_product_attention", "conv1d", "conv2d", "convolution"}
_VMAP = frozenset({"_add_batch_dim", "_remove_batch_dim"})  # its examples cannot be made up apart
_REARRANGING = nodes.VALUE_PRESERVING | {"transpose", "permute", "repeat_interleave", "repeat", "index"}
_LOOKS_UP = frozenset({"index", "embedding", "gather", "take_along_dim"})
_NEAR = 48  # nodes between the hidden states of a layer and what its router and its experts read


@dataclass(frozen=True)
class Leaf:
    """An input of a region.

    Attributes:
        kind: "logits" and "hidden" (what the router gives and what it and the experts read), "activation", "state" (a
            parameter, buffer or constant of the model), or "number" (a size).
        source: the node of the traced graph that it stands for.
        held: what the model holds there, or None where only a call knows.
    """

    kind: str
    source: Node
    held: Any


@dataclass(frozen=True)
class Region:
    """A gate's dispatch as a graph of its own.

    Attributes:
        graph: its output is the tuple of the ends, the exit first.
        gate: the gate in this graph.
        leaves: its placeholders.
        readers: the consumers of the routing weights in this graph.
        originals: nodes of this graph to those of the traced one.
        written: ends that are not read but written: state of the model, as it is left behind.
    """

    graph: Graph
    gate: Gate
    leaves: dict[Node, Leaf]
    readers: tuple[Node, ...]
    originals: dict[Node, Node]
    written: tuple[Node, ...]

    @property
    def ends(self) -> tuple[Node, ...]:
        """The nodes that a rewrite must get right, the exit first."""
        return tuple(self.graph.output_node().all_input_nodes)


def stand_in(read: Any) -> Any:
    """What a reader beyond the region's end reads."""
    return read


def ends_of(gate: Gate) -> Ends | Skip:
    """What a proof of a gate compares, or why its dispatch does not end in its graph."""
    found = _trace(gate)
    return found if isinstance(found, Skip) else found[2]


def _trace(gate: Gate) -> tuple[tuple[Node, ...], Node, Ends] | Skip:
    """The readers of a gate's weights, what its router projects, and its ends."""
    scores = nodes.operand(gate.selection)
    columns = nodes.last_size(scores) if scores is not None else None
    router = trace_router(scores, columns) if scores is not None and columns is not None else None
    if router is None or isinstance(router, Skip):
        return Skip(SkipReason.UNVERIFIED, gate.selection, "its router could not be traced", evidence=Evidence.EXPERTS)
    readers = () if gate.weights is None else tuple(outer_consumers(gate.weights, gate.ids))
    ends = find_ends(gate, readers, router.projection)
    if ends is None and not nodes.is_model_state(gate.router_weight):
        return router_of_the_call(gate)
    if ends is None:
        detail = "no tensor with one row per token gathers what its experts give"
        return Skip(SkipReason.UNVERIFIED, gate.selection, detail, evidence=Evidence.EXPERTS)
    return readers, router.projection, ends


def router_of_the_call(gate: Gate) -> Skip:
    """The refusal of a gate whose router's weight comes with each call."""
    detail = (
        f"{gate.router_weight.name} is an argument of the call, and no parameter or buffer of the model: what "
        f"belongs to experts cannot be told of such. Pass nn.Parameter to what torch.compile compiles, or compile or "
        "trace a module that holds them"
    )
    return Skip(SkipReason.UNVERIFIED, gate.selection, detail, evidence=Evidence.EXPERTS)


def cut_region(gate: Gate, value_of: ValueOf) -> Region | Skip:
    """The region of a gate whose dispatch is in the graph, or why there is none."""
    found = _trace(gate)
    if isinstance(found, Skip):
        return found
    readers, projection, ends = found
    region = _Cutter(gate, readers, ends, projection, value_of).cut()
    mapping = next((node for node in region.graph.nodes if nodes.kind(node) in _VMAP), None)
    if mapping is not None:
        detail = f"{region.originals[mapping].name}: a part of what torch.func.vmap does cannot be run by itself"
        return Skip(SkipReason.UNVERIFIED, gate.selection, detail, evidence=Evidence.EXPERTS)
    counted = next(filter(None, (size_by_data(leaf.source) for leaf in region.leaves.values())), None)
    if counted is not None:
        return Skip(SkipReason.UNVERIFIED, gate.selection, counted, evidence=Evidence.EXPERTS)
    return region


def size_by_data(node: Node) -> str | None:
    """Why nothing can be made up for a tensor whose shape is known only once numbers are computed, as of `x[mask]`."""
    sizes = getattr(nodes.value(node), "shape", ())  # `nodes.shape` has expressions, which know of no call
    if all(plain_number(size) is not None for size in sizes):
        return None
    shape = f"{list(nodes.shape(node) or ())} of {node.name}"
    return f"the numbers in a call tell the shape {shape}, so that none can be made up: end the graph ahead of it"


class _Cutter:
    """Copies what the ends need into a graph of its own."""

    def __init__(self, gate: Gate, readers: tuple[Node, ...], ends: Ends, projection: Node, value_of: ValueOf) -> None:
        self._gate, self._readers, self._ends = gate, readers, ends
        self._projection, self._value_of = projection, value_of
        self._root = hidden_root(gate.router_input)
        self._behind = _closure({projection, *_readers_of(self._root, projection)}, ends.last) | {self._root}
        self._of_state: dict[Node, bool] = {}

    def cut(self) -> Region:
        """The region."""
        graph = Graph()
        mapped: dict[Node, Node] = {}
        leaves: dict[Node, Leaf] = {}
        attributes: dict[Any, Node] = {}  # make_fx reads an attribute anew for each use
        for node in self._in_order():
            leaf = self._leaf(node)
            if leaf is None:
                mapped[node] = graph.node_copy(node, mapped.__getitem__)
            elif node.op == "get_attr" and node.target in attributes:
                mapped[node] = attributes[node.target]
            else:
                mapped[node] = graph.placeholder(node.name)
                mapped[node].meta = _described(node, leaf)
                leaves[mapped[node]] = leaf
                if node.op == "get_attr":
                    attributes[node.target] = mapped[node]
        consumers = self._outside(graph, mapped)
        ends = [mapped[node] for node in (self._ends.exit, *self._ends.sides)]
        graph.output((*ends, *(node for found in consumers.values() for node in found)))
        gate = self._moved(mapped, consumers)
        if not gate.is_sorted:
            update_argument(gate.selection, 4, "sorted", True)  # an order that the program may get as well as any other
        readers = tuple(
            new for node in self._readers for new in self._copies(node, self._gate.weights, mapped, consumers)
        )
        originals = {new: old for old, new in mapped.items()}
        originals |= {new: reader for (reader, _), found in consumers.items() for new in found}
        written = tuple(mapped[node] for node in self._ends.written if node in mapped)
        return Region(graph, gate, leaves, readers, originals, written)

    def _in_order(self) -> list[Node]:
        """What the region is made of, each input where it is first read: equal layers have equal regions."""
        needed = self._needed()
        ordered: dict[Node, None] = {}
        for node in sorted(needed):
            if self._leaf(node) is None:
                ordered.update(dict.fromkeys(source for source in node.all_input_nodes if source in needed))
                ordered[node] = None
        return list(ordered | dict.fromkeys(sorted(needed)))

    def _outside(self, graph: Graph, mapped: dict[Node, Node]) -> dict[tuple[Node, Node], list[Node]]:
        """Stand-ins for consumers that are not part of the region, such as the graph's output."""
        found: dict[tuple[Node, Node], list[Node]] = {}
        pairs = [(use.consumer, use.read) for use in self._gate.dispatch_uses]
        pairs += [(reader, self._gate.weights) for reader in self._readers if self._gate.weights is not None]
        for consumer, read in dict.fromkeys(pairs):
            if consumer not in mapped and read in mapped:
                node = graph.call_function(stand_in, (mapped[read],))
                node.meta = dict(mapped[read].meta)
                found[consumer, read] = [node]
        return found

    def _copies(
        self, consumer: Node, read: Node | None, mapped: dict[Node, Node], outside: dict[tuple[Node, Node], list[Node]]
    ) -> list[Node]:
        return [mapped[consumer]] if consumer in mapped else outside.get((consumer, read), [])  # type: ignore[arg-type]

    def _moved(self, mapped: dict[Node, Node], outside: dict[tuple[Node, Node], list[Node]]) -> Gate:
        gate = self._gate
        uses = [
            Use(consumer, mapped[use.read], use.kind)
            for use in gate.uses
            if use.read in mapped
            for consumer in self._copies(use.consumer, use.read, mapped, outside)
        ]
        return replace(
            gate,
            selection=mapped[gate.selection],
            ids=mapped[gate.ids],
            values=None if gate.values is None else mapped.get(gate.values),
            router_weight=mapped[self._projection],
            router_input=mapped[self._projection],
            uses=tuple(uses),
            weights=None if gate.weights is None else mapped[gate.weights],
            all_ids=tuple(mapped[node] for node in gate.all_ids),
        )

    def _needed(self) -> set[Node]:
        gate, last = self._gate, self._ends.last
        pending = [self._projection, gate.selection, *gate.all_ids, *self._ends.sides, self._ends.exit]
        pending += [] if gate.weights is None else [gate.weights]
        pending += [use.read for use in gate.uses]
        pending += [use.consumer for use in gate.dispatch_uses if use.consumer < last]
        needed: set[Node] = set()
        while pending:
            node = pending.pop()
            if node in needed:
                continue
            needed.add(node)
            leaf = self._leaf(node)
            # A write that depends on what is made up has to happen; one that does not is part of a made-up value.
            made_up = leaf is not None and leaf.kind != "state"
            pending += [w for w in nodes.writers(node) if not last < w and (w in self._behind or not made_up)]
            if leaf is None:
                pending += node.all_input_nodes
        return needed

    def _leaf(self, node: Node) -> Leaf | None:
        """What the node is as an input of the region, or None where it is computed."""
        if node is self._projection:
            return Leaf("logits", node, None)
        if node is self._root:
            return Leaf("hidden", node, None)
        if (root := distributed_state(node)) is not None:
            return Leaf("state", node, _local(_held(self._value_of(root))))
        if node.op == "placeholder" or (node.op == "get_attr" and nodes.is_tensor(node)):
            if not nodes.is_tensor(node):
                return Leaf("number", node, self._value_of(node))
            held = _held(self._value_of(node))
            state = node.op == "get_attr" or nodes.is_model_state(node)
            return Leaf("state" if state else "activation", node, held)
        if node in self._behind or node.op == "get_attr" or not nodes.is_floating(node) or self._is_state(node):
            return None
        if nodes.kind(node) in _REARRANGING:  # slots of one token hold the same row
            return None
        numbers = any(nodes.reads_numbers(node, source) for source in nodes.operands(node))
        return Leaf("activation", node, None) if numbers and not whole_numbers_alone(node) else None

    def _is_state(self, node: Node) -> bool:
        """Whether a tensor is computed of the model's state alone, such as a part of stacked weights."""
        if node not in self._of_state:
            self._of_state[node] = computed_of_state(node)
        return self._of_state[node]


def whole_numbers_alone(node: Node, steps: int = 16) -> bool:
    """Whether floating-point numbers are computed of masks and the like alone: `(1 - mask.float()) * -1e9`."""
    if steps == 0 or node.op not in ("call_function", "call_method") or nodes.kind(node) in _LOOKS_UP:
        return False
    sources = [source for source in nodes.operands(node) if nodes.reads_numbers(node, source)]
    told = [source for source in sources if not nodes.is_floating(source)]
    others = [s for s in sources if nodes.is_floating(s) and not (nodes.is_model_state(s) and nodes.count(s) == 1)]
    return bool(told or others) and all(whole_numbers_alone(source, steps - 1) for source in others)


def distributed_state(node: Node) -> Node | None:
    """The parameter of which a node is this rank's part: a proof makes up parts, not the whole."""
    whole = nodes.operand(node) if nodes.kind(node) == "to_local" else None
    return whole if whole is not None and nodes.is_model_state(whole) else None


def _local(held: Any) -> Any:
    return held.to_local() if hasattr(held, "to_local") else held


def hidden_root(read: Node) -> Node:
    """The hidden states of the layer: what the router's input is a norm, cast or view of.

    Everything that the router and the experts read of them is then computed, and not made up apart.
    """
    root, frontier = read, [read]
    for _ in range(_NEAR):
        if len(frontier) == 1:
            root = frontier[0]
        node = max(frontier)
        if node.op not in ("call_function", "call_method") or nodes.kind(node) in _PRODUCTS | _VMAP:
            break
        if not nodes.is_tensor(node) and nodes.kind(node) != "item":
            break
        sources = [s for s in node.all_input_nodes if nodes.is_floating(s) and nodes.reads_numbers(node, s)]
        sources = [s for s in sources if not computed_of_state(s)]
        if not sources:
            break
        frontier.remove(node)
        frontier += [source for source in sources if source not in frontier]
    return root


def _readers_of(root: Node, projection: Node) -> list[Node]:
    """What follows the hidden states once they are complete: writes that make them what the router reads are no part.

    `y = zeros_like(x); y[tokens] += ..; router(y)`: the sum of the experts of the layer before.
    """
    writers = nodes.writers(root)
    if not writers:
        return nodes.followers(root)
    between = set(walk([projection], lambda node: [source for source in node.all_input_nodes if root < source]))
    first = min((user for user in root.users if user in between), default=projection)
    complete = max((writer for writer in writers if writer < first), default=root)
    return [follower for follower in nodes.followers(root) if complete < follower]


def _closure(starts: set[Node], last: Node) -> set[Node]:
    """Everything computed from `starts`, themselves included, up to `last`."""
    found, ahead = set(starts), list(starts)
    heapq.heapify(ahead)
    while ahead:
        for follower in nodes.followers(heapq.heappop(ahead)):
            if follower not in found and not last < follower and follower.op != "output":
                found.add(follower)
                heapq.heappush(ahead, follower)
    return found


def _held(value: Any) -> Any:
    return None if isinstance(value, torch._subclasses.FakeTensor) else value


def _described(node: Node, leaf: Leaf) -> dict[str, Any]:
    meta = dict(node.meta)
    if node.op == "get_attr":  # its shape is that of what the module holds
        meta["example_value"] = nodes.value(node)
    return meta
