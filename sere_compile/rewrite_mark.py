"""A mark on the gates of a traced graph that `rewrite` has seen: where S = K nothing else tells that it was there.

It is part of the nodes' metadata of which torch keeps a copy in decompositions and in files of torch.export.
"""

from __future__ import annotations

from torch.fx import GraphModule

from .passes import Gate

_OF_USERS, _OURS = "custom", "sere_rerouted"


def mark_as_seen(gate: Gate, rerouted: bool) -> None:
    """Mark a gate. A decomposition makes `getitem` nodes anew, with what the selection before them has."""
    for node in (gate.ids, *gate.ids.all_input_nodes):
        node.meta[_OF_USERS] = {**node.meta.get(_OF_USERS, {}), _OURS: rerouted}


def marks(module: GraphModule) -> set[bool]:
    """Whether gates of the graph are re-routed, of those that were seen."""
    found = (node.meta.get(_OF_USERS, {}).get(_OURS) for node in module.graph.nodes)
    return {rerouted for rerouted in found if rerouted is not None}
