"""Make the dispatch of a gate use filled expert ids, and their weights, from the scores of all experts.

    values, ids = topk(scores, K)              values, ids = topk(scores, K)
    weights = values / sum(values)             weights = values / sum(values)
    y = experts(ids, weights)            ->    filled = sere.fill(ids, weights, scores, S, rho, A)
                                               y = experts(filled[0], filled[1])

Ids stay distinct within a token, so no dispatch needs merging. Logits are worth their softmax
(case 1). A bias for the selection alone, or a mask of groups: the selection's scores rank, those
that the weights are looked up in weigh (case 2). Zeros that masked_fill or where puts outside of a
token's groups are closed to it, like -inf (case 3). Behind `fuse_router` a second `sere.route`
fills (case 4), which `fuse_reroute` avoids where nobody else reads the ids.

A gate whose scores of all experts are not in the graph, or not one for each row of ids, is left
alone, with a reason.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument

from .. import ops as _ops  # noqa: F401  (registers torch.ops.sere)
from .evidence.gate_scores import gate_scores
from .gate import Evidence, Gate, Skip, SkipReason
from .graph import nodes
from .graph.aliases import aliases
from .graph.arguments import update_operator_argument
from .reroute_dispatch import Rewrite, RoutingSettings, describe, redirect_dispatch

# What puts a number where a mask says.
_MASKING = frozenset({"masked_fill", "where"})


def fill_dispatch(gate: Gate, settings: RoutingSettings, readers: Sequence[Node] | None = None) -> Rewrite | Skip:
    """Insert the filling operator behind a gate and point its dispatch uses and weights to it.

    Args:
        gate: a gate of a graph.
        settings: with 0 < S < K; identities are the caller's to leave out.
        readers: the consumers of the weights that see the new ones; all by default.

    Returns:
        What was done, or why nothing was changed.
    """
    if gate.weights is None:
        why = gate.weights_skip or Skip(SkipReason.NO_WEIGHTS, gate.ids, nodes.place(gate.ids))
        return replace(why, evidence=_LATE)  # it is a gate: what weighs its experts is not known
    weights, graph = gate.weights, gate.selection.graph
    if nodes.kind(gate.selection) == "sere.route":
        insert = lambda: _routed_again(graph, gate, weights, settings)  # noqa: E731
    else:
        found = _scores_beside(gate)
        if isinstance(found, Skip):
            return found
        insert = lambda: _filled(graph, gate, weights, found, settings)  # noqa: E731
    new_ids = redirect_dispatch(gate, insert, with_weights=True, readers=readers)
    return new_ids if isinstance(new_ids, Skip) else Rewrite(gate, new_ids, merged=False, filled=True)


def _scores_beside(gate: Gate) -> tuple[Node, Node, bool] | Skip:
    """What ranks, what weighs, and whether that are probabilities; they have to be there when the dispatch begins."""
    scores = gate_scores(gate)
    if scores is None:
        return Skip(SkipReason.NO_SCORES, gate.selection, "its selection reads no one tensor of them", evidence=_LATE)
    for node in (scores.choice, scores.worth):
        rows, ids = nodes.shape(node), nodes.shape(gate.ids)
        if rows is None or ids is None or [str(n) for n in rows[:-1]] != [str(n) for n in ids[:-1]]:
            return Skip(SkipReason.NO_SCORES, node, f"{node.name} has other rows than its ids", evidence=_LATE)
        memory = aliases(node)
        writing = [user for alias in memory for user in alias.users if alias in nodes.writes(user) and node < user]
        if writing:
            return Skip(SkipReason.NO_SCORES, min(writing), f"{min(writing).name} overwrites them", evidence=_LATE)
    return scores.choice, scores.worth, scores.probabilities


_LATE = Evidence.EXPERTS


def _filled(
    graph: Graph, gate: Gate, weights: Node, scores: tuple[Node, Node, bool], settings: RoutingSettings
) -> tuple[Node, Node]:
    choice, worth, are_probabilities = scores
    aten = torch.ops.aten
    ranking = choice
    if _closes_with_zero(choice):
        closed = _like(graph.call_function(aten.eq.Scalar, (choice, 0)), choice, torch.bool)
        ranking = _like(graph.call_function(aten.masked_fill.Scalar, (choice, closed, float("-inf"))), choice)
    if not are_probabilities:
        worth = _like(graph.call_function(aten.softmax.int, (worth, -1, torch.float32)), worth, torch.float32)
    options: dict[str, Argument] = {"max_active": settings.max_active} if settings.max_active else {}
    if ranking is not worth:
        options["choice"] = ranking
    numbers = (settings.select_top_k, settings.threshold, settings.min_active)
    both = graph.call_function(torch.ops.sere.fill.default, (gate.ids, weights, worth, *numbers), options)
    describe(both, gate.ids, (nodes.value(gate.ids), nodes.value(weights)))
    return _item(graph, both, 0, gate.ids), _item(graph, both, 1, weights)


def _routed_again(graph: Graph, gate: Gate, weights: Node, settings: RoutingSettings) -> tuple[Node, Node]:
    """The same routing once more, filled: others read the ids as they were."""
    routed = graph.node_copy(gate.selection)
    fill_route(routed, settings)
    return _item(graph, routed, 1, gate.ids), _item(graph, routed, 0, weights)


def fill_route(routed: Node, settings: RoutingSettings) -> None:
    """Let a `sere.route` fill."""
    for name, value in {**vars(settings), "fill": True}.items():
        update_operator_argument(routed, name, value)


def _item(graph: Graph, both: Node, position: int, like: Node) -> Node:
    item = graph.call_function(operator.getitem, (both, position))
    describe(item, like, nodes.value(like))
    return item


def _closes_with_zero(choice: Node) -> bool:
    """Whether a mask puts zeros into the scores that are selected from."""
    return nodes.kind(choice) in _MASKING and any(
        not isinstance(value, bool) and value == 0
        for value in (*choice.args, *choice.kwargs.values())
        if isinstance(value, (int, float))
    )


def _like(new: Node, like: Node, dtype: torch.dtype | None = None) -> Node:
    value = nodes.value(like)
    if isinstance(value, torch.Tensor):
        mode = getattr(value, "fake_mode", None)
        if mode is not None:
            with mode:
                value = torch.empty_like(value, dtype=dtype)
        else:
            value = torch.empty_like(value, dtype=dtype)
    describe(new, like, value)
    return new
