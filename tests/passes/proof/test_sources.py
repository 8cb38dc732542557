"""What the nodes of a region depend on."""

import torch
from torch import nn

from sere_compile.passes.proof.region import cut_region
from sere_compile.passes.proof.sources import trace_sources

from ..moe_modules import EXPERTS, Indexed, from_make_fx, one_gate, rows
from ..test_verify_rewrite import weights_of


class Scaled(Indexed):
    """A number per expert scales the routing weights."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(EXPERTS))

    def route(self, x):
        ids, weights = super().route(x)
        return ids, weights * self.scale[ids]


def test_the_router_s_state():
    """It is the scale, not the experts."""
    graph = from_make_fx(Scaled(), rows())
    region = cut_region(one_gate(graph), weights_of(graph))
    sources = trace_sources(region)
    assert [tuple(node.meta["example_value"].shape) for node in sources.router] == [(EXPERTS,)]
    assert len(sources.state[region.ends[0]]) == 2
    assert region.ends[0] in sources.hidden
