"""What is computed of the model's state alone."""

import torch

from sere_compile.passes.graph.state import computed_of_state

from ..moe_modules import Indexed, from_make_fx, rows


class Parts(Indexed):
    def forward(self, x):
        return x @ (self.experts[0] + self.router[:, :1].sum())


def test_sums_of_parts_are_and_products_with_activations_are_not():
    graph = from_make_fx(Parts(), rows())
    by_kind = {str(node.target): node for node in graph.graph.nodes}
    assert computed_of_state(by_kind["aten.add.Tensor"])
    assert not computed_of_state(by_kind["aten.mm.default"])
    assert torch.is_tensor(by_kind["aten.add.Tensor"].meta["val"])
