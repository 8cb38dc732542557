"""What each node of a region depends on: the model's state, hidden states, the router's scores."""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType

from torch.fx import Node

from ..evidence.router import scales_random_numbers
from ..graph import nodes
from ..graph.walk import walk
from .region import Region

_CONTRACTS = frozenset({"linear", "matmul", "bmm", "addmm", "baddbmm", "einsum", "grouped_mm"})
_NOT_ONES_OWN = frozenset({"torch", "operator", "math", "sere_compile"})
_SUMS = frozenset({"sum", "mean", "einsum"})
_MOVES = nodes.VALUE_PRESERVING | {"transpose", "permute"}


@dataclass(frozen=True)
class Sources:
    """What the nodes of a region are computed of.

    Attributes:
        state: the parameters, buffers and constants that a node depends on.
        hidden: nodes that depend on hidden states or other activations otherwise than by the router's logits.
        scored: nodes that depend on the router's logits by floating-point numbers, not by ids alone.
        router: state that is the router's: scores are selected by it, or routing weights are scaled by it.
        weighed: nodes that depend on the router's logits in any way but by the ids that it chose.
    """

    state: dict[Node, frozenset[Node]]
    hidden: set[Node]
    scored: set[Node]
    router: set[Node]
    weighed: set[Node]


def trace_sources(region: Region) -> Sources:
    """Follow what is made up and what is held through a region."""
    state: dict[Node, frozenset[Node]] = {}
    hidden: set[Node] = set()
    scored: set[Node] = set()
    choosing = set(walk([region.gate.selection], lambda node: node.all_input_nodes))
    weighed: set[Node] = set()
    for node in region.graph.nodes:
        leaf = region.leaves.get(node)
        if leaf is not None:
            state[node] = frozenset([node]) if leaf.kind == "state" else frozenset()
            if leaf.kind in ("hidden", "activation"):
                hidden.add(node)
            elif leaf.kind == "logits":
                scored.add(node)
                weighed.add(node)
            continue
        read = nodes.numbers_behind(node)
        state[node] = frozenset().union(*(state[source] for source in read))
        is_hidden = any(source in hidden for source in read) and not _is_noise(node, region)
        is_scored = any(source in scored for source in read)
        is_scored = is_scored and (nodes.is_floating(node) or not nodes.is_tensor(node))
        # A mask or bias that scores meet before the choice is the router's, whoever gives it.
        is_hidden = is_hidden and not (is_scored and node in choosing)
        is_weighed = any(source in weighed for source in read) and node not in region.gate.all_ids
        for target in (node, *_written(node)):
            state[target] |= state[node]
            if is_hidden:
                hidden.add(target)
            if is_scored:
                scored.add(target)
            if is_weighed:
                weighed.add(target)
    return Sources(state, hidden, scored, _of_the_router(region, state, hidden, scored), weighed)


def _is_noise(node: Node, region: Region) -> bool:
    """Whether a node is noise of the scores: its size may come from hidden states, and it belongs to the router."""
    scores = nodes.operand(region.gate.selection)
    like_scores = scores is not None and nodes.last_size(node) == nodes.last_size(scores)
    return like_scores and scales_random_numbers(node)


def _written(node: Node) -> list[Node]:
    """Every node whose memory an in-place operation writes to, in its own name or another."""
    return [base for target in nodes.writes(node) for base in nodes.bases(target)]


def _of_the_router(
    region: Region, state: dict[Node, frozenset[Node]], hidden: set[Node], scored: set[Node]
) -> set[Node]:
    """State that shapes scores or scales routing weights, with one number per expert or one for all."""
    scores = nodes.operand(region.gate.selection)
    router = set(state[scores]) if scores is not None else set()
    counts = {1, region.gate.num_experts, nodes.last_size(region.gate.router_weight), region.gate.top_k}
    for node in scored - hidden:
        router |= {leaf for leaf in state[node] if nodes.count(leaf) in counts}
    return router


def experts_meet_hidden(region: Region, sources: Sources, experts: set[Node]) -> bool:
    """Whether a parameter of an expert is contracted with hidden states, as a product of matrices does.

    A value, key or prompt that is fetched by the ids and weighted, added or masked is not.
    """
    for node in region.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        operands = list(nodes.operands(node))
        own = [
            s for s in operands if sources.state[s] & experts and (s not in sources.hidden or _is_fetched(s, sources))
        ]
        if own and any(s in sources.hidden for s in operands) and _contracts(node, region):
            return True
    return False


def unseen_function(region: Region, sources: Sources, experts: set[Node]) -> Node | None:
    """A function of the user's own that reads parameters of experts: Dynamo was told to take it as it is."""
    for node in region.graph.nodes:
        function = node.target if node.op == "call_function" and isinstance(node.target, FunctionType) else None
        own = function is not None and function.__module__.partition(".")[0] not in _NOT_ONES_OWN
        if own and any(sources.state[source] & experts for source in nodes.operands(node)):
            return node
    return None


def _is_fetched(node: Node, sources: Sources) -> bool:
    """Whether a tensor holds rows of a table, of which hidden states had a say in the numbers only: `w[ids + kind]`."""
    read = nodes.behind(node, _MOVES)
    if nodes.kind(read) not in ("index", "embedding"):
        return False
    table = max(nodes.operands(read), key=nodes.is_floating)
    return nodes.is_floating(table) and table not in sources.hidden


def _contracts(node: Node, region: Region) -> bool:
    name = nodes.kind(node)
    if name in _CONTRACTS or "conv" in name or ("." in name and not name.startswith("sere.reroute")):
        return True
    return name == "mul" and any(_sums_features(user, region) for user in _moved(node))


def _moved(node: Node) -> list[Node]:
    """The readers of a tensor behind views of it."""
    found, pending = [], [node]
    while pending:
        for user in pending.pop().users:
            if nodes.kind(user) in _MOVES:
                pending.append(user)
            else:
                found.append(user)
    return found


def _sums_features(node: Node, region: Region) -> bool:
    """Whether a sum is not one over the slots of a token."""
    source = nodes.operand(node)
    sizes = nodes.shape(source) if source is not None else None
    if nodes.kind(node) not in _SUMS or sizes is None:
        return False
    dim = nodes.argument(node, 1, "dim")
    dims = {d % len(sizes) for d in (dim if isinstance(dim, (list, tuple)) else [dim]) if isinstance(d, int)}
    slots = len(nodes.shape(region.gate.ids) or ()) - 1
    return bool(dims) and dims != {slots}
