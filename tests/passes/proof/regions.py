"""Regions of small programs, and what running them tells of the experts."""

import torch
from torch import nn

from sere_compile.passes import Gate, Use, UseKind
from sere_compile.passes.graph import nodes
from sere_compile.passes.graph.run_part import run_graph
from sere_compile.passes.proof.expert_parameters import Told
from sere_compile.passes.proof.made_up import activation_values, state_values
from sere_compile.passes.proof.region import cut_region

from ..graph.written import Written
from ..moe_modules import from_make_fx, one_gate, rows
from ..test_verify_rewrite import weights_of


def region_of(module, trace=from_make_fx, *more, tokens=None):
    """The region of a module's only gate, traced with some of the usual tokens or all."""
    graph = trace(module, rows()[:tokens], *more)
    return cut_region(one_gate(graph), weights_of(graph))


def leaves_of(region, kind):
    """The leaves of a kind, and their shapes."""
    return {node: tuple(nodes.shape(node)) for node, leaf in region.leaves.items() if leaf.kind == kind}


def kinds_of(region):
    return sorted(leaf.kind for leaf in region.leaves.values())


def values_of(region, draw=0, chosen=()):
    return state_values(region, single=True) | activation_values(region, draw, single=True, chosen=chosen)


def run_of(region):
    return lambda values: run_graph(region.graph, None, values, single=True)


def told(region):
    """The experts' parameters, and what each node depends on."""
    draws = [values_of(region, draw) for draw in range(2)]
    return Told(region, run_of(region), draws, lambda n, chosen: values_of(region, 2 * n, chosen)).find()


class Dispatch(Written):
    """Six features, eight experts of which each of four tokens chooses two, and a gate over them by hand."""

    def __init__(self, columns=8):
        super().__init__()
        self.x, self.router = self.given(4, 6), self.weight(columns, 6)
        self.projection = self.call(nn.functional.linear, self.x, self.router)
        self.weights, self.ids = self.top_k(self.call(torch.softmax, self.projection, -1), 2)
        self.experts = self.weight(columns, 6, 6)

    def slots(self):
        """What the chosen experts give, [4, 2, 6]."""
        chosen = self.pick(self.experts, self.ids)
        return self.call("view", self.call(torch.matmul, self.call("view", self.x, 4, 1, 1, 6), chosen), 4, 2, 6)

    def total(self):
        """Their weighed sum."""
        return self.call(torch.sum, self.mul(self.slots(), self.column(self.weights)), 1)

    def gate(self, *results):
        """The gate, once the graph gives these results."""
        self.give(*results)
        uses = tuple(Use(user, self.ids, UseKind.EXPERT_INDEX) for user in self.ids.users)
        return Gate(
            self.ids.args[0], self.ids, self.weights, self.router, self.x, 8, 2, "softmax", True, uses,
            weights=self.weights, all_ids=(self.ids,),
        )  # fmt: skip
