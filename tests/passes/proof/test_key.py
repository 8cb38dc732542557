"""Equal regions have equal keys, others do not."""

import dataclasses

import pytest
import torch
from torch.nn.utils import parametrize

from sere_compile.passes import UseKind
from sere_compile.passes.proof.key import _content, _kind_of, _target, region_key
from sere_compile.passes.proof.region import cut_region

from ..moe_modules import Grouped, Indexed, from_make_fx, one_gate, rows
from ..test_verify_rewrite import weights_of


def key(module):
    graph = from_make_fx(module, rows())
    return region_key(cut_region(one_gate(graph), weights_of(graph)), graph)


def test_weights_do_not_count():
    other = Indexed()
    with torch.no_grad():
        other.experts.mul_(2)
    assert key(Indexed()) == key(other)


def test_operations_and_sizes_do():
    class Scaled(Indexed):
        def dispatch(self, x, ids, weights):
            return super().dispatch(x, ids, weights) * 2

    class More(Scaled):
        def dispatch(self, x, ids, weights):
            return Indexed.dispatch(self, x, ids, weights * 3)

    assert len({key(m) for m in (Indexed(), Grouped(), Indexed(top_k=2), More())}) == 4


def test_what_is_known_of_the_gate_does():
    """And how its uses are taken."""
    graph = from_make_fx(Indexed(), rows())
    region = cut_region(one_gate(graph), weights_of(graph))
    gate = region.gate
    uses = tuple(dataclasses.replace(use, kind=UseKind.GROUPED) for use in gate.uses)
    changes = [
        {}, {"form": "sort"}, {"num_experts": 7}, {"top_k": 2}, {"is_sorted": not gate.is_sorted}, {"uses": uses},
        {"weights": None}, {"uses": ()},
    ]  # fmt: skip
    keys = [
        region_key(dataclasses.replace(region, gate=dataclasses.replace(gate, **change)), graph) for change in changes
    ]
    assert len(set(keys)) == len(changes)
    assert region_key(dataclasses.replace(region, readers=()), graph) not in keys


def test_numbers_of_a_table_do():
    """Whole ones that the model holds; sizes and types of everything."""

    class Ordered(Indexed):
        def __init__(self, order, top_k=3):
            super().__init__(top_k=top_k)
            self.register_buffer("order", order)

        def dispatch(self, x, ids, weights):
            return super().dispatch(x * (1 + self.order), ids, weights)

    tables = [torch.arange(6), torch.arange(6).flip(0), torch.arange(6).int(), torch.zeros(1, 6, dtype=torch.int64)]
    assert len({key(Ordered(table)) for table in tables}) == len(tables)
    assert key(Ordered(torch.rand(6))) == key(Ordered(torch.rand(6)))
    assert key(Ordered(tables[0])) == key(Ordered(tables[0].clone()))


def test_what_is_called():
    """A function by its place, a method and an operator by name, a module and an attribute by what the graph holds."""
    root = torch.nn.Module()
    root.layer, root.number = torch.nn.Linear(2, 3), 7
    graph = torch.fx.Graph()
    calls = {
        graph.call_function(torch.exp, ()): f"{torch.exp.__module__}.{torch.exp.__qualname__}",
        graph.call_function(torch.ops.aten.exp.default, ()): "aten.exp.default",
        graph.call_method("exp", ()): "exp",
        graph.call_module("layer", ()): "Linear(in_features=2, out_features=3, bias=True)",
        graph.get_attr("number"): "7",
        graph.get_attr("other"): "other",
    }
    for node, told in calls.items():
        assert _target(node, root) == told
    for node in list(calls)[-3:]:
        assert _target(node, None) == str(node.target)


def test_functions_of_one_name():
    """Such as two lambdas of a module that Dynamo was told to take as they are."""
    one, other = (lambda w: w), (lambda w: w.softmax(-1))
    graph = torch.fx.Graph()
    first, again, second = (graph.call_function(function, ()) for function in (one, one, other))
    assert one.__qualname__ == other.__qualname__
    assert _target(first, None) == _target(again, None) != _target(second, None)


class Weigh(torch.nn.Module):
    """Its text does not say how."""

    def __init__(self, power):
        super().__init__()
        self.power = power

    def forward(self, weights):
        return weights**self.power


def hooked():
    layer = torch.nn.Linear(2, 2)
    layer.register_forward_hook(lambda module, given, result: result * 2)
    return layer


@pytest.mark.parametrize(
    ("make", "same"),
    [
        (lambda: torch.nn.Softmax(-1), True),
        (lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.SiLU()), True),
        (lambda: Weigh(2), False),
        (lambda: torch.nn.Sequential(Weigh(2)), False),
        (hooked, False),
        (lambda: parametrize.register_parametrization(torch.nn.Linear(2, 2), "weight", Weigh(2)), False),
    ],
    ids=["torch's", "made of torch's", "own", "made of own", "hooked", "parametrized"],
)
def test_modules_of_one_text(make, same):
    root = torch.nn.Module()
    root.one, root.other = make(), make()
    graph = torch.fx.Graph()
    one, again, other = (graph.call_module(name, ()) for name in ("one", "one", "other"))
    assert repr(root.one) == repr(root.other)
    assert _target(one, root) == _target(again, root)
    assert (_target(one, root) == _target(other, root)) is same


def test_what_a_value_is():
    assert _kind_of(3) == "3"
    assert _kind_of(None) == "NoneType"
    assert _kind_of(torch.zeros(2, 3).half()) == (["2", "3"], "torch.float16", "cpu")
    assert _kind_of((1, [2.5])) == ["1", ["2.5"]]


def test_what_is_held():
    """Whole numbers, unless they are too many; of others a single one, which may be a limit."""
    assert _content(torch.tensor(1e6)) == [1e6]
    assert _content(torch.tensor([0.5])) == [0.5]
    assert _content(torch.arange(4).view(2, 2)) == [0, 1, 2, 3]
    assert _content(torch.rand(3)) is None
    assert _content(torch.zeros(4096, dtype=torch.int64)) == [0] * 4096
    assert _content(torch.zeros(4097, dtype=torch.int64)) is None
    assert _content(5) == "5"
