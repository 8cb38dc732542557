"""How many tokens a region is run with, beside the number that it was traced with."""

from sere_compile.compiler.dynamo import dynamic_shape_capture
from sere_compile.passes import Proof, verify_rewrite
from sere_compile.passes.graph import nodes
from sere_compile.passes.proof.more_tokens import more_tokens

from ..moe_modules import TOKENS, Indexed, IndexPut, ScatterCombine, from_dynamo, one_gate, rows
from ..test_verify_rewrite import weights_of
from .regions import region_of


def traced(module, **options):
    return region_of(module, lambda module, x: from_dynamo(module, x, **options))


def test_a_graph_for_one_number_of_tokens():
    assert more_tokens(traced(Indexed(), dynamic=False)) == {}


def test_a_multiple_of_the_traced_number():
    region = traced(Indexed(), dynamic=True)
    [(symbol, number)] = more_tokens(region).items()
    assert str(symbol) == str(nodes.shape(region.gate.ids)[0])
    assert number == TOKENS * 32


def test_no_more_than_memory_should_hold(monkeypatch):
    """Weights that are gathered for each token grow with the number of tokens."""
    monkeypatch.setattr("sere_compile.passes.proof.more_tokens._LARGEST", 20_000)
    few, many = more_tokens(traced(Indexed(), dynamic=True)), more_tokens(traced(ScatterCombine(), dynamic=True))
    assert TOKENS < sum(few.values()) < sum(many.values())


class Few(ScatterCombine):
    def forward(self, x):
        return super().forward(x) if x.shape[0] < 50 else x


def test_only_what_the_graph_serves():
    """A call with more tokens than its guards let through gets a graph of its own."""
    assert sum(more_tokens(traced(Few(), dynamic=True)).values()) == 40


def test_sizes_that_depend_on_the_data_are_not_asked():
    """Rows of an expert that a graph counts itself: asking whether there are any would end the proof."""
    with dynamic_shape_capture():
        region = traced(IndexPut(), dynamic=True)
    assert sum(more_tokens(region).values()) == TOKENS * 32


def test_a_loop_over_the_rows_of_experts_is_proven_for_any_number_of_tokens():
    with dynamic_shape_capture():
        graph = from_dynamo(IndexPut(), rows(), dynamic=True)
        assert isinstance(verify_rewrite(one_gate(graph), weights_of(graph)), Proof)
