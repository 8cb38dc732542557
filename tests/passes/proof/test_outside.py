"""Ids that leave the graph: `test_verify_rewrite.TestOutside` has the wrong ways."""

from sere_compile.passes import find_gates
from sere_compile.passes.proof.outside import MERGED, verify_outside

from ..moe_modules import from_make_fx, rows
from ..test_verify_rewrite import Leaving, weights_of


def test_what_is_returned_is_made_of_merged_ids():
    graph = from_make_fx(Leaving(), rows())
    [gate] = find_gates(graph, lambda weight, experts: True).gates
    assert verify_outside(gate, graph, weights_of(graph)) == MERGED
