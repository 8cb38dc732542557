"""How many tokens a region is run with, beside the number that it was traced with."""

from sere_compile.passes.graph import nodes
from sere_compile.passes.proof.more_tokens import more_tokens

from ..moe_modules import TOKENS, Indexed, ScatterCombine, from_dynamo
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
