"""`kinds`: one name for an operation, whichever tracer wrote it."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph, symbolic_trace
from torch.fx.passes.shape_prop import ShapeProp

from sere_compile.passes.graph import nodes

from ..moe_modules import TRACERS
from .calls import Call, calls, graph_of


def put(x, ids):
    y = x.clone()
    y[ids] = x * 2
    return y


# name -> (function of (module, x, ids), a kind that every tracer has to show for it)
SPELLINGS = {
    "softmax function": (lambda m, x, ids: F.softmax(x, -1), "softmax"),
    "softmax method": (lambda m, x, ids: x.softmax(-1), "softmax"),
    "sigmoid": (lambda m, x, ids: torch.sigmoid(x), "sigmoid"),
    "reshape": (lambda m, x, ids: x.reshape(-1) + 1, "view"),
    "flatten": (lambda m, x, ids: x.flatten() + 1, "view"),
    "cast": (lambda m, x, ids: ids.float(), "to"),
    "cast by to": (lambda m, x, ids: ids.to(torch.float64), "to"),
    "matmul operator": (lambda m, x, ids: x @ m.weight, "matmul"),
    "divide": (lambda m, x, ids: x / 2, "div"),
    "divide in place": (lambda m, x, ids: x.clone().div_(2), "div"),
    "compare": (lambda m, x, ids: ids == 1, "eq"),
    "index": (lambda m, x, ids: x[ids], "index"),
    "new dimension": (lambda m, x, ids: ids[:, None] + 1, "unsqueeze"),
    "index_select": (lambda m, x, ids: x.index_select(0, ids), "index"),
    "assign by index": (lambda m, x, ids: put(x, ids), "index_put"),
    "gather": (lambda m, x, ids: x.gather(1, ids[:, None]), "gather"),
    "pick": (lambda m, x, ids: x.topk(2)[1], "item"),
    "pick by name": (lambda m, x, ids: x.topk(2).indices, "item"),
}


class TestKind:
    @pytest.mark.parametrize("tracer", TRACERS)
    @pytest.mark.parametrize("name", SPELLINGS)
    def test_spellings(self, name, tracer):
        """One operation has one kind in Dynamo, torch.export and make_fx graphs."""
        function, kind = SPELLINGS[name]
        assert kind in {nodes.kind(node) for node in graph_of(function, TRACERS[tracer]).graph.nodes}

    def test_opcodes(self):
        """Nodes that call nothing have their opcode as kind."""
        graph = graph_of(lambda m, x, ids: x @ m.weight)
        assert {"placeholder", "get_attr", "output"} <= {nodes.kind(node) for node in graph.graph.nodes}

    def test_python_and_is_no_in_place_operation(self):
        """`operator.and_` ends in an underscore and writes nothing; `&=` does."""
        graph = Graph()
        x = graph.placeholder("x")
        pure, writing = graph.call_function(operator.and_, (x, x)), graph.call_function(operator.iand, (x, x))
        assert nodes.kind(pure) == nodes.kind(writing) == "bitwise_and"
        assert (nodes.writes(pure), nodes.writes(writing)) == ([], [x])

    def test_custom_operators_keep_their_namespace(self):
        """A custom operator is called the same with and without its overload."""
        import sere_compile.ops  # noqa: F401  (registers them)

        graph = Graph()
        x = graph.placeholder("x")
        for target in (torch.ops.sere.reroute, torch.ops.sere.reroute.default):
            assert nodes.kind(graph.call_function(target, (x, x, 1))) == "sere.reroute"

    def test_pick_and_row_with_tensor_metadata_only(self):
        """Under ShapeProp a number picks a result of a top-k, but a row of a tensor."""
        graph = symbolic_trace(Call(lambda m, x, ids: (x[0], x.topk(2)[0][0])))
        ShapeProp(graph).propagate(torch.randn(3, 4), torch.tensor([0]))
        assert [nodes.kind(node) for node in calls(graph) if nodes.raw_name(node) == "getitem"] == [
            "slice",
            "item",
            "slice",
        ]
