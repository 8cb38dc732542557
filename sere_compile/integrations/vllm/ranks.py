"""Several ranks: an expert that is computed elsewhere, and one choice of primary experts for the tokens of all ranks.

With data parallelism each rank routes tokens of its own, and the engine's kernels exchange them, so that all ranks'
tokens meet at the same experts; with sequence parallelism, so do the parts of one batch. vLLM's group of ranks
that meet is the expert-parallel one, whether experts are whole (`enable_expert_parallel`) or in slices.

Every rank of the group goes through the same MoE layers at the same time, dummy forwards of idle ranks included, for
the engine's own exchange demands it. A collective beside that exchange is as safe as the exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...errors import ProbeError
from ...ops import reroute
from ...ops.reroute.reference import leading_tokens

_NO_EXCHANGE = "MoEPrepareAndFinalizeNoDPEPModular"


def ranks_meet(moe_config: Any) -> bool:
    """Whether tokens that other ranks route are computed by the same experts."""
    return int(moe_config.dp_size) > 1 or bool(moe_config.is_sequence_parallel)


def part_of_rows(moe_config: Any) -> int:
    """Which of the equal parts of a batch's rows this rank routes; 0 where it routes all of them."""
    if not moe_config.is_sequence_parallel:
        return 0
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


@contextmanager
def own_rows_only(runner: Any) -> Iterator[bool]:
    """While open, a layer's experts take this rank's rows alone and leave out what other ranks' weights add.

    The engine's exchange counts on sizes that are known in a forward only. Without it a rank gives the share of
    its own weights, and the sum over the group is the layer.

    Yields:
        Whether outputs are such shares.

    Raises:
        ProbeError: experts in a format that comes out of the exchange, or whose places are known to it alone.
    """
    kernel: Any = getattr(runner._quant_method, "moe_kernel", None)
    exchange = getattr(kernel, "prepare_finalize", None)
    if exchange is None or type(exchange).__name__ == _NO_EXCHANGE:
        yield False
        return
    if reason := _bound_to_exchange(runner, kernel):
        raise ProbeError(
            f"behind {type(exchange).__name__} they cannot be run at start: {reason} (--all2all-backend "
            "allgather_reducescatter has others)"
        )
    from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular

    kernel.impl.prepare_finalize = MoEPrepareAndFinalizeNoDPEPModular()
    try:
        yield True
    finally:
        kernel.impl.prepare_finalize = exchange


