"""Leaf modules of `symbolic_trace`, which hide what they compute: calls of `nn.Linear` become the function it calls."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.modules.module import _has_any_global_hook

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def open_linears(module: GraphModule) -> None:
    """Write `linear(x, weight, bias)` for each call of an `nn.Linear`, in place: the same numbers, and seen weights.

    One that does something else stays: with hooks, a parametrization, a subclass or a forward of its own.
    """
    for node in module.graph.find_nodes(op="call_module"):
        called = module.get_submodule(str(node.target))
        given = (*node.args, *node.kwargs.values())
        if _is_plain(called) and len(given) == 1 and isinstance(given[0], Node):
            _open(node, called, given[0])


def _is_plain(called: nn.Module) -> bool:
    return type(called) is nn.Linear and does_as_its_class(called)


def does_as_its_class(called: nn.Module) -> bool:
    """Whether a call of the module is one of its class's forward: without hooks, and without a forward of its own."""
    own = "forward" in vars(called) or any(getattr(called, hooks) for hooks in _HOOKS)
    return not own and not _has_any_global_hook()


def _open(node: Node, called: nn.Module, given: Node) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        names = ("weight",) if called.bias is None else ("weight", "bias")
        read = [graph.get_attr(f"{node.target}.{name}") for name in names]
        linear = graph.call_function(torch.nn.functional.linear, (given, *read))
    linear.meta = dict(node.meta)
    name = node.name
    node.replace_all_uses_with(linear)
    graph.erase_node(node)
    linear.name = name
