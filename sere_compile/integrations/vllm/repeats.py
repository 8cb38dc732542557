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
from .engine import EngineMismatchError, put
from .experts import random_tokens
from .ranks import experts_on_own_rows

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
    merged = 0
    for name, runner in runners.items():
        kind = _kind(runner)
        if kind not in needed:
            needed[kind] = _needs_merging(name, runner, vllm_config, device)
        if needed[kind]:
            merge_before(_experts(runner))
            merged += 1
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
    original = experts.apply

    def apply(
        output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
        *others: Any, **named: Any,
    ) -> Any:  # fmt: skip
        topk_ids, topk_weights = merge_repeats(topk_ids, topk_weights)
        return original(output, hidden_states, w1, w2, topk_weights, topk_ids, *others, **named)

    return put(experts, "apply", apply)


def _is_right(runner: Any, vllm_config: Any, device: torch.device) -> bool:
    """Whether tokens whose last slot names their first one's expert get what the sum of both weights gives."""
    moe = runner.moe_config
    (hidden, weights, ids), others = (
        random_tokens(moe, moe.num_logical_experts, TOKENS, device, seed) for seed in range(2)
    )
    whole, repeated = weights.clone(), ids.clone()
    whole[:, 0] += whole[:, -1]
    whole[:, -1] = 0
    repeated[:, -1] = repeated[:, 0]
    with experts_on_own_rows(runner, vllm_config, device, TOKENS) as (experts, _):
        expected = experts(hidden, ids, whole).double()
        # What a kernel leaves as it was must not be what is expected.
        experts(others[0], others[2], others[1])
        got = experts(hidden, repeated, weights).double()
    if not expected.isfinite().all():
        raise ProbeError("its outputs on random hidden states are not finite")
    # Not "apart > ...", which a NaN would pass.
    return bool((got - expected).norm() <= TOLERANCE * expected.norm())
