"""Regions of small programs, and what running them tells of the experts."""

from sere_compile.passes.graph import nodes
from sere_compile.passes.graph.run_part import run_graph
from sere_compile.passes.proof.expert_parameters import Told
from sere_compile.passes.proof.made_up import activation_values, state_values
from sere_compile.passes.proof.region import cut_region

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
