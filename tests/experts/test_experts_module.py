"""Finding the experts beside a router."""

import torch
from torch import nn

from sere_compile.experts import experts_module
from sere_compile.experts.owner import find_owner

from ..tiny_models import build, gate_names, tokens


def find_experts(weight, num_experts):
    return experts_module.find_experts(find_owner(weight), num_experts)


def experts_stand_beside(weight, num_experts):
    return experts_module.experts_stand_beside(find_owner(weight), num_experts)


def count_experts_beside(weight, columns):
    return experts_module.count_experts_beside(find_owner(weight), columns)


def test_experts_beside_the_router():
    """The experts module of each layer is found from its router's weight."""
    model = build("mixtral")
    for name in gate_names():
        assert find_experts(model.get_parameter(name), 8) is model.get_submodule(name.replace("gate.weight", "experts"))
        assert find_experts(model.get_parameter(name), 9) is None


class ListBlock(nn.Module):
    """Experts as a list of modules, called in a loop by the block itself."""

    def __init__(self, hidden=6, experts=5):
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(experts))


def test_list_of_experts_sums_slots():
    """A list of expert modules becomes a function of (hidden, ids, weights), duplicates summed."""
    torch.manual_seed(0)
    block = ListBlock()
    experts = find_experts(block.router.weight, 5)
    hidden, weights = torch.randn(3, 6), torch.rand(3, 2)
    ids = torch.tensor([[0, 4], [2, 2], [1, 0]])
    expected = torch.stack(
        [
            sum(w * block.experts[e](h) for w, e in zip(ws, es, strict=True))
            for h, ws, es in zip(hidden, weights, ids.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(experts(hidden, ids, weights), expected)


def test_a_list_of_what_cannot_be_called_is_no_list_of_experts():
    """As many dictionaries of modules as experts: layers whose parts are called one by one."""
    block = ListBlock()
    block.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 6)}) for _ in range(5))
    assert find_experts(block.router.weight, 5) is None


def test_vocabulary_head_has_no_experts():
    """A matrix that is no router has no experts beside it."""
    model = build("mixtral")
    model(tokens())
    assert find_experts(model.lm_head.weight, 96) is None


class FlatExperts(nn.Module):
    """Experts stacked in two dimensions, as DBRX does: only a number tells how many they are."""

    def __init__(self, hidden=6, experts=5):
        super().__init__()
        self.num_experts = experts
        self.weight = nn.Parameter(torch.randn(experts * 4, hidden))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


class SortedRows(nn.Module):
    """Experts that take sorted rows and counts instead of ids, as JetMoE's do."""

    def __init__(self, hidden=6, experts=5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, hidden, hidden))

    def forward(self, rows, counts):
        return rows


def block_with(experts):
    block = nn.Module()
    block.router = nn.Linear(6, 5, bias=False)
    block.experts = experts
    return block


def test_flat_stack_of_experts():
    """The number of experts is taken from the module that has the signature of experts."""
    block = block_with(FlatExperts())
    assert find_experts(block.router.weight, 5) is block.experts
    assert find_experts(block.router.weight, 4) is None


def test_experts_that_cannot_be_called_with_ids_are_evidence():
    """They are seen beside the router, though nothing can probe them."""
    block = block_with(SortedRows())
    assert find_experts(block.router.weight, 5) is None
    assert experts_stand_beside(block.router.weight, 5)
    assert not experts_stand_beside(block.router.weight, 4)
    assert not experts_stand_beside(build("mixtral").lm_head.weight, 96)


def test_lists_of_weights_are_evidence_and_lists_of_numbers_are_none():
    block = block_with(nn.Identity())
    block.weights = nn.ParameterList(torch.rand(3, 6) for _ in range(5))
    assert experts_stand_beside(block.router.weight, 5)
    assert not experts_stand_beside(block.router.weight, 4)
    block.weights = nn.ParameterList(torch.rand(3) for _ in range(5))
    assert not experts_stand_beside(block.router.weight, 5)


def test_experts_that_compute_nothing_are_not_counted():
    """LongCat's identity experts have a row in the first stack of weights and none in the second."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.rand(6, 4, 4)), nn.Parameter(torch.rand(4, 4, 4))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(4, 6), Experts()

    layer = Layer()
    assert count_experts_beside(layer.gate.weight, 6) == 4
    assert count_experts_beside(layer.gate.weight, 5) == 0
