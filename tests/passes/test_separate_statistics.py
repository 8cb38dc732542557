"""A loss of the router's load gets a table of its own, so that the dispatch can read another."""

import pytest
import torch
from torch import nn

import sere_compile
from sere_compile import SimilarityProfile
from sere_compile.passes import UseKind, find_gates, separate_statistics
from sere_compile.passes.graph import nodes

from .moe_modules import from_dynamo

EXPERTS, HIDDEN, TOP_K = 6, 8, 2


class Table(nn.Module):
    """A dispatch by a table [T, E], and what is made of the same table beside it."""

    def __init__(self, beside):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN))
        self.beside = beside

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        table = torch.zeros(len(x), EXPERTS).scatter(1, ids, weights)
        made = torch.einsum("te,eij,ti->tj", table, self.w, x)
        return made, self.beside(table)


class InPlace(Table):
    """Counts that are written in place, and split the sorted slots as well."""

    def __init__(self):
        super().__init__(None)
        self.register_buffer("load", torch.zeros(EXPERTS))

    def forward(self, x):
        _, ids = self.gate(x).softmax(-1).topk(TOP_K)
        flat = ids.flatten()
        counts = torch.zeros(EXPERTS)
        counts.scatter_add_(0, flat, torch.ones(flat.shape))
        self.load.add_(counts)
        return counts.cumsum(0)


def rows():
    return torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))


def separated(model):
    """The copies, and the graph, which computes the same bits as before."""
    graph = from_dynamo(model, rows())
    given = [value.detach() for value in graph.captured_inputs]
    before = graph(*given)
    made = separate_statistics(graph.graph)
    graph.graph.lint()
    graph.recompile()
    assert all(torch.equal(a, b) for a, b in zip(graph(*given), before, strict=True))
    return made, graph


@pytest.mark.parametrize(
    "loss",
    [
        lambda table: table.sum(0).var(),
        lambda table: (table > 0).sum(0).float().var() / (table.sum(0).mean() ** 2 + 1e-6),
        lambda table: table.mean(0).square().sum() * EXPERTS,
    ],
    ids=["importance", "load", "mean"],
)
def test_a_loss_reads_a_table_of_its_own(loss):
    made, graph = separated(Table(loss))
    assert [nodes.kind(node) for node in made] == ["scatter"]
    [gate] = find_gates(graph).gates
    kinds = {use.consumer is made[0]: use.kind for use in gate.uses}
    assert kinds[True] is UseKind.STATISTIC
    assert kinds[False].dispatches
    assert separate_statistics(graph.graph) == []


def test_a_buffer_of_counts_reads_counts_of_its_own():
    made, graph = separated(InPlace())
    assert [nodes.kind(node) for node in made] == ["scatter_add"]
    add = next(node for node in graph.graph.nodes if nodes.kind(node) == "add")
    assert nodes.writes(made[0])[0] in add.all_input_nodes


@pytest.mark.parametrize(
    "beside",
    [lambda table: table * 2, lambda table: table.sum(0), lambda table: (table > 0).sum(0), lambda table: table.sum(1)],
    ids=["rows", "a load that leaves", "counts that leave", "a number a token"],
)
def test_what_may_be_more_than_a_statistic_shares_the_table(beside):
    made, _ = separated(Table(beside))
    assert made == []


def test_a_model_with_such_a_loss_is_rerouted_and_its_loss_stays():
    model = Table(lambda table: table.sum(0).var()).requires_grad_(False)
    matrix = torch.rand(EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(1))
    sere_compile.attach(model, SimilarityProfile({"gate.weight": ((matrix + matrix.T) / 2).fill_diagonal_(1.0)}))
    made, loss = model(rows())
    rerouted, same = sere_compile.compile(model, capture="default", select_top_k=1, min_active=0, inner="eager")(rows())
    assert torch.equal(loss, same)
    assert not torch.allclose(made, rerouted)
