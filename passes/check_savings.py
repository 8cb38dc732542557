"""Tell a gate whose experts compute every token whatever the ids say: re-routing saves nothing.

    every = einsum("th,eoh->teo", hidden, experts)                          # [T, E, H], before anything is chosen
    out   = einsum("te,teo->to", zeros(T, E).scatter(1, ids, weights), every)     # or every[rows, ids] * weights

Such a gate is re-routed correctly, and costs what it cost before: all weights are read. A loop that adds one expert
after another has no such table; it is re-routed, as the experts that nobody chose are there to be left out by whoever
lowers it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from .evidence.expert_evidence import outputs_of_all
from .gate import Evidence, Gate, Skip, SkipReason
from .graph import nodes
from .graph.state import computed_of_state
from .graph.walk import walk
from .proof.region import ends_of


def check_savings(gate: Gate, experts: Iterable[Node]) -> Skip | None:
    """Why re-routing a gate saves nothing, or None. The graph is not changed.

    Args:
        gate: proven, not yet re-routed.
        experts: the nodes that hold its experts' parameters, as proven; none where they are outside the graph.
    """
    ends = ends_of(gate)
    parameters = _of_state_alone(experts)
    if isinstance(ends, Skip) or not parameters:
        return None
    exit_node = ends.exit
    chosen = set(walk(gate.all_ids, lambda node: [user for user in nodes.followers(node) if not exit_node < user]))
    read = {source for node in chosen for source in nodes.operands(node)} - chosen
    if read & parameters:
        return None
    table = next((node for node in sorted(read) if outputs_of_all(node, gate.num_experts)), None)
    if table is None:
        return None
    return Skip(SkipReason.DENSE, gate.selection, nodes.place(table), evidence=Evidence.EXPERTS)


def _of_state_alone(experts: Iterable[Node]) -> set[Node]:
    """Parameters, and what is computed of them and other state of the model alone, such as their views."""
    return set(walk(experts, lambda node: [user for user in node.users if computed_of_state(user)]))
