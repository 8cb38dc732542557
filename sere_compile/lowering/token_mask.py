"""Padding in a lowered batch: the tokens that a program's `attention_mask` hides make no expert primary.

Without it a hidden row takes part in re-routing like any other, and what it holds is not even defined: attention gives
a token that may look at nothing other numbers in every runtime.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from .standard_operators import sere_nodes

log = logging.getLogger(__name__)

MASK = "attention_mask"


def mask_tokens(program: ExportedProgram) -> None:
    """Give every re-routing of a program its input `attention_mask` [B, L] as token mask, in place.

    Nothing happens without such an input. What cannot be used is said in a warning.
    """
    gates, given = sere_nodes(program), program.graph.find_nodes(op="placeholder")
    mask = next((node for node in given if node.name == MASK), None)
    if mask is None or not gates:
        return
    value = mask.meta["val"]
    if value.dim() != 2 or value.is_floating_point():
        log.warning("%s %s does not say which tokens are real: padding makes experts primary", MASK, list(value.shape))
        return
    with program.graph.inserting_before(next(node for node in program.graph.nodes if node.op != "placeholder")):
        real = _call(program, torch.ops.aten.ne.Scalar, mask, 0)
        rows = _call(program, torch.ops.aten.view.default, real, [-1])
    for gate in gates:
        ids = gate.args[0]
        assert isinstance(ids, Node)
        tokens = ids.meta["val"].shape[:-1]
        fitting = [node for node in (rows, real) if _same(node.meta["val"].shape, tokens)]
        if fitting:
            gate.update_kwarg("token_mask", fitting[0])
        else:
            log.warning(
                "%s routes %s tokens, which are not those of %s %s: padding makes experts primary there",
                ids, list(tokens), MASK, list(value.shape),
            )  # fmt: skip
    for node in (rows, real):
        if not node.users:
            program.graph.erase_node(node)
    program.graph_module.recompile()


def _call(program: ExportedProgram, operator: Any, first: Node, *rest: Any) -> Node:
    node = program.graph.call_function(operator, (first, *rest))
    node.meta["val"] = operator(first.meta["val"], *rest)
    return node


def _same(sizes: torch.Size, others: torch.Size) -> bool:
    """Whether sizes are equal as expressions; a comparison of free ones would restrict the program."""
    return [str(size) for size in sizes] == [str(size) for size in others]
