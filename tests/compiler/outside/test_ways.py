"""Which ids are new where they leave their graph."""

import types

import torch

from sere_compile.compiler.outside import ways as module
from sere_compile.compiler.outside.ways import ids_alone, ids_kept, version_name
from sere_compile.passes import Skip, SkipReason, UseKind

from .blocks import EXPERTS, HIDDEN, TOP_K, Block, Experts, rows
from .trials import gate_of, ids_that_leave, verdicts


class Loads(Block):
    """What is made of the ids ahead of a break is returned, or the experts behind it go by it."""

    def __init__(self, experts, returns):
        super().__init__(experts)
        self.returned = returns

    def forward(self, x):
        weights, ids = self.gate(x.view(-1, HIDDEN)).softmax(-1).topk(TOP_K)
        table = weights.new_zeros(len(weights), EXPERTS).scatter(1, ids, weights)
        load = (table > 0).sum(0)
        torch._dynamo.graph_break()
        made = self.experts(x.view(-1, HIDDEN), ids, weights if self.returned else table.gather(1, ids))
        return (made, load, table.sum(0)) if self.returned else made * load.max()


def test_loads_that_are_returned_are_of_what_the_router_chose():
    """New ids leave the graph as they are; a table of them and its sums are made of the router's own."""
    [verdict] = verdicts(Loads(Experts(), True), rows())
    assert (verdict.merged is not None, verdict.ids_alone) == (True, True)


def test_a_table_that_the_code_outside_reads_at_new_ids_is_refused():
    """The router's own table has nothing there, and one of new ids gives another load."""
    [verdict] = verdicts(Loads(Experts(), False), rows())
    assert verdict.merged is None


class TestWhichIdsAreNew:
    """Of a gate some of whose ids leave the graph, as they are or in what is made of them."""

    def test_what_is_made_of_ids_is_of_the_routers_where_they_leave_themselves(self):
        ids, inside, made, _, output = ids_that_leave()
        gate = gate_of(ids, (output, UseKind.LEAVES), (made, UseKind.UNKNOWN), (inside, UseKind.LOOK_UP))
        found = ids_alone(gate)
        assert [use.kind for use in found.uses] == [UseKind.LEAVES, UseKind.STATISTIC, UseKind.LOOK_UP]
        assert [use.consumer for use in found.uses] == [output, made, inside]

    def test_where_all_of_it_leaves_in_one_way(self):
        """As it is, or in what is made of it: what keeps the router's ids anyway does not count."""
        ids, inside, made, _, output = ids_that_leave()
        assert ids_alone(gate_of(ids, (output, UseKind.LEAVES), (inside, UseKind.STATISTIC))) is None
        assert ids_alone(gate_of(ids, (made, UseKind.LEAVES), (output, UseKind.STATISTIC))) is None

    def test_only_the_dispatch_in_the_graph_gets_new_ids(self, monkeypatch):
        ids, inside, made, last, output = ids_that_leave()
        monkeypatch.setattr(module, "ends_of", lambda gate: types.SimpleNamespace(complete=last))
        uses = [(inside, UseKind.GROUPED), (made, UseKind.LEAVES), (output, UseKind.LEAVES), (made, UseKind.LOOK_UP)]
        kinds = [use.kind for use in ids_kept(gate_of(ids, *uses)).uses]
        assert kinds == [UseKind.GROUPED, UseKind.STATISTIC, UseKind.STATISTIC, UseKind.LOOK_UP]
        assert ids_kept(gate_of(ids, *uses[1:])) is None
        skip = Skip(SkipReason.NO_IDS, ids)
        monkeypatch.setattr(module, "ends_of", lambda gate: skip)
        assert ids_kept(gate_of(ids, *uses)) is None

    def test_names_of_versions(self):
        assert version_name(True, ", ids kept") == "merged, ids kept"
        assert version_name(False, "") == "plain"
