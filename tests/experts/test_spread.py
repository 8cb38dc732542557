"""What is seen of other ranks in a module; DTensors in a group of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from sere_compile.experts.spread import is_distributed, spread_over_ranks


@pytest.fixture
def mesh(request):
    """Two ranks, or as many as asked for, of which this process is the first; nothing is ever exchanged."""
    ranks = getattr(request, "param", 2)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    yield init_device_mesh("cpu", (ranks,))
    dist.destroy_process_group()


def test_parameters_of_which_a_rank_holds_a_part(mesh):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert spread_over_ranks(model) == ""
    part = distribute_tensor(model[1].weight.detach(), mesh, [Shard(0)], src_data_rank=None)
    assert is_distributed(part)
    assert not is_distributed(part.to_local())
    model[1].weight = nn.Parameter(part)
    assert spread_over_ranks(model) == "1.weight is spread over ranks"


def test_a_module_that_keeps_a_group_or_a_mesh(mesh):
    for kept in (mesh, mesh.get_group()):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        model[1].group = kept
        assert spread_over_ranks(model) == "1 exchanges with other ranks"


@pytest.mark.parametrize("mesh", [1], indirect=True)
def test_a_group_of_one_rank_exchanges_nothing(mesh):
    layer = nn.ReLU()
    layer.group, layer.mesh, layer._is_hooked = mesh.get_group(), mesh, True
    assert spread_over_ranks(layer) == ""


def test_the_mark_of_a_parallel_layer_of_transformers(mesh):
    layer = nn.Linear(2, 2)
    assert spread_over_ranks(layer) == ""
    layer._is_hooked = True
    assert spread_over_ranks(layer) == "Linear exchanges with other ranks"


def test_one_process_has_no_other_ranks():
    """The mark alone is also set by hand, to let a quantised layer call its router."""
    layer = nn.Linear(2, 2)
    layer._is_hooked = True
    assert spread_over_ranks(layer) == ""
    assert not is_distributed(torch.ones(1))
