"""Gates that are not re-routed beside gates that are: told in a warning, or an error with `strict=True`."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sere_compile
from sere_compile import GateNotFoundError, SimilarityProfile, sere_backend
from sere_compile.compiler.missing_gates import routers_outside
from sere_compile.experts.owner import routers_in

from ..zoo.outside.loops import EXPERTS, HIDDEN, Loop, MaskLoop


class Stacked(nn.Module):
    """A layer that Dynamo captures whole."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN))

    def forward(self, x):
        weights, ids = torch.topk(self.gate(x).softmax(-1), 3)
        return ((x[..., None, None, :] @ self.experts[ids]).squeeze(-2) * weights[..., None]).sum(-2)


class Both(nn.Module):
    """A captured layer, then another, both under names of their own; further modules that no call runs."""

    def __init__(self, second, **unused):
        super().__init__()
        self.first, self.second = Stacked(), second
        for name, module in unused.items():
            setattr(self, name, module)

    def forward(self, x):
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y)


class Router(nn.Module):
    """A router whose ids leave its graph."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, rows):
        return torch.topk(self.gate(rows).softmax(-1), 3)


class RoutedLoop(MaskLoop):
    """A loop whose frame Dynamo skips, with a router that is captured for itself."""

    def __init__(self):
        super().__init__()
        self.router = Router(self.gate)
        del self.gate

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = self.router(rows)
        y = torch.zeros_like(rows)
        for mask, expert in zip((ids[..., None] == torch.arange(EXPERTS)).permute(2, 0, 1), self.experts, strict=True):
            token, slot = torch.where(mask)
            y[token] += weights[token, slot, None] * expert(rows[token])
        return y.view(x.shape)


class Checkpointed(Stacked):
    """The same layer in a nested graph."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, **options):
    """The model with a random profile for every router, and rows for a call."""
    model.eval().requires_grad_(False)
    matrix = torch.rand(EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(1)).fill_diagonal_(1.0)
    names = [router.name for router in routers_in(model)]
    sere_compile.attach(model, SimilarityProfile(dict.fromkeys(names, (matrix + matrix.T) / 2)))
    backend = sere_backend.with_options(select_top_k=1, inner="eager", **options)
    return torch.compile(model, backend=backend), torch.randn(2, 4, HIDDEN)


def test_routers_are_known_by_what_stands_around_them():
    """The experts' own weights and other matrices are none."""
    model = Both(MaskLoop(), head=nn.Linear(HIDDEN, EXPERTS), shared=nn.ModuleList([Loop()]))
    assert [router.name for router in routers_in(model)] == [
        "first.gate.weight",
        "second.gate.weight",
        "shared.0.gate.weight",
    ]


def test_a_table_of_words_is_no_router():
    """Also where a model has as many words as layers."""
    model = nn.Module()
    model.words, model.layers = nn.Embedding(EXPERTS, HIDDEN), nn.ModuleList([nn.Linear(1, 1) for _ in range(EXPERTS)])
    assert routers_in(model) == []
    model.words = nn.Linear(HIDDEN, EXPERTS, bias=False)
    assert [router.name for router in routers_in(model)] == ["words.weight"]


def test_layers_are_no_experts():
    """A head with as many labels as there are layers is no router: layers list modules of their own."""
    model = nn.Module()
    model.head, model.layers = nn.Linear(HIDDEN, EXPERTS), nn.ModuleList([MaskLoop() for _ in range(EXPERTS)])
    assert "head.weight" not in [router.name for router in routers_in(model)]


class TestOutsideEveryGraph:
    def test_it_is_told_once_when_the_second_call_begins(self, caplog):
        model, x = compiled(Both(MaskLoop()))
        with caplog.at_level(logging.WARNING, logger="sere_compile"):
            model(x)
            assert caplog.records == []
            model(x)
            model(x)
        [record] = caplog.records
        assert "these gates run outside every graph" in record.message
        assert "second.gate.weight" in record.message
        assert "first" not in record.message

    def test_strict_raises(self):
        model, x = compiled(Both(MaskLoop()), strict=True)
        model(x)
        with pytest.raises(GateNotFoundError, match=r"second\.gate\.weight"):
            model(x)

    def test_captured_loops_are_no_reason(self, caplog):
        """Capture brings both into a graph."""
        model = Both(MaskLoop())
        compiled(model)
        auto = sere_compile.compile(model, select_top_k=1, inner="eager", strict=True)
        for _ in range(2):
            auto(torch.randn(2, 4, HIDDEN))
        assert caplog.records == []

    @pytest.mark.parametrize(
        ("second", "later"),
        [(nn.Linear(HIDDEN, HIDDEN), Stacked), (RoutedLoop(), RoutedLoop), (RoutedLoop(), MaskLoop)],
    )
    def test_what_no_call_runs_is_no_reason(self, caplog, second, later):
        """A layer that waits for another call: of captured code, around a captured router, or never met."""
        model, x = compiled(Both(second, later=later()), strict=True)
        for _ in range(3):
            model(x)
        assert caplog.records == []

    def test_without_weights_nothing_is_known(self):
        assert routers_outside(nn.Linear(2, 2), []) == []


class TestRefusedBesideOthers:
    """A nested graph's gate is refused while the layer before it is re-routed."""

    def test_it_is_told_at_compile_time(self, caplog):
        model, x = compiled(Both(Checkpointed()))
        with caplog.at_level(logging.WARNING, logger="sere_compile"):
            model(x)
        [record] = caplog.records
        assert "is not re-routed: it is inside a nested graph" in record.message
        assert "switch checkpointing off" in record.message

    def test_strict_raises(self):
        model, x = compiled(Both(Checkpointed()), strict=True)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="inside a nested graph"):
            model(x)
