"""Print the rewritten part of a graph so that neither tracer versions nor node names change the text.

    %0 = topk(scores, 4, dim=-1)
    %1 = item(%0, 0) -> float32[24, 4]
    %2 = item(%0, 1) -> int64[24, 4]
    %3 = sere.reroute(%2, similarity, 1, 0.0, 0) -> int64[24, 4]
    %4 = view(%3, -1) -> int64[96]
    %5 = sort(%4)

Shown is what lies between the selection and the consumers of the new ids, of the look-ups and, where they change, of
the weights. Operations have their canonical kind (`!` marks one that writes in place), nodes are numbered anew, and
graph inputs have roles. Casts and assertions that change nothing are left out, since tracers differ in them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sere_compile.passes import Rewrite, UseKind
from sere_compile.passes.graph import nodes

_IRRELEVANT_OPTIONS = ("device", "layout", "pin_memory", "memory_format")


def snapshot(done: Rewrite) -> str:
    """The rewritten region of one gate as text."""
    shown = _region(done)
    names: dict[Node, str] = {}
    lines = []
    for node in done.gate.selection.graph.nodes:
        if node not in shown:
            continue
        source = nodes.operand(node)
        if nodes.kind(node) == "to" and source in names and _type(node) == _type(source):
            names[node] = names[source]
        elif node.op == "output":
            lines.append(f"output({', '.join(names[n] for n in node.all_input_nodes if n in names)})")
        else:
            names[node] = f"%{sum(line.startswith('%') for line in lines)}"
            lines.append(f"{names[node]} = {_call(node, names, done)}{_type(node)}")
    return "\n".join(lines) + "\n"


def _region(done: Rewrite) -> set[Node]:
    """The selection's descendants that lead to a consumer of what changed."""
    gate = done.gate
    ends = [use.consumer for use in gate.uses if use.kind is not UseKind.STATISTIC]
    if gate.weights is not None:
        ends += [gate.weights]
    if done.merged:
        ends += [user for part in done.new_ids.args[0].users for user in part.users]
    return _closure([gate.selection], lambda node: node.users) & _closure(ends, lambda node: node.all_input_nodes)


def _closure(starts, step) -> set[Node]:
    found, pending = set(starts), list(starts)
    while pending:
        fresh = [node for node in step(pending.pop()) if node not in found]
        found.update(fresh)
        pending.extend(fresh)
    return found


def _call(node: Node, names: dict[Node, str], done: Rewrite) -> str:
    def text(value: Any) -> str:
        if isinstance(value, Node):
            return names.get(value) or _role(value, done)
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(map(text, value))}]"
        return str(value).removeprefix("torch.")

    arguments = [text(argument) for argument in node.args]
    arguments += [f"{key}={text(value)}" for key, value in node.kwargs.items() if key not in _IRRELEVANT_OPTIONS]
    return f"{nodes.kind(node)}{'!' if nodes.writes(node) else ''}({', '.join(arguments)})"


def _role(node: Node, done: Rewrite) -> str:
    """A short name for a tensor from outside the region."""
    gate = done.gate
    first_operator = done.new_ids.args[0] if done.merged else done.new_ids
    if node is first_operator.args[2 if done.merged else 1]:
        return "similarity"
    if node is nodes.operand(gate.selection):
        return "scores"
    root = nodes.parameter_root(node)
    if root is gate.router_weight:
        return "router_weight"
    sizes = nodes.shape(root) if root is not None else None
    if sizes and len(sizes) >= 3 and sizes[0] == gate.num_experts:
        return f"experts{list(sizes)}"
    return "outside"


def _type(node: Node) -> str:
    value = nodes.value(node)
    if not isinstance(value, torch.Tensor):
        return ""
    return f" -> {str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
