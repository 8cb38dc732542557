"""Finding the module that owns a weight."""

import torch
from torch import nn

from sere_compile.experts import owner as owner_module
from sere_compile.experts.owner import Owners, find_owner

from ..tiny_models import build, gate_names


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


def test_one_scan_answers_for_every_weight(monkeypatch):
    """The heap is scanned at the first question, and not again, whatever is asked."""
    model = build("mixtral")
    scans = []
    scan = owner_module.live_modules
    monkeypatch.setattr(owner_module, "live_modules", lambda: scans.append(1) or scan())
    owners = Owners()
    assert scans == []
    assert [owners.find(model.get_parameter(name)).name for name in gate_names()] == gate_names()
    assert owners.find(nn.Parameter(torch.ones(2))) is None
    assert scans == [1]
    owner = owners.find(model.get_parameter(gate_names()[0]))
    assert owner.weight is model.get_parameter(gate_names()[0])
