"""Where tokens come together, and what else reads what a rewrite changes."""

from sere_compile.passes.evidence.router import trace_router
from sere_compile.passes.evidence.routing_weights import outer_consumers
from sere_compile.passes.graph import nodes
from sere_compile.passes.proof.ends import find_ends

from ..moe_modules import Indexed, ScatterCombine, from_make_fx, one_gate, rows


def ends_of(module):
    graph = from_make_fx(module, rows())
    gate = one_gate(graph)
    scores = nodes.operand(gate.selection)
    projection = trace_router(scores, nodes.last_size(scores)).projection
    return graph, find_ends(gate, tuple(outer_consumers(gate.weights, gate.ids)), projection)


def test_the_exit_is_what_the_block_returns():
    graph, ends = ends_of(Indexed())
    assert ends.exit in graph.graph.output_node().all_input_nodes
    assert ends.sides == ends.written == ()


def test_a_reader_of_the_table_beside_the_exit_is_an_end():
    class Counted(ScatterCombine):
        def forward(self, x):
            ids, weights = self.route(x)
            table = x.new_zeros(x.shape[0], self.num_experts).scatter(1, ids, weights)
            return self.dispatch(x, ids, weights), table.sum(0)

    _, ends = ends_of(Counted())
    assert [nodes.shape(side) for side in ends.sides] in ([(8,)], [(10, 8)])
