"""`nodes` gives one view of a node, whichever tracer made it."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, symbolic_trace
from torch.fx.passes.shape_prop import ShapeProp

from sere_compile.passes.graph import nodes

from ..moe_modules import TRACERS, Indexed, from_dynamo, from_export, from_make_fx, rows


class Call(nn.Module):
    """A function of (x, ids) as a module with one weight."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.function = function

    def forward(self, x, ids):
        return self.function(self, x, ids)


def graph_of(function, trace=from_export, **options):
    return trace(Call(function), torch.randn(3, 4), torch.tensor([0, 2, 1]), **options)


def calls(graph):
    return [node for node in graph.graph.nodes if node.op in ("call_function", "call_method")]


def find(graph, kind):
    return next(node for node in graph.graph.nodes if nodes.kind(node) == kind)


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


class TestWrites:
    IN_PLACE = (
        ("method", lambda x: x.div_(2)),
        ("out", lambda x: torch.add(x, 1, out=x)),
        ("flag", lambda x: F.relu(x, inplace=True)),
    )

    @pytest.mark.parametrize(("name", "function"), IN_PLACE)
    @pytest.mark.parametrize("tracer", ["dynamo", "export"])
    def test_in_place(self, name, function, tracer):
        """The written operand is known for every way to write in place."""
        graph = graph_of(lambda m, x, ids: function(x + 1), TRACERS[tracer])
        written = [source for node in calls(graph) for source in nodes.writes(node)]
        assert [nodes.kind(source) for source in written] == ["add"]

    @pytest.mark.parametrize(
        "function", [operator.iadd, operator.imod, operator.ifloordiv, operator.itruediv, operator.ipow]
    )
    def test_operators(self, function):
        """Python's in-place operators, which Dynamo keeps, write their left side."""
        graph = graph_of(lambda m, x, ids: function(x + 1, 2.0), from_dynamo)
        assert [nodes.kind(n) for node in calls(graph) for n in nodes.writes(node)] == ["add"]

    def test_pure_operations_write_nothing(self):
        """Reading is not writing."""
        graph = graph_of(lambda m, x, ids: (x / 2).softmax(-1)[ids])
        assert not any(nodes.writes(node) for node in graph.graph.nodes)

    def test_followers_of_a_write_without_users(self):
        """What reads the tensor after an in-place operation on a view of it follows that operation."""
        graph = Graph()
        x = graph.placeholder("x")
        x.meta["val"] = torch.zeros(3, 4)
        early = graph.call_function(torch.relu, (x,))
        view = graph.call_method("view", (x, -1))
        write = graph.call_method("add_", (view, 1))
        late = graph.call_function(torch.relu, (x,))
        graph.output((early, late))
        assert nodes.followers(write) == [late]
        assert nodes.writers(x) == [write]


