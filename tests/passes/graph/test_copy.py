"""A copy of a graph computes the same, and leaves the original alone."""

import torch
from torch import nn

from sere_compile.passes.graph.copy import copy_module

from ..moe_modules import Indexed, from_dynamo, from_export, from_make_fx, rows, run


class Named(nn.Module):
    """Its arguments are called like builtins; it returns a dict."""

    def __init__(self):
        super().__init__()
        self.inner = Indexed()

    def forward(self, input, max):
        return {"sum": self.inner(input) + max["value"]}


def test_names_and_forms_are_the_originals():
    """`input` stays `input`, which signatures go by; keyword arguments and results keep their structure."""
    given = (rows(), {"value": torch.ones(())})
    traced = from_export(Named(), *given)
    copied, mapping = copy_module(traced)
    assert [node.name for node in copied.graph.nodes] == [node.name for node in traced.graph.nodes]
    assert "input" in " ".join(node.name for node in copied.graph.nodes)
    assert list(mapping) == list(traced.graph.nodes) or set(mapping) == set(traced.graph.nodes)
    assert set(mapping.values()) == set(copied.graph.nodes)
    torch.testing.assert_close(copied(*given)["sum"], traced(*given)["sum"])
    assert type(copied).__name__ == type(traced).__name__


def test_names_that_a_copy_would_give_otherwise():
    """Those of builtins, and those that a pass gave."""
    traced = from_make_fx(Indexed(), rows())
    first, *_, last = traced.graph.nodes
    first.name, last.prev.name = "max", "sum"
    copied, mapping = copy_module(traced)
    assert (mapping[first].name, mapping[last.prev].name) == ("max", "sum")
    assert [node.name for node in copied.graph.nodes] == [node.name for node in traced.graph.nodes]


def test_weights_are_shared_and_the_graph_is_not():
    traced = from_make_fx(Indexed(), rows())
    traced.meta["sere_tests"] = 7
    before = str(traced.graph)
    copied, mapping = copy_module(traced)
    for name, value in traced.state_dict(keep_vars=True).items():
        assert copied.state_dict(keep_vars=True)[name] is value
    assert copied.meta == traced.meta
    copied.meta["sere_tests"] = 8
    assert traced.meta["sere_tests"] == 7
    for node in list(copied.graph.nodes)[::-1][:3]:
        if node.op == "call_function":
            node.target = torch.ops.aten.relu.default
    assert str(traced.graph) == before
    torch.testing.assert_close(traced(rows()), run(from_make_fx(Indexed(), rows()), rows()))
    assert all(new.graph is copied.graph and old.graph is traced.graph for old, new in mapping.items())


def test_what_is_known_of_nodes_is_copied():
    """Of the output as well."""
    traced = from_dynamo(Indexed(), rows())
    traced.graph.output_node().meta["sere_tests"] = "output"
    _, mapping = copy_module(traced)
    for old, new in mapping.items():
        assert new.meta.keys() == old.meta.keys()
        assert new.meta is not old.meta
        assert new.meta.get("stack_trace") == old.meta.get("stack_trace")
    assert mapping[traced.graph.output_node()].meta["sere_tests"] == "output"
    assert mapping[traced.graph.output_node()].graph._tracer_cls is traced.graph._tracer_cls
