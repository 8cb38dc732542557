"""`aliases`: nodes that may share memory, through views and in-place results in both directions."""

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
    copy = graph.call_method("clone", (x,))
    other = graph.call_function(torch.relu, (x,))
    shared = {x, view, transposed, written}
    for node in shared:
        assert aliases(node) == shared
    assert aliases(copy) == {copy}
    assert aliases(other) == {other}
    assert part not in aliases(x), "narrow is not among the views that passes know; it would be a write nobody sees"
