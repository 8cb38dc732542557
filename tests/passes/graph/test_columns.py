"""`columns`: which columns a slice, split or narrowed part takes, under every tracer."""

import pytest
import torch

from sere_compile.passes.graph import nodes
from sere_compile.passes.graph.columns import columns_of, constant, cut_from

from ..moe_modules import TRACERS
from .calls import graph_of

# name -> (function of x [3, 4], the columns that the operand of its `neg` has of x, None where it is no range)
PARTS = {
    "first": (lambda x: x[:, :2], (0, 2)),
    "last": (lambda x: x[:, 2:], (2, 4)),
    "from behind": (lambda x: x[..., -3:], (1, 4)),
    "narrow": (lambda x: x.narrow(-1, 1, 2), (1, 3)),
    "split": (lambda x: x.split([1, 3], -1)[1], (1, 4)),
    "chunk": (lambda x: x.chunk(2, 1)[1], (2, 4)),
    "every second": (lambda x: x[:, ::2], None),
    "rows": (lambda x: x[1:], None),
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("name", PARTS)
def test_parts(name, tracer):
    """The range is the same in Dynamo, torch.export and make_fx graphs."""
    function, expected = PARTS[name]
    graph = graph_of(lambda m, x, ids: -function(x), TRACERS[tracer])
    [negated] = [node for node in graph.graph.nodes if nodes.kind(node) == "neg"]
    part, x = nodes.operand(negated), graph.graph.find_nodes(op="placeholder")
    x = next(node for node in x if nodes.shape(node) == (3, 4))
    source = cut_from(part)
    assert (source is x) == (expected is not None)
    if expected is not None:
        assert columns_of(part, x) == expected


@pytest.mark.parametrize("tracer", TRACERS)
def test_constant(tracer):
    """A number is known as it is, and as a tensor filled with it."""
    graph = graph_of(lambda m, x, ids: torch.where(ids > 0, ids, torch.full_like(ids, -1)), TRACERS[tracer])
    [where] = [node for node in graph.graph.nodes if nodes.kind(node) == "where"]
    assert constant(nodes.argument(where, 2, "other")) == -1
    assert constant(2.5) == 2.5
    assert constant(True) is None
    assert constant(where) is None
