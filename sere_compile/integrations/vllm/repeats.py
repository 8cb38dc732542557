"""Experts kernels that take a token's experts for different ones: re-routed slots often name the same.

Most kernels of vLLM compute each slot on its own. Its Triton kernels for MXFP4 (gpt-oss) keep a token's experts as a
set of bits: a second slot of an expert is not counted, and its row is computed with whatever comes next. So at start
each kind of kernel computes tokens that name an expert twice, which have to get what its weights' sum gives them.
Where they do not, the kernel is handed tokens whose slots of one expert were made one, if it is right with these.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ProbeError
from ...ops.repeats import merge_repeats
from .engine import EngineMismatchError
from .ranks import own_rows_only, physical_experts

log = logging.getLogger("vllm.sere_compile")

TOKENS = 32
# How far the outputs may be apart, relative to their norm: products of the same numbers, weighted before or after
# they are rounded.
TOLERANCE = 0.02
# Known to need it, for where nothing can be compared.
_OF_SETS = ("OAITritonExperts", "UnfusedOAITritonExperts")


def merge_where_needed(runners: Mapping[str, Any], vllm_config: Any, device: torch.device) -> int:
    """Hand kernels that need it tokens whose slots of one expert were made one. Returns in how many layers.

    Args:
        runners: vLLM's MoE layers whose slots may come to name one expert, by name.
        vllm_config: the engine's configuration.
        device: of the experts.

    Raises:
        EngineMismatchError: a kernel computes neither the one nor the other.
    """
    needed: dict[tuple[Any, ...], bool] = {}
    for name, runner in runners.items():
        kind = _kind(runner)
        if kind not in needed:
            needed[kind] = _needs_merging(name, runner, vllm_config, device)
        if needed[kind]:
            merge_before(_experts(runner))
    merged = sum(needed[_kind(runner)] for runner in runners.values())
    if merged:
        log.info(
            "SERE: slots of a token that name one expert are made one in %d of %d MoE layers", merged, len(runners)
        )
    return merged


def _experts(runner: Any) -> Any:
    """What computes a layer's slots; None where its method does so itself, as on CPUs."""
    return getattr(getattr(runner._quant_method, "moe_kernel", None), "fused_experts", None)


def _kind(runner: Any) -> tuple[Any, ...]:
    """What decides which kernel a layer gets."""
    moe = runner.moe_config
    sizes = (moe.num_logical_experts, moe.experts_per_token, moe.hidden_dim)
    return (type(runner._quant_method), type(_experts(runner)), *map(int, sizes))


def _needs_merging(name: str, runner: Any, vllm_config: Any, device: torch.device) -> bool:
    if int(runner.moe_config.experts_per_token) < 2:
        return False
    experts = _experts(runner)
    kernel = type(runner._quant_method if experts is None else experts).__name__
    try:
        if _is_right(runner, vllm_config, device):
            return False
        right = experts is not None and _is_right_merged(runner, vllm_config, device)
    except ProbeError as error:
        known = kernel in _OF_SETS
        log.warning(
            "SERE: whether %s computes a token right that names an expert twice could not be tried (%s); %s",
            kernel, error, "it is known not to, so such slots are made one" if known else "it is taken to",
        )  # fmt: skip
        return known
    if not right:
        raise EngineMismatchError(
            f"{name}: {kernel} does not compute a token right whose slots name one expert twice, as re-routed ones do: "
            'choose another --moe-backend, or substitution="fill", which leaves experts different'
        )
    return True


def _is_right_merged(runner: Any, vllm_config: Any, device: torch.device) -> bool:
    take_back = merge_before(_experts(runner))
    try:
        return _is_right(runner, vllm_config, device)
    finally:
        take_back()


def merge_before(experts: Any) -> Callable[[], None]:
    """Let an experts object see a token's slots of one expert as one. Returns what takes that back."""
    original, own = experts.apply, vars(experts).get("apply")

    def apply(
        output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
        *others: Any, **named: Any,
    ) -> Any:  # fmt: skip
        topk_ids, topk_weights = merge_repeats(topk_ids, topk_weights)
        return original(output, hidden_states, w1, w2, topk_weights, topk_ids, *others, **named)

    experts.apply = apply

    def take_back() -> None:
        if own is None:
            del experts.apply
        else:
            experts.apply = own

    return take_back


def _is_right(runner: Any, vllm_config: Any, device: torch.device) -> bool:
    """Whether tokens whose last slot names their first one's expert get what the sum of both weights gives."""
    hidden, weights, ids = _tokens(runner, device, seed=0)
    whole, repeated = weights.clone(), ids.clone()
    whole[:, 0] += whole[:, -1]
    whole[:, -1] = 0
    repeated[:, -1] = repeated[:, 0]
    run = _runner(runner, vllm_config, device)
    expected = run(hidden, whole, ids)
    if not expected.isfinite().all():
        raise ProbeError("its outputs on random hidden states are not finite")
    # What a kernel leaves as it was must not be what is expected.
    run(*_tokens(runner, device, seed=1))
    got = run(hidden, weights, repeated)
    # Not "apart > ...", which a NaN would pass.
    return bool((got - expected).norm() <= TOLERANCE * expected.norm())


def _tokens(runner: Any, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, H], weights [T, K] and ids [T, K] of different experts."""
    moe, generator = runner.moe_config, torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, int(moe.hidden_dim), generator=generator).to(device, moe.in_dtype)
    scores = torch.rand(TOKENS, int(moe.num_logical_experts), generator=generator)
    weights, ids = scores.softmax(-1).topk(int(moe.experts_per_token), dim=-1)
    return hidden, (weights / weights.sum(-1, keepdim=True)).to(device), ids.to(device)


def _runner(runner: Any, vllm_config: Any, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A layer's experts on this rank's own rows: a function of hidden states, weights and ids, in fp64."""
    from vllm.forward_context import set_forward_context

    places = physical_experts(runner.router)
    ranks = int(vllm_config.parallel_config.data_parallel_size)
    everywhere = torch.full((ranks,), TOKENS, dtype=torch.int32) if ranks > 1 else None
    runner.routed_experts._ensure_moe_quant_config_init()
    if device.type == "cpu":
        torch.cpu._init_amx()  # see `probe_layer`

    def run(hidden: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        ids = ids if places is None else places[ids]
        with (
            own_rows_only(runner),
            set_forward_context(None, vllm_config, num_tokens=TOKENS, num_tokens_across_dp=everywhere),
        ):
            ids = ids.to(runner._quant_method.topk_indices_dtype or torch.int32).contiguous()
            output = runner.routed_experts.forward_modular(x=hidden, topk_weights=weights, topk_ids=ids)
        if not isinstance(output, Tensor):
            raise ProbeError(f"{runner.layer_name}: the kernel defers its output")
        return output.double()

    return run
