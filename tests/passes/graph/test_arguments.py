"""`arguments`: one way to read and change what a call was given."""

import pytest
import torch
from torch.fx import Graph

import sere_compile.ops  # noqa: F401  (registers the operators)
from sere_compile.passes.graph.arguments import (
    argument,
    operand,
    operator_argument,
    update_argument,
    update_operator_argument,
)


def call(target, *arguments, **options):
    """A call of the target on a graph input."""
    graph = Graph()
    return graph.call_function(target, (graph.placeholder("x"), *arguments), options)


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (call(torch.topk, 2, -1, True, False), False),
        (call(torch.topk, 2, sorted=False), False),
        (call(torch.topk, 2), True),
    ],
    ids=["position", "keyword", "left out"],
)
def test_read_and_change(node, expected):
    """However an argument was passed it is read and changed there, and the others stay."""
    before = node.args[:4]
    assert argument(node, 4, "sorted", True) is expected
    update_argument(node, 4, "sorted", "new")
    assert argument(node, 4, "sorted", True) == "new"
    assert node.args[: len(before)] == before
    assert [*node.args[4:], *node.kwargs.values()] == ["new"]


@pytest.mark.parametrize(
    "node",
    [
        call(torch.ops.sere.reroute.default, "similarity", 2, 0.5),
        call(torch.ops.sere.reroute.default, "similarity", select_top_k=2, threshold=0.5),
    ],
    ids=["positions", "keywords"],
)
def test_operators_know_their_arguments(node):
    """By name alone, with the operator's own default for what the call leaves out."""
    names = ("select_top_k", "threshold", "min_active", "token_mask")
    assert [operator_argument(node, name) for name in names] == [2, 0.5, 0, None]
    update_operator_argument(node, "select_top_k", 3)
    update_operator_argument(node, "max_active", 7)
    names = ("select_top_k", "threshold", "max_active")
    assert [operator_argument(node, name) for name in names] == [3, 0.5, 7]
    with pytest.raises(KeyError, match=r"reroute\.default has no argument top_k"):
        operator_argument(node, "top_k")


def test_operand():
    """The tensor that an operation works on, under each tracer's name for it."""
    graph = Graph()
    x = graph.placeholder("x")
    assert operand(graph.call_function(torch.relu, (x,))) is x
    assert operand(graph.call_function(torch.relu, (), {"input": x})) is x
    assert operand(graph.call_function(torch.ops.aten.relu.default, (), {"self": x})) is x
    assert operand(graph.call_function(torch.relu, (1.0,))) is None
