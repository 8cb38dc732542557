"""`nodes`: what is asked of a node that takes more than its own kind, value or arguments."""

import operator

import pytest
import torch
from torch.fx import Graph

from sere_compile.passes.graph import nodes

from ..moe_modules import TRACERS, Indexed, rows
from .calls import find, graph_of
from .written import Written


class TestTensors:
    @pytest.mark.parametrize("tracer", TRACERS)
    def test_model_state(self, tracer):
        """Weights are model state under every tracer, inputs and results are not."""
        graph = TRACERS[tracer](Indexed(), rows())
        state = [node for node in graph.graph.nodes if nodes.is_model_state(node)]
        assert {nodes.shape(node) for node in state} == {(8, 6), (8, 6, 6)}

    @pytest.mark.parametrize("tracer", TRACERS)
    def test_parameters_are_told_from_buffers(self, tracer):
        class Masked(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.randn(4, 6))
                self.register_buffer("mask", torch.ones(5, 6))

            def forward(self, x):
                return x @ self.weight.T, x @ self.mask.T

        graph = TRACERS[tracer](Masked(), torch.randn(3, 6)).graph
        state = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
        assert {nodes.shape(node) for node in state if nodes.is_parameter(node)} == {(4, 6)}

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


def test_a_second_argument_is_no_result():
    """Another reader of what top-k gives takes a number, too."""
    written = Written()
    best = written.call(torch.topk, written.given(3, 6), 2)
    values, ids = written.pick(best, 0), written.pick(best, -1)
    other = written.graph.call_function(torch.utils._pytree.tree_map, (best, 1))
    assert (nodes.picked(best, 0), nodes.picked(best, 1)) == ([values], [ids])
    assert other in best.users


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


def asked(function):
    """The node that `neg` reads in the graph of make_fx."""
    return nodes.operand(find(graph_of(lambda m, x, ids: function(m, x, ids).neg(), TRACERS["make_fx"]), "neg"))


class TestSlotSource:
    """Ids that are viewed, cast or partly replaced are ids still."""

    @pytest.mark.parametrize(
        "function",
        [
            lambda ids: ids.view(3, 1),
            lambda ids: ids.to(torch.int32),
            lambda ids: ids.clone(),
            lambda ids: torch.where(ids > 0, ids, -1),
            lambda ids: ids.masked_fill(ids > 1, 0),
            lambda ids: ids.clamp(max=1),
            lambda ids: ids.clamp_min(1),
            lambda ids: ids % 2,
        ],
        ids=["view", "cast", "copy", "where", "masked", "clamp", "clamp_min", "remainder"],
    )
    def test_passed_on(self, function):
        node = asked(lambda m, x, ids: function(ids))
        source = nodes.slot_source(node)
        assert source is not None
        assert source.op == "placeholder"

    @pytest.mark.parametrize(
        "function",
        [
            lambda ids: ids + 1,
            lambda ids: torch.where(ids > 0, -1, ids[None].expand(2, 3)[:1]),
            lambda ids: torch.where((ids > 0)[:, None], ids, -1),
            lambda ids: ids.sum(0, keepdim=True),
            lambda ids: ids.clone().clamp_(max=1),
            lambda ids: ids.clone().masked_fill_(ids > 1, 0),
        ],
        ids=["sum", "other branch", "broadcast", "reduced", "in place", "masked in place"],
    )
    def test_not_passed_on(self, function):
        source = nodes.slot_source(asked(lambda m, x, ids: function(ids)))
        assert source is None or source.op != "placeholder"


class TestMovedOnes:
    """Views and permutations that keep the numbers in order."""

    @pytest.mark.parametrize(
        ("function", "kept"),
        [
            (lambda x: x.view(3, 1, 4), True),
            (lambda x: x.view(1, 3, 4).permute(1, 0, 2), True),
            (lambda x: x.view(1, 3, 4).transpose(0, 1), True),
            (lambda x: x.view(1, 3, 4).permute(2, 1, 0), False),
            (lambda x: x.view(1, 3, 4).transpose(1, 2), False),
            (lambda x: x.view(1, 3, 4).transpose(-1, -2), False),
            (lambda x: x.view(4, 3), False),
            (lambda x: x.view(12), False),
            (lambda x: x[:, :3].transpose(0, 1), False),
            (lambda x: x.t(), False),
            (lambda x: x[:1].t(), True),
            (lambda x: x * 2, False),
        ],
    )
    def test_order(self, function, kept):
        assert nodes.only_moves_ones(asked(lambda m, x, ids: function(x))) is kept

    @pytest.mark.parametrize(("name", "kept"), [("T", False), ("mT", False), ("H", False)])
    def test_attributes(self, name, kept):
        """By dimension: a square has the same sizes turned."""
        graph = graph_of(lambda m, x, ids: getattr(x, name) * 1, TRACERS["dynamo"])
        assert nodes.only_moves_ones(find(graph, "transpose")) is kept
        graph = graph_of(lambda m, x, ids: x[None, :1].mT * 1, TRACERS["dynamo"])
        assert nodes.only_moves_ones(find(graph, "transpose"))


