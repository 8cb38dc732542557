"""Values for the inputs of a region."""

import torch

from sere_compile.passes.proof.made_up import activation_values, redrawn, state_values
from sere_compile.passes.proof.region import cut_region

from ..moe_modules import Indexed, from_make_fx, one_gate, rows
from ..test_verify_rewrite import weights_of


def region_of(module):
    graph = from_make_fx(module, rows())
    return cut_region(one_gate(graph), weights_of(graph))


def test_matrices_are_made_up():
    """Held ones may be zero."""
    module = Indexed()
    with torch.no_grad():
        module.experts.zero_()
    [value] = [v for v in state_values(region_of(module), single=True).values() if v.dim() == 3]
    assert value.std() > 0.1


def test_two_first_choices_in_even_draws():
    region = region_of(Indexed())
    [logits] = [node for node, leaf in region.leaves.items() if leaf.kind == "logits"]
    firsts = [len(activation_values(region, draw, single=True)[logits].argmax(-1).unique()) for draw in (0, 1)]
    assert firsts[0] == 2 < firsts[1]


def test_redrawn_numbers_are_others():
    for value in (torch.zeros(4), torch.ones(4), torch.rand(2, 2), torch.arange(6)):
        assert not torch.equal(redrawn(value, 1), value)
