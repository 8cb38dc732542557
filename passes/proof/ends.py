"""Where a gate's tokens come together, and what else reads what a rewrite of the gate can change."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..evidence.expert_evidence import runs_experts
from ..gate import Gate
from ..graph import nodes
from ..graph.state import computed_of_state

_FAR = 400  # nodes of side branches that are searched for experts
_STEPS = 12  # from an operand back to a matrix of the model


@dataclass(frozen=True)
class Ends:
    """What a proof compares.

    Attributes:
        exit: the first node with one row per token behind which no expert's output is still on its way; or memory with
            one row per token that experts add to, where what is read is that memory itself.
        sides: nodes that a rewrite can change and that are read elsewhere.
        written: graph inputs and attributes among these: state that the dispatch leaves changed.
        last: the last of all in graph order.
        complete: the node with which the exit is complete.
        inside: what the ids and weights lead to on the way there, without it.
    """

    exit: Node
    sides: tuple[Node, ...]
    written: tuple[Node, ...]
    last: Node
    complete: Node
    inside: frozenset[Node]


def find_ends(gate: Gate, readers: tuple[Node, ...], projection: Node) -> Ends | None:
    """The ends of a gate's dispatch, or None where its tokens do not come together in this graph.

    Args:
        gate: found, not yet rewritten.
        readers: the consumers of its routing weights.
        projection: the router's projection.
    """
    # Uses that keep the ids as well: what they look up may be an expert's, and must not join behind the exit.
    starts = {use.consumer for use in gate.uses} | set(readers)
    search = _Search(gate, projection)
    complete, visited = search.run({n for n in starts if n.op != "output"})
    if complete is None:
        return None
    exit_node = search.memory or complete
    sides, written = [], []
    for node in sorted(visited):
        outside = [user for user in nodes.followers(node) if complete < user and nodes.reads_numbers(user, node)]
        if outside and (nodes.is_tensor(node) or _is_returned_number(node)) and _root_of(node) is not search.memory:
            sides.append(node)
    # The exit's writes, too: an operator that is the whole dispatch may count as well.
    for node in sorted(visited | {complete}):
        for target in map(_state_of, nodes.writes(node)):
            if target.op in ("placeholder", "get_attr") and target not in written:
                written.append(target)
    last = max([complete, *sides])
    sides = list(dict.fromkeys([*sides, *written]))
    return Ends(exit_node, tuple(sides), tuple(written), last, complete, frozenset(visited - {complete}))


def _is_returned_number(node: Node) -> bool:
    """Whether a graph returns a number, as a count of an expert's tokens is; elsewhere it is the size of something."""
    number = isinstance(nodes.value(node), (int, float, torch.SymInt, torch.SymFloat))
    return number and any(user.op == "output" for user in node.users)