@pytest.mark.parametrize("name", ["numpy_T", "mT", "matrix_H", "mH", "adjoint"])
@pytest.mark.parametrize(("size", "kept"), [((4, 4), False), ((1, 4), True)])
def test_attributes_as_operators(name, size, kept):
    """Dynamo writes them so since torch 2.14."""
    graph, value = Graph(), torch.ones(size)
    x = graph.placeholder("x")
    turned = graph.call_function(getattr(torch.ops.aten, name), (x,))
    x.meta["val"], turned.meta["val"] = value, value.mT
    assert nodes.kind(turned) == "transpose"
    assert nodes.only_moves_ones(turned) is kept


@pytest.mark.parametrize("name", ["mT", "mH", "adjoint"])
def test_matrices_of_a_batch_are_turned(name):
    """Not the batch with them."""
    graph, value = Graph(), torch.ones(2, 1, 4)
    x = graph.placeholder("x")
    turned = graph.call_function(getattr(torch.ops.aten, name), (x,))
    x.meta["val"], turned.meta["val"] = value, value.mT
    assert nodes.only_moves_ones(turned)


def test_first_of_several_results():
    """What a decomposition writes for an elementwise operation: its first result stands for it."""
    graph = Graph()
    x = graph.placeholder("x")
    normed = graph.call_function(torch.ops.aten.native_layer_norm.default, (x, [4], None, None, 1e-5))
    first, second = (graph.call_function(operator.getitem, (normed, number)) for number in (0, 1))
    best = graph.call_function(torch.ops.aten.topk.default, (x, 2))
    values = graph.call_function(operator.getitem, (best, 0))
    for node in (normed, best):
        node.meta["val"] = (torch.ones(3, 4), torch.ones(3, 4))
    assert nodes.first_result(first) is normed
    assert nodes.first_result(second) is None
    assert nodes.first_result(values) is None
    assert nodes.first_result(x) is None
    plain = graph.call_function(torch.ops.aten.relu.default, (x,))
    assert nodes.elementwise_users(x) == [first, best, plain]


def test_indices_by_keyword():
    graph = Graph()
    x, ids = graph.placeholder("x"), graph.placeholder("ids")
    assert nodes.index_tensors(graph.call_method("index_select", (x,), {"dim": 0, "index": ids})) == [ids]
    assert nodes.index_tensors(graph.call_function(torch.ops.aten.index.Tensor, (x, [None, ids, 3]))) == [ids]
    assert nodes.index_tensors(graph.call_method("index_select", (x, 0))) == []


def test_which_dimensions_are_turned():
    """`T` and `H` turn all of them, `mT` and `mH` the last two."""
    w = Written()
    for name in ("T", "H"):
        assert nodes.only_moves_ones(w.call(getattr, w.given(1, 3), name))
        assert not nodes.only_moves_ones(w.call(getattr, w.given(2, 3), name))
    for name in ("mT", "mH"):
        assert nodes.only_moves_ones(w.call(getattr, w.given(2, 1, 3), name))
        assert not nodes.only_moves_ones(w.call(getattr, w.given(1, 2, 3), name))
    assert nodes.only_moves_ones(w.call(torch.transpose, w.given(1, 2, 3), 0, 1))
    assert not nodes.only_moves_ones(w.call(torch.transpose, w.given(1, 2, 3), 0, 2))
    assert nodes.only_moves_ones(w.call(torch.transpose, w.given(1, 2, 3), dim0=-3, dim1=1))
    assert nodes.only_moves_ones(w.call("permute", w.given(1, 2, 3), 1, 0, 2))
    assert nodes.only_moves_ones(w.call("permute", w.given(1, 2, 3), (-2, 0, -1)))
    assert not nodes.only_moves_ones(w.call("permute", w.given(1, 2, 3), (0, 2, 1)))


def test_behind_some_operations():
    w = Written()
    x = w.given(2, 3)
    viewed = w.call("view", w.call("double", x), 6)
    assert nodes.behind(viewed, nodes.VALUE_PRESERVING) is x
    assert nodes.behind(viewed, {"view"}) is nodes.operand(viewed)
    assert nodes.behind(viewed, {"exp"}) is viewed
    assert nodes.behind(x, {"placeholder"}) is x


def test_where_ranks_wait_for_each_other():
    def redistribute(x):
        return x

    def full_tensor(x):
        return x

    w = Written()
    x = w.given(2)
    assert nodes.exchanges(w.call(redistribute, x))
    assert nodes.exchanges(w.call(full_tensor, x))
    assert not nodes.exchanges(w.call(torch.exp, x))
    assert not nodes.exchanges(x)
    assert nodes.exchanges(w.graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (x,)))
    assert not nodes.exchanges(w.graph.call_method("_c10d_functional", (x,)))


def test_what_has_no_tensor_operand():
    """A view of a number is a view of no parameter, and moves nothing that is known."""
    w = Written()
    for name in ("view", "clone"):
        node = w.graph.call_method(name, (3, 2))
        node.meta["example_value"] = torch.zeros(3, 2)
        assert nodes.parameter_root(node) is None
        assert not nodes.only_moves_ones(node)
    weight = w.weight(3, 2)
    assert nodes.parameter_root(w.call("reshape", w.call(torch.t, weight), -1)) is weight
    assert nodes.parameter_root(w.call(torch.exp, weight)) is None
