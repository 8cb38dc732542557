"""Proofs on a rank that holds a part of the experts, in a group of which nothing is ever sent."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from sere_compile.experts.spread import is_distributed
from sere_compile.passes import Proof, SkipReason, UseKind, find_gates
from sere_compile.passes.graph import nodes

from ..moe_modules import EXPERTS, HIDDEN, Indexed, from_dynamo, one_gate, rows
from ..test_verify_rewrite import verified, with_kinds


@pytest.fixture(params=[0, 1], ids=["first", "last"])
def mesh(request):
    """Two ranks, of which this process is one."""
    dist.init_process_group("fake", rank=request.param, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


class OwnExperts(Indexed):
    """As expert parallelism does: ids are mapped to a rank's own numbers, and slots of other ranks weigh nothing."""

    def __init__(self, mesh):
        super().__init__()
        self.mesh, self.place = mesh, mesh.get_local_rank()
        whole = self.experts.detach()
        self.experts = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))

    def dispatch(self, x, ids, weights):
        own = self.experts.to_local()
        elsewhere = ids // (EXPERTS // 2) != self.place
        local = torch.where(elsewhere, 0, ids % (EXPERTS // 2))
        y = torch.tanh(x[:, None, None, :] @ own[local])
        return (self.between(y.squeeze(2)) * weights.masked_fill(elsewhere, 0.0)[..., None]).sum(1)

    def between(self, y):
        return y


class Summed(OwnExperts):
    """Slots are summed over ranks before they are weighed, in the midst of the dispatch."""

    def between(self, y):
        return all_reduce(y, "sum", self.mesh.get_group())


class DividedRouter(Indexed):
    """As torch's tensor parallelism divides a linear layer by columns; `whole` puts the columns together again."""

    def __init__(self, mesh, whole=True):
        super().__init__()
        self.mesh, self.whole = mesh, whole
        router = self.router.detach()
        self.router = nn.Parameter(distribute_tensor(router, mesh, [Shard(0)], src_data_rank=None))

    def scores(self, x):
        logits = F.linear(DTensor.from_local(x, self.mesh, [Replicate()]), self.router)
        return (logits.redistribute(placements=[Replicate()]) if self.whole else logits).to_local().softmax(-1)


def test_a_router_that_is_a_distributed_tensor(mesh):
    graph = from_dynamo(DividedRouter(mesh), rows())
    gate = one_gate(graph)
    assert is_distributed(nodes.value(gate.router_weight))
    assert gate.router_input.op == "placeholder"
    assert isinstance(verified(graph), Proof)


def test_some_columns_of_a_router_are_none(mesh):
    found = find_gates(from_dynamo(DividedRouter(mesh, whole=False), rows()))
    assert not found.gates
    assert SkipReason.NO_ROUTER in [skip.reason for skip in found.skips]


def test_a_part_of_the_experts_is_proven(mesh):
    proof = verified(from_dynamo(OwnExperts(mesh), rows()))
    assert isinstance(proof, Proof), proof
    assert not proof.merged
    assert [nodes.kind(node) for node in proof.experts] == ["to_local"]
    assert [nodes.shape(node) for node in proof.experts] == [(EXPERTS // 2, HIDDEN, HIDDEN)]


def test_a_mask_that_sees_the_old_ids_is_caught(mesh):
    """A wrong rule that leaves one of the two uses as it is."""
    graph = from_dynamo(OwnExperts(mesh), rows())
    gate = one_gate(graph)
    assert [nodes.kind(use.consumer) for use in gate.dispatch_uses] == ["floor_divide", "where"]
    for left in gate.dispatch_uses:
        wrong = with_kinds(gate, lambda use: dataclasses.replace(use, kind=UseKind.LOOK_UP) if use == left else use)  # noqa: B023
        assert len(wrong.dispatch_uses) == 1
        refusal = verified(graph, wrong)
        assert refusal.reason in (SkipReason.UNVERIFIED, SkipReason.WEIGHTS_LATE)
        assert "is off by" in refusal.detail


def test_an_exchange_in_the_midst_is_refused_before_it_runs(mesh):
    refusal = verified(from_dynamo(Summed(mesh), rows()))
    assert refusal.reason is SkipReason.UNVERIFIED
    assert "waits for other ranks" in refusal.detail
