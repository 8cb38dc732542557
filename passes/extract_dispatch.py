"""Cut the dispatch of a gate out of its graph, as a function of (hidden, ids, weights).

The region runs from the router's hidden states, the ids and the routing weights to the
post-dominator of the ids and weights that has one row per token: the first node that every path
from them passes through and that no longer has one row per slot. Running it with chosen ids and
weights (counterfactual routing) shows what each expert computes for the same tokens, without any
knowledge of the model's code.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from .evidence.expert_evidence import runs_experts
from .evidence.routing_weights import outer_consumers
from .gate import Gate, Skip, SkipReason, UseKind
from .graph import nodes
from .graph.state import computed_of_state
from .graph.walk import walk

_REARRANGING = nodes.VALUE_PRESERVING | {"transpose", "permute", "repeat_interleave", "repeat"}


@dataclass(frozen=True)
class DispatchRegion:
    """The dispatch of one gate as a module of its own.

    Attributes:
        module: takes ids, weights, then `inputs`, then `activations`, in this order.
        inputs: graph inputs and attributes (expert weights, sizes) that the region reads, and free sizes
            of graph inputs, as nodes of the graph.
        activations: other tensors it reads; their rows are tokens, or slots in token-major order.
        ids, weights: the nodes of the graph whose place the arguments take.
        output: the node of the graph that the region computes.
        inside: the nodes of the graph that the region consists of, `output` among them, in graph
            order.
    """

    module: GraphModule
    inputs: tuple[Node, ...]
    activations: tuple[Node, ...]
    ids: Node
    weights: Node
    output: Node
    inside: tuple[Node, ...]


def extract_dispatch(gate: Gate) -> DispatchRegion | Skip:
    """The gate's dispatch region, or why it cannot be cut out."""
    if gate.weights is None:
        return Skip(SkipReason.WEIGHTS_UNKNOWN, gate.ids, str(gate.weights_skip))
    inside = [use.consumer for use in gate.dispatch_uses if use.kind is not UseKind.LEAVES]
    if not inside:
        return Skip(SkipReason.DISPATCH_OUTSIDE, gate.ids, nodes.place(gate.ids))
    exit_node = find_exit(gate)
    if exit_node is None:
        return Skip(SkipReason.NO_EXIT, gate.ids, f"its dispatch: {gate.dispatch}")
    needed = _needed(exit_node, gate, _closure(_starts(gate), exit_node))
    return needed if isinstance(needed, Skip) else _build(gate, exit_node, needed)


def find_exit(gate: Gate) -> Node | None:
    """The first node with one row per token on every path from the dispatched ids and weights."""
    if gate.weights is None or all(use.kind is UseKind.LEAVES for use in gate.dispatch_uses):
        return None
    starts = _starts(gate)
    # In graph order, so that the search ends at the exit: the rest of a deep model is never walked.
    ahead, seen = list(dict.fromkeys(starts)), set(starts)
    heapq.heapify(ahead)
    while ahead:
        node = heapq.heappop(ahead)
        if not ahead and _one_row_per_token(node, gate.ids) and runs_experts(node, (gate.weights, *gate.all_ids)):
            return node
        for follower in nodes.followers(node):
            if follower not in seen:
                seen.add(follower)
                heapq.heappush(ahead, follower)
    return None


def _starts(gate: Gate) -> list[Node]:
    weights = [] if gate.weights is None else outer_consumers(gate.weights, gate.ids)
    return [use.consumer for use in gate.dispatch_uses] + weights


def _closure(starts: list[Node], last: Node) -> set[Node]:
    """Everything computed from `starts`, themselves included, up to `last`."""
    return set(walk(starts, lambda node: [user for user in nodes.followers(node) if not last < user]))


def _one_row_per_token(node: Node, ids: Node) -> bool:
    rows, tokens = nodes.shape(node), nodes.shape(ids)
    if rows is None or tokens is None or not nodes.is_floating(node):
        return False
    return len(rows) == len(tokens) and all(str(a) == str(b) for a, b in zip(rows[:-1], tokens[:-1], strict=True))


def _needed(exit_node: Node, gate: Gate, behind: set[Node]) -> dict[Node, str] | Skip:
    """Every node the region reads, with its role: "inside", "input" or "activation"."""
    roles: dict[Node, str] = {}
    hidden = nodes.behind(gate.router_input, _REARRANGING)
    # Experts that run for every token do not wait for the ids; they belong to the dispatch all the
    # same.
    behind = behind | _closure([hidden], exit_node) - {hidden}
    pending = [exit_node]
    while pending:
        node = pending.pop()
        if node in roles or node is gate.weights or node in gate.all_ids:
            continue
        roles[node] = _role(node, gate, behind)
        if roles[node] == "inside":
            pending.extend(node.all_input_nodes)
            # In-place writes have no users; without them the region would read unwritten memory.
            pending.extend(writer for writer in nodes.writers(node) if writer < exit_node)
    for node, role in roles.items():
        if role == "activation" and not nodes.is_floating(node):
            return Skip(SkipReason.READS_OTHERS, node, f"{node.name}, which is not floating-point")
    return roles


def _role(node: Node, gate: Gate, behind: set[Node]) -> str:
    if _is_size_of_input(node):
        return "input"
    if node.op in ("placeholder", "get_attr"):
        return "activation" if _varies_by_token(node, gate.ids) else "input"
    # What repeats or reshapes rows belongs to the dispatch; the rows themselves come from outside.
    rearranges = nodes.kind(node) in _REARRANGING
    if node in behind or rearranges or not nodes.is_tensor(node) or not any(map(nodes.is_tensor, node.all_input_nodes)):
        return "inside"
    # Parts and sums of parameters are computed: made up they would be other experts' weights.
    return "inside" if computed_of_state(node) else "activation"


def _is_size_of_input(node: Node) -> bool:
    """Whether a node reads a free size off an input of the graph that is no weight, such as tokens or a cache."""
    source = nodes.operand(node)
    if source is None or source.op != "placeholder" or not nodes.is_tensor(source) or nodes.is_model_state(source):
        return False
    return isinstance(nodes.value(node), torch.SymInt)


def _varies_by_token(node: Node, ids: Node) -> bool:
    """Whether a graph input is an activation with rows for tokens, not a parameter, buffer or size."""
    if nodes.is_model_state(node) or not nodes.is_tensor(node) or not nodes.is_floating(node):
        return False
    return nodes.leading_count(node) == nodes.leading_count(ids)


def _build(gate: Gate, exit_node: Node, roles: Mapping[Node, str]) -> DispatchRegion:
    graph = Graph()
    assert gate.weights is not None
    inputs = tuple(sorted(node for node, role in roles.items() if role == "input"))
    activations = tuple(sorted(node for node, role in roles.items() if role == "activation"))
    mapped = {n: graph.placeholder(f"arg_{n.name}") for n in (gate.ids, gate.weights, *inputs, *activations)}
    mapped.update(dict.fromkeys(gate.all_ids, mapped[gate.ids]))
    inside = tuple(sorted(node for node, role in roles.items() if role == "inside"))
    for node in inside:
        mapped[node] = graph.node_copy(node, mapped.__getitem__)
    graph.output(mapped[exit_node])
    module = GraphModule(torch.nn.Module(), graph)
    return DispatchRegion(module, inputs, activations, gate.ids, gate.weights, exit_node, inside)
