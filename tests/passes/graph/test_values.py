"""`values`: what the tracer recorded of a node's result, and where in the user's code it came from."""

import pytest
import torch
from torch.fx import Graph, GraphModule, symbolic_trace

from sere_compile.passes.graph import nodes

from ..moe_modules import TRACERS, Indexed, from_dynamo, from_make_fx, rows
from .calls import Call, find, graph_of
from .written import Written


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

    def test_shape_in_call(self):
        """Symbolic sizes become those of one call, and the graph keeps its symbols."""
        graph = graph_of(lambda m, x, ids: torch.cat([x, x]) @ m.weight, from_dynamo, dynamic=True)
        product = find(graph, "matmul")
        symbol = next(node for node in graph.graph.nodes if isinstance(nodes.value(node), torch.SymInt))
        assert nodes.shape_in_call(product, {symbol: 5}) == (10, 6)
        assert nodes.shape_in_call(product, {symbol: 7}) == (14, 6)
        assert isinstance(nodes.value(product).shape[0], torch.SymInt)

    def test_sizes_compare_without_a_guard(self):
        """Three rows were traced; the graph serves others too."""
        graph = graph_of(lambda m, x, ids: torch.cat([x, x]) @ m.weight, from_dynamo, dynamic=True)
        product = find(graph, "matmul")
        free = nodes.value(product).shape[0]
        guards = len(free.node.shape_env.guards)
        assert nodes.shape(product) != (6, 6)
        assert 6 not in nodes.shape(product)[:1]
        assert nodes.shape(product)[0] == free.node.expr
        assert nodes.shape(product)[1] == 6
        assert nodes.count(product) != 36
        assert len(free.node.shape_env.guards) == guards


class TestSourceLine:
    @pytest.mark.parametrize("tracer", ["dynamo", "export"])
    def test_names_the_innermost_line_of_the_user(self, tracer):
        """Reports point at the user's file."""
        graph = TRACERS[tracer](Indexed(), rows())
        assert nodes.source_line(find(graph, "topk")).startswith("moe_modules.py:")

    def test_without_stack_trace(self):
        """make_fx keeps none by default: an empty text."""
        assert nodes.source_line(find(from_make_fx(Indexed(), rows()), "topk")) == ""

    def test_place(self):
        """A refusal names the node, and the line where there is one."""
        traced, bare = (find(trace(Indexed(), rows()), "topk") for trace in (TRACERS["export"], from_make_fx))
        assert nodes.place(traced) == f"{traced.name} at {nodes.source_line(traced)}"
        assert nodes.place(bare) == bare.name


def test_graph_module_without_owner():
    """An attribute of a graph that belongs to no module has no value, and raises nothing."""
    graph = Graph()
    assert nodes.value(graph.get_attr("weight")) is None
    assert nodes.value(GraphModule({"weight": torch.ones(2)}, graph).graph.find_nodes(op="get_attr")[0]) is not None


class TestByHand:
    def test_where_a_value_is_recorded(self):
        """By Dynamo, by torch.export and make_fx, by shape propagation, in this order."""
        node = Graph().placeholder("x")
        assert nodes.value(node) is None
        for key in ("tensor_meta", "val", "example_value"):
            node.meta[key] = key
            assert nodes.value(node) == key

    def test_attributes_of_modules_inside(self):
        root = torch.nn.Module()
        root.inner = torch.nn.Linear(2, 3)
        graph = Graph()
        node, missing = graph.get_attr("inner.weight"), graph.get_attr("inner.other")
        graph.owning_module = root
        assert nodes.value(node) is root.inner.weight
        assert nodes.value(missing) is None

    def test_what_is_no_attribute_has_no_value(self):
        """Whatever its target is called."""
        root = torch.nn.Linear(2, 3)
        graph = Graph()
        graph.owning_module = root
        assert nodes.value(graph.placeholder("weight")) is None
        assert nodes.value(graph.call_method("weight", ())) is None

    def test_products_of_sizes(self):
        w = Written()
        x, one = w.given(2, 3, 4), w.input(torch.tensor(1.0))
        assert (nodes.count(x), nodes.leading_count(x), nodes.last_size(x)) == (24, 6, 4)
        assert (nodes.count(one), nodes.leading_count(one), nodes.last_size(one)) == (1, 1, None)

    def test_types_and_places(self):
        w = Written()
        assert nodes.is_floating(w.input(torch.ones(2).half()))
        assert not nodes.is_floating(w.input(torch.ones(2).long()))
        assert not nodes.is_floating(w.input(3))
        assert nodes.device(w.input(torch.ones(2, device="meta"))).type == "meta"
        assert nodes.device(w.input(3)).type == "cpu"
        assert not nodes.is_tensor(w.input(3))
        assert nodes.is_tensor(w.given(2))

    def test_shapes_that_are_the_same(self):
        w = Written()
        x = w.given(2, 3)
        for sizes, same in (((2, 3), True), ((3, 2), False), ((2, 3, 1), False), ((6,), False), ((1, 3), False)):
            assert nodes.same_shape(x, w.given(*sizes)) is same
            assert nodes.same_shape(w.given(*sizes), x) is same
        assert not nodes.same_shape(x, w.input(3))
        assert not nodes.same_shape(w.input(3), x)

    @pytest.mark.parametrize(
        ("trace", "line"),
        [
            ('  File "/a/b/model.py", line 12, in forward\n    y = x\n  File "/a/c.py", line 7, in f\n    z', "c.py:7"),
            ('  File "model.py", line 12', "model.py:12"),
            ("  File unnamed, line 12, in f", ""),
            ("nothing of the kind", ""),
            ("", ""),
        ],
    )
    def test_lines_of_the_user(self, trace, line):
        node = Graph().placeholder("x")
        node.meta["stack_trace"] = trace
        assert nodes.source_line(node) == line
        assert nodes.place(node) == (f"x at {line}" if line else "x")
