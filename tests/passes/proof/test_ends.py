"""Where tokens come together, and what else reads what a rewrite changes."""

import torch
from torch import nn

from sere_compile.compiler import dynamo
from sere_compile.passes import Proof, find_gates, verify_rewrite
from sere_compile.passes.evidence.router import trace_router
from sere_compile.passes.evidence.routing_weights import outer_consumers
from sere_compile.passes.graph import nodes
from sere_compile.passes.proof.ends import find_ends

from ..moe_modules import (
    EXPERTS,
    HIDDEN,
    ExpertLoop,
    Indexed,
    IndexPut,
    ScatterCombine,
    from_dynamo,
    from_make_fx,
    rows,
)
from ..test_verify_rewrite import weights_of


def ends_of(module):
    return found_in(from_make_fx(module, rows()))


def found_in(graph, number=0):
    gate = find_gates(graph).gates[number]
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


class TwoLayers(nn.Module):
    """Each layer adds to memory of its own, which the next reads as it is."""

    def __init__(self):
        super().__init__()
        self.first, self.second = IndexPut(), IndexPut()

    def forward(self, x):
        return self.second(self.first(x))


class ReadBefore(ExpertLoop):
    """A copy of the memory leaves before the last expert has added to it."""

    def dispatch(self, x, ids, weights):
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            early = out + 1
            token, slot = torch.where(ids == number)
            out[token] += weights[token, slot, None] * self.expert(number, x[token])
        return out, early


def captured(module):
    with dynamo.dynamic_shape_capture():
        return from_dynamo(module, rows())


def test_memory_that_experts_add_to_is_an_exit():
    """No operation follows that could be one: the memory is returned."""
    _, ends = found_in(captured(IndexPut()))
    assert nodes.kind(ends.exit) == "zeros_like"
    assert ends.sides == ends.written == ()
    assert ends.last == max(nodes.writers(ends.exit))


def test_the_memory_of_the_layer_before_is_made_up():
    """The second layer starts from what the first left there, not from its experts' writes."""
    graph = captured(TwoLayers())
    for gate in find_gates(graph).gates:
        assert isinstance(proof := verify_rewrite(gate, weights_of(graph)), Proof), proof
        assert len(proof.experts) == EXPERTS


def test_what_is_read_of_memory_before_it_is_complete_is_an_end():
    _, ends = found_in(captured(ReadBefore()))
    assert [nodes.shape(side)[-1] for side in ends.sides] == [HIDDEN]
