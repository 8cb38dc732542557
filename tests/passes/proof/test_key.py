"""Equal regions have equal keys, others do not."""

import torch

from sere_compile.passes.proof.key import region_key
from sere_compile.passes.proof.region import cut_region

from ..moe_modules import Grouped, Indexed, from_make_fx, one_gate, rows
from ..test_verify_rewrite import weights_of


def key(module):
    graph = from_make_fx(module, rows())
    return region_key(cut_region(one_gate(graph), weights_of(graph)), graph)


def test_weights_do_not_count():
    other = Indexed()
    with torch.no_grad():
        other.experts.mul_(2)
    assert key(Indexed()) == key(other)


def test_operations_and_sizes_do():
    class Scaled(Indexed):
        def dispatch(self, x, ids, weights):
            return super().dispatch(x, ids, weights) * 2

    class More(Scaled):
        def dispatch(self, x, ids, weights):
            return Indexed.dispatch(self, x, ids, weights * 3)

    assert len({key(m) for m in (Indexed(), Grouped(), Indexed(top_k=2), More())}) == 4
