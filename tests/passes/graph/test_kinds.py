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

    def test_operators_from_a_hub_lose_their_version(self):
        with torch.library._scoped_library("_finegrained_fp8_c0ffee1", "DEF") as library:
            library.define("mxfp_dynamic_matmul_batched(Tensor a) -> Tensor")
            graph = Graph()
            target = torch.ops._finegrained_fp8_c0ffee1.mxfp_dynamic_matmul_batched
            for spelled in (target, target.default):
                assert nodes.kind(graph.call_function(spelled, (graph.placeholder("x"),))) in nodes.PRODUCTS_BY_ID

    def test_pick_and_row_with_tensor_metadata_only(self):
        """Under ShapeProp a number picks a result of a top-k, but a row of a tensor."""
        graph = symbolic_trace(Call(lambda m, x, ids: (x[0], x.topk(2)[0][0])))
        ShapeProp(graph).propagate(torch.randn(3, 4), torch.tensor([0]))
        assert [nodes.kind(node) for node in calls(graph) if nodes.raw_name(node) == "getitem"] == [
            "slice",
            "item",
            "slice",
        ]


@pytest.mark.parametrize(
    ("target", "kind", "writes"),
    [
        (operator.itruediv, "div", True),
        (operator.truediv, "div", False),
        (operator.iadd, "add", True),
        (operator.imul, "mul", True),
        (operator.isub, "sub", True),
        (operator.ifloordiv, "floor_divide", True),
        (operator.floordiv, "floor_divide", False),
        (operator.imod, "remainder", True),
        (operator.mod, "remainder", False),
        (operator.ior, "bitwise_or", True),
        (operator.or_, "bitwise_or", False),
        (operator.ixor, "bitwise_xor", True),
        (operator.ipow, "pow", True),
        (operator.matmul, "matmul", False),
        (operator.setitem, "index_put", True),
        (torch.ops.aten.relu_.default, "relu", True),
        (torch.ops.aten._softmax.default, "softmax", False),
        (torch.ops.aten._to_copy.default, "to", False),
        (torch.ops.aten.index_put, "index_put", False),
        (torch.ops.prims.mul.default, "mul", False),
    ],
    ids=str,
)
def test_functions(target, kind, writes):
    """Python's operators and ATen's, in place or not."""
    graph = Graph()
    x = graph.placeholder("x")
    node = graph.call_function(target, (x, x, x))
    assert nodes.kind(node) == kind
    assert nodes.writes(node) == ([x] if writes else [])


@pytest.mark.parametrize(
    ("name", "kind"), [("T", "transpose"), ("mT", "transpose"), ("H", "transpose"), ("mH", "transpose")]
)
def test_attributes(name, kind):
    """Dynamo writes `x.T` as one."""
    graph = Graph()
    x = graph.placeholder("x")
    assert nodes.kind(graph.call_function(getattr, (x, name))) == kind
    assert nodes.kind(graph.call_function(getattr, (x, "shape"))) == "getattr"
    assert nodes.kind(graph.call_method("mean", (x,))) == "mean"


@pytest.mark.parametrize("tracer", ["dynamo"])
@pytest.mark.parametrize(
    ("index", "kind"),
    [
        (lambda x, ids: x[1], "slice"),
        (lambda x, ids: x[:, 1:], "slice"),
        (lambda x, ids: x[..., None], "unsqueeze"),
        (lambda x, ids: x[None], "unsqueeze"),
        (lambda x, ids: x[:, None, :], "unsqueeze"),
        (lambda x, ids: x[None, 1:], "slice"),
        (lambda x, ids: x[ids], "index"),
        (lambda x, ids: x[:, ids], "index"),
        (lambda x, ids: x[ids, None], "index"),
        (lambda x, ids: x[[0, 2]], "index"),
        (lambda x, ids: x[x > 0], "index"),
    ],
    ids=["row", "columns", "last", "first", "between", "both", "rows", "by columns", "and new", "list", "mask"],
)
def test_ways_to_index(index, kind, tracer):
    """Numbers and slices take a part, None alone adds dimensions, a tensor gathers."""
    if kind == "index" and index(torch.zeros(3, 4), torch.tensor([0])).dim() == 1:
        pytest.skip("sizes depend on the data")
    graph = graph_of(lambda m, x, ids: index(x, ids) * 1, TRACERS[tracer])
    [found] = [node for node in calls(graph) if nodes.raw_name(node) == "getitem"]
    assert nodes.kind(found) == kind
