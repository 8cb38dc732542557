"""`aliases`: nodes that may share memory, through views and in-place results in both directions."""

import operator

import torch
from torch.fx import Graph

from sere_compile.passes.graph.aliases import aliases


def test_views_and_in_place_results():
    """Views of views and results of writes are found from any of them; copies and other operations are not."""
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(3, 4)
    view = graph.call_method("view", (x, -1))
    part = graph.call_method("narrow", (view, 0, 0, 2))
    transposed = graph.call_method("transpose", (x, 0, 1))
    written = graph.call_method("add_", (view, 1))
    rows = graph.call_method("unbind", (x, 0))
    row = graph.call_function(operator.getitem, (rows, 1))
    top = graph.call_method("topk", (x, 2))
    best = graph.call_function(operator.getitem, (top, 0))
    copy = graph.call_method("clone", (x,))
    other = graph.call_function(torch.relu, (x,))
    shared = {x, view, part, transposed, written, rows, row}
    for node in shared:
        assert aliases(node) == shared
    assert aliases(copy) == {copy}
    assert aliases(other) == {other}
    assert aliases(best) == {best}, "what an operation returns beside others is a part of it only if it splits"


def test_who_only_reads_shares_nothing():
    """Also where it writes to, or is a view of, another tensor."""
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    for node in (x, y):
        node.meta["val"] = torch.zeros(3, 4)
    added = graph.call_method("add_", (y, x))
    graph.call_method("view_as", (y, x))
    assert aliases(x) == {x}
    assert added in aliases(y)
