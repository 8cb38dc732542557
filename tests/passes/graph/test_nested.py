"""Graphs inside a graph: found where the module holds one, and explained by the operator that calls them."""

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import checkpoint

from sere_compile.passes.graph.nested import nested_in, why_nested


def holding(**attributes):
    """A module with these attributes, and its graph that reads each."""
    root = nn.Module()
    for name, value in attributes.items():
        setattr(root, name, value)
    module = GraphModule(root, Graph())
    for name, value in attributes.items():
        setattr(module, name, value)
    return module, [module.graph.get_attr(name) for name in attributes]


def test_only_graphs_are_nested():
    module, [inner, weight] = holding(inner=GraphModule(nn.Module(), Graph()), weight=nn.Parameter(torch.ones(2)))
    assert nested_in(inner, module) is module.inner
    assert nested_in(weight, module) is None
    assert nested_in(inner, None) is None


def called(operator):
    _, [body] = holding(body=GraphModule(nn.Module(), Graph()))
    body.graph.call_function(operator, (body,))
    return why_nested(body)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("tag_activation_checkpoint", "gradient_checkpointing_disable()"),
        ("cond", "a branch of torch.cond"),
        ("while_loop", "write the loop in Python"),
        ("map_impl", "on all rows at once"),
        ("invoke_subgraph", "nested_compile_region"),
        ("wrap_with_set_grad_enabled", "torch.no_grad()"),
        ("wrap_with_autocast", "around the call"),
        ("autograd_function_apply", "torch.autograd.Function"),
        ("local_map_hop", "call the layer outside of it"),
    ],
)
def test_the_caller_tells_why(name, cure):
    """Checkpointing is named where it is the cause, and nowhere else."""
    text = called(getattr(torch.ops.higher_order, name))
    assert text.startswith(f"called by {name}")
    assert cure in text
    assert ("checkpoint" in text) == ("checkpoint" in name)


def test_a_function_is_known_by_its_name():
    assert "switch checkpointing off" in called(checkpoint)


def test_nobody_calls_it():
    _, [body] = holding(body=GraphModule(nn.Module(), Graph()))
    assert why_nested(body) == "called by body, call the layer outside of it"