class TestValues:
    @pytest.mark.parametrize("tracer", TRACERS)
    def test_sizes(self, tracer):
        """Shapes are known under every tracer, also of attributes."""
        graph = TRACERS[tracer](Indexed(), rows())
        shapes = {nodes.shape(node) for node in graph.graph.nodes if nodes.is_tensor(node)}
        assert {(10, 8), (10, 3), (8, 6), (8, 6, 6)} <= shapes
        assert nodes.last_size(find(graph, "softmax")) == 8

    def test_nothing_recorded(self):
        """Without recorded shapes the answers are None, not errors."""
        node = find(symbolic_trace(Call(lambda m, x, ids: x.softmax(-1))), "softmax")
        assert (nodes.shape(node), nodes.last_size(node), nodes.is_tensor(node)) == (None, None, False)
        assert not nodes.same_shape(node, node)

    def test_symbolic_sizes(self):
        """Symbolic sizes compare by their name, and their product without a guard."""
        batch, width = torch.export.Dim("batch"), torch.export.Dim("width")
        graph = graph_of(
            lambda m, x, ids: (x * 2, x.sum(-1, keepdim=True), x + 1),
            dynamic_shapes=({0: batch, 1: width}, {0: torch.export.Dim("other")}),
        )
        double, total, one_more = find(graph, "mul"), find(graph, "sum"), find(graph, "add")
        assert nodes.same_shape(double, one_more)
        assert not nodes.same_shape(double, total)
        assert nodes.last_size(double) is None
        assert nodes.leading_count(double) == nodes.leading_count(total)
        assert nodes.leading_count(double) != nodes.leading_count(find(graph, "placeholder").next)

    @pytest.mark.parametrize("tracer", TRACERS)
    def test_model_state(self, tracer):
        """Weights are model state under every tracer, inputs and results are not."""
        graph = TRACERS[tracer](Indexed(), rows())
        state = [node for node in graph.graph.nodes if nodes.is_model_state(node)]
        assert {nodes.shape(node) for node in state} == {(8, 6), (8, 6, 6)}

    @pytest.mark.parametrize("tracer", TRACERS)
    def test_parameter_root(self, tracer):
        """A weight is recognised behind transposes, casts and views, a product of weights is none."""
        graph = graph_of(
            lambda m, x, ids: (m.weight.T.double().reshape(2, 3, 4).sigmoid(), (m.weight * 2).tanh()), TRACERS[tracer]
        )
        root = nodes.parameter_root(nodes.operand(find(graph, "sigmoid")))
        assert nodes.shape(root) == (4, 6)
        assert nodes.is_model_state(root)
        assert nodes.parameter_root(nodes.operand(find(graph, "tanh"))) is None

    @pytest.mark.parametrize("tracer", TRACERS)
    def test_index_tensors(self, tracer):
        """The indices of every spelling of indexing."""
        spellings = (lambda m, x, ids: x[ids], lambda m, x, ids: x.index_select(0, ids), lambda m, x, ids: x[:, ids])
        for function in spellings:
            found = nodes.index_tensors(find(graph_of(function, TRACERS[tracer]), "index"))
            assert [nodes.shape(node) for node in found] == [(3,)]

    @pytest.mark.parametrize("tracer", TRACERS)
    def test_picked(self, tracer):
        """`r[1]` and `r.indices` are both found, whether the tracer keeps them apart or not."""

        def function(m, x, ids):
            result = x.topk(2)
            return result.values * result[0], result[1] + result.indices

        graph = graph_of(function, TRACERS[tracer])
        selection = find(graph, "topk")
        assert {nodes.kind(user) for node in nodes.picked(selection, 0) for user in node.users} == {"mul"}
        assert {nodes.kind(user) for node in nodes.picked(selection, 1) for user in node.users} == {"add"}


class TestReadsNumbers:
    @pytest.mark.parametrize("tracer", TRACERS)
    def test_sizes_and_types_are_not_numbers(self, tracer):
        """Operations that only copy a tensor's size or type do not read it."""

        def function(m, x, ids):
            return x[:, 0].view_as(ids) + torch.zeros_like(ids) + ids.new_ones(3) + x[0, 0].expand_as(ids)

        graph = graph_of(function, TRACERS[tracer])
        ids = list(graph.graph.find_nodes(op="placeholder"))[-1]
        assert [u for u in ids.users if u.op != "call_module" and nodes.reads_numbers(u, ids)] == []

    def test_transposing_attribute_reads(self):
        """Dynamo writes `x.T` as an attribute: it is a use, unlike `x.shape`."""
        graph = Graph()
        x = graph.placeholder("x")
        assert nodes.reads_numbers(graph.call_function(getattr, (x, "T")), x)
        assert not nodes.reads_numbers(graph.call_function(getattr, (x, "shape")), x)


class TestSourceLine:
    @pytest.mark.parametrize("tracer", ["dynamo", "export"])
    def test_names_the_innermost_line_of_the_user(self, tracer):
        """Reports point at the user's file."""
        graph = TRACERS[tracer](Indexed(), rows())
        assert nodes.source_line(find(graph, "topk")).startswith("moe_modules.py:")

    def test_without_stack_trace(self):
        """make_fx keeps none by default: an empty text."""
        assert nodes.source_line(find(from_make_fx(Indexed(), rows()), "topk")) == ""


def test_graph_module_without_owner():
    """An attribute of a graph that belongs to no module has no value, and raises nothing."""
    graph = Graph()
    assert nodes.value(graph.get_attr("weight")) is None
    assert nodes.value(GraphModule({"weight": torch.ones(2)}, graph).graph.find_nodes(op="get_attr")[0]) is not None
