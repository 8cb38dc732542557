"""The hidden states that experts are run on where there is no data."""

import pytest
import torch
from torch import nn

import sere_compile
from sere_compile import SereConfig, sere_backend
from sere_compile.experts.hidden_states import hidden_size_of
from sere_compile.passes import find_gates
from sere_compile.similarity import binding

from ..thinned import thinned

EXPERTS, HIDDEN, FURTHER = 5, 6, 2


class Experts(nn.Module):
    """Experts that no graph shows, with the signature of those of transformers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN))

    @torch.compiler.disable
    def forward(self, hidden_states, top_k_index, top_k_weights):
        outputs = torch.einsum("th,ehd->ted", hidden_states, self.weight)
        chosen = outputs.gather(1, top_k_index[..., None].expand(-1, -1, HIDDEN))
        return (chosen * top_k_weights[..., None]).sum(1)


class Layer(nn.Module):
    """A router of any form beside experts that run outside the graph.

    Args:
        form: "rows", the weight is [E, H]; "columns", [H, E]; "further", [E + 2, H], of which 2 are no experts'.
    """

    def __init__(self, form):
        super().__init__()
        self.form, self.experts = form, Experts()
        shape = {"rows": (EXPERTS, HIDDEN), "columns": (HIDDEN, EXPERTS), "further": (EXPERTS + FURTHER, HIDDEN)}
        self.router = nn.Parameter(torch.randn(shape[form]))

    def forward(self, x):
        logits = x @ (self.router if self.form == "columns" else self.router.T)
        weights, ids = torch.topk(logits[..., :EXPERTS].softmax(-1), 2)
        return self.experts(x, ids, weights)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("form", ["rows", "columns", "further"])
def test_hidden_size(form):
    """H, by whatever form the router's weight has."""
    layer, found = Layer(form), []

    def inner(module, inputs):
        found.extend(find_gates(module, lambda weight, columns: EXPERTS).gates)
        return module.forward

    torch.compile(layer, backend=inner)(torch.randn(4, HIDDEN))
    [gate] = found
    assert hidden_size_of(layer.router, gate) == HIDDEN


@pytest.mark.parametrize("form", thinned(["rows", "columns", "further"], (1,)))
def test_probing_beside_the_router(form):
    """Experts outside the graph are probed, whatever the form of the router's weight: twins are alike."""
    layer = Layer(form)
    with torch.no_grad():
        layer.experts.weight[3] = layer.experts.weight[1]
        torch.compile(layer, backend=sere_backend.with_options(select_top_k=1, inner="eager"))(torch.randn(4, HIDDEN))
    matrix = binding.lookup(layer.router).matrix
    assert matrix.shape == (EXPERTS, EXPERTS)
    assert matrix[1, 3].item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("form", thinned(["rows", "columns", "further"], (1,)))
def test_the_experts_outside_are_proven(form):
    """They are run on made-up choices, whatever the form of the router's weight."""
    report = sere_compile.explain(Layer(form), torch.randn(4, HIDDEN), config=SereConfig(select_top_k=1))
    [row] = report.gates
    assert row.proof.endswith("the code outside the graph was run")
