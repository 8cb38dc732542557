"""`columns`: which columns a slice, split or narrowed part takes, under every tracer."""

import pytest
import torch

from sere_compile.passes.graph import nodes
from sere_compile.passes.graph.columns import columns_of, constant, cut_from

from ..moe_modules import TRACERS
from .calls import graph_of
from .written import Written

# name -> (function of x [3, 4], the columns that the operand of its `neg` has of x, None where it is no range)
PARTS = {
    "first": (lambda x: x[:, :2], (0, 2)),
    "last": (lambda x: x[:, 2:], (2, 4)),
    "from behind": (lambda x: x[..., -3:], (1, 4)),
    "narrow": (lambda x: x.narrow(-1, 1, 2), (1, 3)),
    "split": (lambda x: x.split([1, 3], -1)[1], (1, 4)),
    "chunk": (lambda x: x.chunk(2, 1)[1], (2, 4)),
    "every second": (lambda x: x[:, ::2], None),
    "all but the first": (lambda x: x[:, 1:], (1, 4)),
    "all but the last": (lambda x: x[:, :-1], (0, 3)),
    "behind dots": (lambda x: x[..., 1:3], (1, 3)),
    "one column": (lambda x: x[:, 2:3], (2, 3)),
    "narrow from behind": (lambda x: x.narrow(1, -3, 2), (1, 3)),
    "middle of a split": (lambda x: x.split([1, 2, 1], 1)[1], (1, 3)),
    "first of a split": (lambda x: x.split(3, 1)[0], (0, 3)),
    "all rows of a split": (lambda x: x.split(3, 0)[0], None),
    "rows": (lambda x: x[1:], None),
    "rows and columns": (lambda x: x[1:, 1:], None),
    "rows by narrow": (lambda x: x.narrow(0, 1, 2), None),
    "rows of a split": (lambda x: x.split([1, 2], 0)[1], None),
    "rows of chunks": (lambda x: x.chunk(3)[1], None),
    "a column taken out": (lambda x: x[:, 1], None),
    "unbound": (lambda x: x.unbind(1)[1], None),
    "a new dimension": (lambda x: x[:, None], None),
    "chosen": (lambda x: x.topk(2)[0], None),
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
    if expected is None:
        assert source is not x
        assert columns_of(part, x) is None
        return
    # torch.export takes all rows first, then columns of these.
    assert source is x or columns_of(source, x) == (0, 4)
    assert columns_of(part, source) == expected
    assert columns_of(part, negated) is None
    assert columns_of(part, None) is None


@pytest.mark.parametrize("tracer", TRACERS)
def test_constant(tracer):
    """A number is known as it is, and as a tensor filled with it."""
    graph = graph_of(lambda m, x, ids: torch.where(ids > 0, ids, torch.full_like(ids, -1)), TRACERS[tracer])
    [where] = [node for node in graph.graph.nodes if nodes.kind(node) == "where"]
    assert constant(nodes.argument(where, 2, "other")) == -1
    assert constant(2.5) == 2.5
    assert constant(0) == 0
    assert constant("1") is None
    assert constant(True) is None
    assert constant(where) is None


# Ways to write a tensor of one number, and the number.
FILLED = {
    "full": (lambda x: torch.full((), 3.0), 3.0),
    "full_like": (lambda x: torch.full_like(x, 2.0), 2.0),
    "new_full": (lambda x: x.new_full((3, 4), 5.0), 5.0),
    "scalar_tensor": (lambda x: torch.scalar_tensor(7.0), 7.0),
    "tensor": (lambda x: torch.tensor(4.0), 4.0),
    "none of these": (lambda x: x * 2, None),
}


@pytest.mark.parametrize("name", FILLED)
def test_constants_of_dynamo(name):
    function, number = FILLED[name]
    graph = graph_of(lambda m, x, ids: torch.where(ids[:, None] > 0, x, function(x)), TRACERS["dynamo"])
    [where] = [node for node in graph.graph.nodes if nodes.kind(node) == "where"]
    assert constant(nodes.argument(where, 2, "other")) == number


@pytest.mark.parametrize(
    ("index", "columns"),
    [
        ((Ellipsis, slice(1, 3)), (1, 3)),
        ((slice(None), slice(None), slice(1, 3)), (1, 3)),
        ((slice(None), slice(1, 3)), None),
        (slice(1, 3), None),
        ((Ellipsis, slice(None, -1)), (0, 3)),
        ((Ellipsis, slice(None, None, 2)), None),
    ],
)
def test_of_three_dimensions(index, columns):
    w = Written()
    x = w.given(2, 5, 4)
    assert columns_of(w.pick(x, index), x) == columns


def test_slices_of_other_dimensions():
    """Of torch.export: all columns of all rows, or no range of columns."""
    w = Written()
    x = w.given(3, 4)
    assert columns_of(w.call(torch.ops.aten.slice.Tensor, x, 0, 0, 3), x) == (0, 4)
    assert columns_of(w.call(torch.ops.aten.slice.Tensor, x, 0, 1, 3), x) is None
    assert columns_of(w.call(torch.ops.aten.slice.Tensor, x, 1, -2), x) == (2, 4)
    assert columns_of(w.call(torch.ops.aten.slice.Tensor, x, 1), x) == (0, 4)
    assert columns_of(w.call(torch.ops.aten.slice.Tensor, x, 1, None, 3), x) == (0, 3)
    assert columns_of(w.call(torch.ops.aten.slice.Tensor, x, 1, end=3), x) == (0, 3)
    assert columns_of(w.call(torch.ops.aten.slice.Tensor, x, 1, 0, 4, 3), x) is None
    assert columns_of(w.call(torch.narrow, x, 0, 0, 3), x) is None
    assert cut_from(x) is None
    assert columns_of(w.pick(x, slice(0, 3)), x) is None, "all rows"
    row = w.given(4)
    assert columns_of(w.pick(row, slice(1, 3)), row) == (1, 3)
    parts = w.call(torch.split, x, [1, 3], 1)
    assert columns_of(w.pick(parts, 1), x) == (1, 4)
    assert columns_of(w.pick(parts, -1), x) is None