class _Search:
    """The search for the exit of one gate."""

    def __init__(self, gate: Gate, projection: Node) -> None:
        self._gate, self._projection = gate, projection
        self._routing = gate.weights, *gate.all_ids
        self._router = {gate.router_weight, *_same_attribute(gate.router_weight)}
        per_expert = {gate.num_experts, nodes.last_size(projection), gate.top_k}
        self._of_router = {1, *per_expert}  # how many numbers state has that shapes or scales the router's scores
        self.memory: Node | None = None  # what the found node wrote, where the exit is memory

    def run(self, starts: set[Node]) -> tuple[Node | None, set[Node]]:
        """The node with which the exit is complete, and every node from the starts up to it."""
        # In graph order, so that the search ends at the exit: the rest of a deep model is never walked.
        ahead, seen = list(starts), set(starts)
        visited: set[Node] = set()
        carrying: set[Node] = set()  # made of the experts' parameters, as far as that can be seen
        heapq.heapify(ahead)
        while ahead:
            node = heapq.heappop(ahead)
            # All inputs: experts may be in a graph of their own, whose results come as a tuple.
            read = nodes.numbers_behind(node)
            carries = any(s in carrying or (s not in visited and self._is_weighed(s)) for s in read)
            gathers = carries and _one_row_a_token(node, self._gate.ids) and runs_experts(node, self._routing)
            if gathers and not self._is_joined_later(node, ahead, starts, carrying):
                return node, visited
            if carries and self._completes_memory(node, ahead, starts, carrying):
                return node, visited | {node}
            visited.add(node)
            if carries:
                carrying.add(node)
                # Also what a part of is written: `torch.mm(rows, w[0], out=buffer.split(sizes)[0])`.
                carrying.update(base for target in nodes.writes(node) for base in nodes.bases(target))
            for follower in nodes.followers(node):
                if follower not in seen and follower.op != "output":
                    seen.add(follower)
                    heapq.heappush(ahead, follower)
        return None, visited

    def _completes_memory(self, node: Node, ahead: list[Node], starts: set[Node], carrying: set[Node]) -> bool:
        """Whether a node is the last to add what experts give to memory with one row per token, which is then read."""
        memory = next((_root_of(written) for written in nodes.writes(node)), None)
        if memory is None or memory.op != "call_function" or max(nodes.writers(memory)) is not node:
            return False
        if not _one_row_a_token(memory, self._gate.ids) or not runs_experts(node, self._routing):
            return False
        # What reads the memory from here on reads the exit.
        beside = [branch for branch in ahead if all(_root_of(s) is not memory for s in branch.all_input_nodes)]
        if self._is_joined_later(node, beside, starts, carrying):
            return False
        self.memory = memory
        return True

    def _is_joined_later(self, node: Node, ahead: list[Node], starts: set[Node], carrying: set[Node]) -> bool:
        """Whether what an expert gives is still on its way beside a node."""
        if any(source in carrying for branch in ahead for source in branch.all_input_nodes):
            return True
        if any(branch in starts and _looks_up_state(branch) for branch in ahead):
            return True
        return self._meet_experts(ahead, node)

    def _meet_experts(self, branches: list[Node], exit_node: Node) -> bool:
        """Whether a branch beside the exit meets parameters of the model before it meets what comes of the exit."""
        behind, ahead, seen = {exit_node}, [exit_node, *branches], {exit_node, *branches}
        heapq.heapify(ahead)
        for _ in range(_FAR):
            if all(node in behind for node in ahead):
                return False
            node = heapq.heappop(ahead)
            if node not in behind:
                if any(source in behind for source in node.all_input_nodes):
                    behind.add(node)
                elif any(self._is_weighed(source) for source in nodes.operands(node)):
                    return True
            for follower in nodes.followers(node):
                if node in behind:
                    behind.add(follower)
                if follower not in seen and follower.op != "output":
                    seen.add(follower)
                    heapq.heappush(ahead, follower)
        return False

    def _is_weighed(self, operand: Node) -> bool:
        """Whether a tensor is a parameter other than the router's, or was made with one a few steps ago."""
        pending, seen = [(operand, 0)], {operand}
        while pending:
            node, steps = pending.pop()
            if node is self._projection or node in self._router or not (nodes.is_floating(node) or _is_packed(node)):
                continue
            if nodes.is_model_state(node) and nodes.count(node) not in self._of_router:
                return not nodes.writers(node)  # a buffer that is written is no parameter
            if steps < _STEPS:
                fresh = [source for source in nodes.operands(node) if source not in seen]
                seen.update(fresh)
                pending += [(source, steps + 1) for source in fresh]
        return False


def _same_attribute(weight: Node) -> list[Node]:
    """Further nodes that read the same attribute: make_fx reads it anew for each use."""
    if weight.op != "get_attr":
        return []
    return list(weight.graph.find_nodes(op="get_attr", target=weight.target))


def _is_packed(node: Node) -> bool:
    """Whether whole numbers are a quantised matrix of the model."""
    return nodes.is_model_state(node) and nodes.is_tensor(node) and len(nodes.shape(node) or ()) >= 2


def _looks_up_state(node: Node) -> bool:
    if nodes.kind(node) not in ("index", "embedding", "gather"):
        return False
    return any(nodes.is_floating(source) and computed_of_state(source) for source in nodes.operands(node))


def _one_row_a_token(node: Node, ids: Node) -> bool:
    rows, tokens = nodes.shape(node) or (), nodes.shape(ids)
    if tokens is None or not nodes.is_floating(node) or len(rows) < 2:
        return False
    if len(rows) == len(tokens) and all(str(a) == str(b) for a, b in zip(rows[:-1], tokens[:-1], strict=True)):
        return True
    return len(rows) != len(tokens) and str(nodes.leading_count(node)) == str(nodes.leading_count(ids))


def _state_of(written: Node) -> Node:
    """The same through writes that return what they wrote: `table.zero_().scatter_(..)` writes the table."""
    root = _root_of(written)
    while earlier := nodes.writes(root):
        root = _root_of(earlier[0])
    return root


def _root_of(written: Node) -> Node:
    """What owns the memory that is written."""
    *_, root = nodes.bases(written)
    return root
