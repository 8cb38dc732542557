"""The oracle's map, and the exchange of experts' parameters."""

import random

import pytest
import torch
from torch import nn

from sere_compile.testing import reroute_oracle

from .oracle import exchange
from .rerouting import expert_map

SIMILARITY = [
    [1.0, 0.2, 0.9, 0.4],
    [0.2, 1.0, 0.3, 0.3],
    [0.9, 0.3, 1.0, 0.1],
    [0.4, 0.3, 0.1, 1.0],
]


class TestMap:
    def test_an_expert_goes_to_the_most_similar_primary_one(self):
        """Primary are 0 and 3; 2 is nearest to 0, 1 nearer to 3."""
        assert expert_map([[0, 2], [3, 1]], SIMILARITY, 1) == [0, 3, 0, 3]

    def test_ties_go_to_the_lowest(self):
        assert expert_map([[3, 0], [2, 1]], SIMILARITY, 1) == [2, 2, 2, 3]

    def test_a_critical_expert_stays(self):
        assert expert_map([[0, 2], [3, 1]], SIMILARITY, 1, threshold=0.35) == [0, 1, 0, 3]

    def test_padding_is_no_primary_expert_and_stays(self):
        assert expert_map([[-1, 4], [3, 1]], SIMILARITY, 1) == [0, 3, 2, 3]

    @pytest.mark.parametrize("select_top_k", [0, 2, 5])
    def test_nothing_moves(self, select_top_k):
        assert expert_map([[0, 2], [3, 1]], SIMILARITY, select_top_k) == [0, 1, 2, 3]

    def test_the_loops_of_the_library_agree(self):
        """Two implementations that share nothing, over random batches."""
        rng = random.Random(0)
        for _ in range(300):
            experts, top_k = rng.randint(2, 9), rng.randint(1, 4)
            ids = [rng.sample(range(-1, experts + 1), min(top_k, experts)) for _ in range(rng.randint(1, 6))]
            matrix = torch.randint(0, 5, (experts, experts)).float() / 4
            rho, select = rng.choice([0.0, 0.5]), rng.randint(0, top_k)
            mapping = expert_map(ids, matrix.tolist(), select, rho)
            want = reroute_oracle(torch.tensor(ids), matrix, select, rho)
            got = [[mapping[u] if 0 <= u < experts else u for u in token] for token in ids]
            assert got == want.tolist()


class TestExchange:
    def test_stacked_parameters(self):
        """The last row, a shared expert, lies behind the map."""
        layer = nn.Linear(2, 4)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(8.0).view(4, 2))
            exchange(layer, "weight", [1, 1, 0])
        assert layer.weight[:, 0].tolist() == [2.0, 2.0, 0.0, 6.0]

    def test_lists_of_parameters(self):
        layer = nn.Module()
        layer.add_module("w", nn.ParameterList([*torch.arange(3.0).view(3, 1)]))
        with torch.no_grad():
            exchange(layer, "w", [2, 1, 1])
        assert [value.item() for value in layer.parameters()] == [2.0, 1.0, 1.0]

    def test_modules(self):
        experts = nn.ModuleList([nn.Linear(1, 1) for _ in range(3)])
        branch, layer = nn.Module(), nn.Module()
        branch.add_module("experts", experts)
        layer.add_module("branch", branch)
        before = [value.item() for value in experts.parameters()][::2]
        exchange(layer, "branch.experts", [2, 1, 1])
        after = [value.item() for value in experts.parameters()][::2]
        assert after == [before[2], before[1], before[1]]