@contextmanager
def experts_on_own_rows(
    runner: Any, vllm_config: Any, device: torch.device, rows: int
) -> Iterator[tuple[Callable[[Tensor, Tensor, Tensor], Tensor], bool]]:
    """While open, a layer's experts can be run outside of a forward: `own_rows_only`, in a forward's context.

    Args:
        runner: vLLM's layer.
        vllm_config: the engine's configuration.
        device: of the experts.
        rows: at most so many tokens, on every rank at the same time.

    Yields:
        A function of hidden states [T, H], logical ids and weights [T, K], which gives [T, H]; and whether that is
        this rank's share.

    Raises:
        ProbeError: see `own_rows_only`; also the function, where the kernel gives no plain tensor.
    """
    from vllm.forward_context import set_forward_context

    ranks, places = int(vllm_config.parallel_config.data_parallel_size), physical_experts(runner.router)
    runner.routed_experts._ensure_moe_quant_config_init()
    if device.type == "cpu":
        # Linux ends a process that uses AMX without having asked for it. torch asks before its
        # first product, vLLM's experts do not, and nothing but they has run yet.
        torch.cpu._init_amx()
    # The numbers of tokens are given, so that ranks need not ask each other.
    everywhere = torch.full((ranks,), rows, dtype=torch.int32) if ranks > 1 else None
    with (
        own_rows_only(runner) as shares,
        set_forward_context(None, vllm_config, num_tokens=rows, num_tokens_across_dp=everywhere),
    ):
        ids_dtype = runner._quant_method.topk_indices_dtype or torch.int32

        def experts(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            ids = ids if places is None else places[ids.long()]
            output = runner.routed_experts.forward_modular(
                x=hidden, topk_weights=weights.float().contiguous(), topk_ids=ids.to(ids_dtype).contiguous()
            )
            if not isinstance(output, Tensor):
                raise ProbeError("the kernel defers its output and cannot be run at start")
            return output

        yield experts, shares


def _bound_to_exchange(runner: Any, kernel: Any) -> str:
    """Why a kernel's experts cannot run on rows that were not exchanged; empty where they can."""
    experts = kernel.fused_experts
    # By name: since 0.34 there are experts that take rows of padding as well, and others still.
    if experts.activation_format().name not in ("Standard", "PaddedStandard"):
        return f"{type(experts).__name__} takes rows in the order in which the exchange leaves them"
    whole = runner.routed_experts
    if whole.expert_map is None and runner.moe_config.num_local_experts < whole.global_num_experts:
        return "which rank holds which expert is known to the exchange alone"
    return ""


def sum_of_shares(output: Tensor) -> Tensor:
    """What all ranks of the group gave, summed."""
    from vllm.distributed import get_ep_group

    return get_ep_group().all_reduce(output)


def physical_experts(router: Any) -> Tensor | None:
    """Under load balancing, for each logical expert a place that holds it, int64 [E]; else None.

    Raises:
        ProbeError: the engine has not placed experts yet.
    """
    if router.eplb_state is None:
        return None
    places = router.eplb_state.logical_to_physical_map
    if places is None:
        raise ProbeError("with load balancing (EPLB) they can be run only when they are placed")
    return places[:, 0].long()


class Meeting:
    """The ranks whose tokens are computed by the same experts. All of them have to make each call, at the same time.

    Args:
        all_reduce: sums an int32 tensor over the ranks, into a new one.
        num_experts: E.
        agreed: whether their tokens are one routing batch.
    """

    def __init__(self, all_reduce: Callable[[Tensor], Tensor], num_experts: int, agreed: bool) -> None:
        self._all_reduce = all_reduce
        self._num_experts = num_experts
        self.agreed = agreed

    def reroute(
        self,
        ids: Tensor,
        matrix: Tensor,
        numbers: tuple[int, float, int, int],
        active: Tensor,
        rerouted: Tensor,
        taking_part: Tensor,
    ) -> Tensor:
        """Ids [T, K], best first, re-routed as if one rank had the tokens of all.

        Args:
            ids: logical ids.
            matrix: similarity, float32 [E, E].
            numbers: S, rho, `min_active`, `max_active`.
            active: bool [1], whether this rank's forward is re-routed.
            rerouted: int64 [1], how many leading rows are; 0 leaves all of them.
            taking_part: int64 [1], how many leading rows are tokens; 0 in a forward that an idle rank makes up.
        """
        experts, (select, rho, min_active, max_active) = self._num_experts, numbers
        marks = self._all_reduce(marks_of(ids, experts, taking_part, active))
        everyone = rows_of(marks, ids)
        rows = torch.where(rerouted > 0, rerouted.clamp(max=ids.shape[0]) + experts, 0)
        together = torch.cat([everyone, ids])
        return reroute(together, matrix, select, rho, min_active, None, max_active, rows)[experts:]

    def active(self, ids: Sequence[Tensor], taking_part: Tensor) -> Tensor:
        """For each tensor of ids [T, K], how many experts the tokens of all ranks have in it, int64 [len(ids)]."""
        slots = torch.zeros(1, dtype=torch.bool, device=taking_part.device)
        mine = [marks_of(each, self._num_experts, taking_part, slots)[0] for each in ids]
        return (self._all_reduce(torch.stack(mine)) > 0).sum(1)


def marks_of(ids: Tensor, num_experts: int, taking_part: Tensor, active: Tensor) -> Tensor:
    """Which experts a rank's tokens have in which slot, int32 [K, E] of 0 and 1.

    A rank whose forward is not re-routed reads all experts that its tokens chose, whatever others decide: each of
    them counts as a token's first, so that others keep it rather than go to another.

    Args:
        ids: [T, K], best first; numbers that name no expert are left out.
        num_experts: E.
        taking_part: int64 [1], how many leading rows count.
        active: bool [1], whether this rank's forward is re-routed.
    """
    tokens, top_k = ids.shape
    known = (ids >= 0) & (ids < num_experts) & leading_tokens(tokens, taking_part)[:, None]
    slots = torch.where(active, torch.arange(top_k, device=ids.device), 0)
    # What does not count goes to one place more.
    places = torch.where(known, slots * num_experts + ids.long(), top_k * num_experts)
    marks = torch.zeros(top_k * num_experts + 1, dtype=torch.int32, device=ids.device)
    return marks.scatter_(0, places.flatten(), 1)[:-1].view(top_k, num_experts)


def rows_of(marks: Tensor, ids: Tensor) -> Tensor:
    """Tokens that have the marked experts in the marked slots: ids [E, K], -1 elsewhere, of the type of `ids`."""
    experts = torch.arange(marks.shape[1], dtype=ids.dtype, device=ids.device)
    return torch.where(marks > 0, experts, -1).T.contiguous()
