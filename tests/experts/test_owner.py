"""Finding the module that owns a weight."""

import gc

import pytest
import torch
from torch import nn

import sere_compile
from sere_compile import sere_backend
from sere_compile.experts import owner as owner_module
from sere_compile.experts.owner import Owners, find_owner

from ..thinned import thinned
from ..tiny_models import build, gate_names, random_profile, tokens


def test_owner_of_every_router():
    """The name is the one in the outermost module, also when torch.compile wraps it."""
    model = build("qwen2_moe")
    wrapped = torch.compile(model, backend="eager")
    for name in gate_names():
        owner = find_owner(model.get_parameter(name))
        assert owner.name == name
        assert owner.root is model
    assert wrapped._orig_mod is model


def test_no_owner():
    """A tensor that no module holds has none."""
    assert find_owner(nn.Parameter(torch.ones(2))) is None


@pytest.fixture
def scans(monkeypatch):
    """Grows with each scan of the heap."""
    scans, scan = [], owner_module.live_modules
    monkeypatch.setattr(owner_module, "live_modules", lambda: scans.append(1) or scan())
    return scans


@pytest.mark.parametrize(("how", "expected"), thinned([("probed", 1), ("per_gate", 1), ("attached", 0)], (1, 2)))
def test_one_scan_for_a_compiled_graph(scans, how, expected):
    """However many layers it holds, whatever is asked of their weights; none where a profile has every answer."""
    torch._dynamo.reset()
    model = build("mixtral", "grouped_mm")
    if how == "attached":
        sere_compile.attach(model, random_profile(model))
    options = {"per_gate": {"*.0.*": {"threshold": 0.1}}} if how == "per_gate" else {}
    compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager", **options))
    with torch.no_grad():
        for _ in range(2):
            compiled(tokens(), use_cache=False)
    assert len(gate_names()) > 1
    assert len(scans) == expected


@pytest.mark.slow
def test_few_scans_for_each_layer_that_shares_a_graph(scans):
    """Where Dynamo runs one graph for all layers, each layer's weight is met in a call of its own.

    Of the first layer by the compiler, of the others by the guard on what their experts compute and
    by the binding; and once more when the second call begins, to look for routers outside.
    """
    torch._dynamo.reset()
    model = build("mixtral", "eager")
    compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager"))
    with torch.no_grad():
        for _ in range(2):
            compiled(tokens(), use_cache=False)
    assert len(scans) == 2 * len(gate_names())


def test_one_scan_answers_for_every_weight(scans):
    """The heap is scanned at the first question, and not again, whatever is asked."""
    model = build("mixtral")
    owners = Owners()
    assert scans == []
    assert [owners.find(model.get_parameter(name)).name for name in gate_names()] == gate_names()
    assert owners.find(nn.Parameter(torch.ones(2))) is None
    assert scans == [1]
    owner = owners.find(model.get_parameter(gate_names()[0]))
    assert owner.weight is model.get_parameter(gate_names()[0])


class Asking(nn.Module):
    """Finds the owner of a weight of its own while it is called, as a backend does."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self):
        return find_owner(self.inner.weight)


def test_a_model_that_the_collector_has_set_aside_is_found_while_it_runs():
    model = Asking()
    gc.freeze()
    try:
        assert find_owner(model.inner.weight) is None
        owner = model()
    finally:
        gc.unfreeze()
    assert owner.root is model
    assert owner.name == "inner.weight"
