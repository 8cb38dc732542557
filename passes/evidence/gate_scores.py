"""Which scores of all experts rank at a gate, and which its routing weights are made from.

Mostly they are one tensor, the operand of the selection. A gate that adds a bias to its scores for the selection alone,
or masks groups, looks the weights up in the scores without it:

    scores = sigmoid(logits);  ids = topk(scores + bias, K)[1];  weights = gather(scores, 1, ids)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ..gate import Gate, UseKind
from ..graph import nodes


@dataclass(frozen=True)
class GateScores:
    """The scores of all experts at a gate.

    Attributes:
        choice: [..., E], what the selection ranks by.
        worth: [..., E], what the weights are made from; the same node where nothing else was found.
        probabilities: whether a softmax or sigmoid made `worth`, so that its numbers are worth what they say; else they
            are logits, worth their softmax.
    """

    choice: Node
    worth: Node
    probabilities: bool


def gate_scores(gate: Gate) -> GateScores | None:
    """The scores at a gate, or None where the selection does not read one tensor of them."""
    choice = nodes.operand(gate.selection)
    if choice is not None and gate.form == "sort" and not nodes.argument(gate.selection, 2, "descending", False):
        # In ascending order the best are first of negated scores alone.
        choice = nodes.operand(choice) if nodes.kind(choice) == "neg" else None
    if choice is None or nodes.last_size(choice) != gate.num_experts:
        return None
    looked_up = [
        base
        for use in gate.uses
        if use.kind is UseKind.LOOK_UP and nodes.kind(use.consumer) == "gather"
        if (base := nodes.operand(use.consumer)) is not None and nodes.same_shape(base, choice)
    ]
    worth = looked_up[0] if looked_up else choice
    return GateScores(choice, worth, _is_bounded(worth, gate))


def _is_bounded(scores: Node, gate: Gate) -> bool:
    """Whether a softmax or sigmoid lies between the router's projection and the scores."""
    node: Node | None = scores
    while node is not None and node is not gate.router_input:
        if nodes.kind(node) in ("softmax", "sigmoid"):
            return True
        node = nodes.operand(node)
    return False
