"""Graphs inside a graph: who calls one, and how to write a model without it."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from .kinds import raw_name

# What a part of the operator's name tells of why there is a nested graph, and what to do.
_CURES = {
    "checkpoint": "as activation checkpointing makes it: switch checkpointing off "
    "(model.gradient_checkpointing_disable(), or call the layer without torch.utils.checkpoint)",
    "cond": "a branch of torch.cond: decide in Python, outside of what is traced, or take the layer out of the branch",
    "while_loop": "the body of a loop: write the loop in Python",
    "scan": "the body of a loop: write the loop in Python",
    "map_impl": "what is done to each row: call the layer on all rows at once",
    "invoke_subgraph": "a region that is compiled once: call the layer without torch.compiler.nested_compile_region",
    "set_grad_enabled": "as torch.export keeps a change of the grad mode: export under torch.no_grad()",
    "autocast": "as torch.export keeps an autocast: enter it around the call, not in the model",
    "autograd_function": "a torch.autograd.Function: call the layer outside of it",
}
_OTHERWISE = "call the layer outside of it"


def nested_in(held: Node, module: GraphModule | None) -> GraphModule | None:
    """The graph that a `get_attr` node holds, or None."""
    found = getattr(module, str(held.target), None) if "." not in str(held.target) else None
    return found if isinstance(found, GraphModule) else None


def why_nested(held: Node) -> str:
    """Who calls the graph that a `get_attr` node holds, why it is apart, and what to do, in words."""
    caller = next(iter(held.users), held)
    name = raw_name(caller)
    cure = next((cure for part, cure in _CURES.items() if part in name), _OTHERWISE)
    return f"called by {caller.name}, {cure}"
