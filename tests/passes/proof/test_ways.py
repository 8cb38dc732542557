"""A region as one way rewrites it."""

from sere_compile.passes.graph import nodes
from sere_compile.passes.proof.region import cut_region
from sere_compile.passes.proof.ways import Way, rewrite_region, settings_of

from ..moe_modules import Indexed, from_make_fx, one_gate, rows
from ..test_verify_rewrite import weights_of


def test_a_way_is_taken_in_a_copy():
    graph = from_make_fx(Indexed(), rows())
    region = cut_region(one_gate(graph), weights_of(graph))
    before = str(region.graph)
    for merged, name in ((False, "sere.reroute"), (True, "sere.reroute_merged")):
        rewritten = rewrite_region(region, Way(region.gate, merged, region.readers))
        assert name in map(nodes.kind, rewritten.graph.nodes)
    assert str(region.graph) == before


def test_draws_differ_in_their_settings():
    assert {(s.select_top_k, s.threshold) for s in (settings_of(draw, 3) for draw in range(4))} == {
        (1, 0.0),
        (2, 0.0),
        (1, 0.5),
    }
