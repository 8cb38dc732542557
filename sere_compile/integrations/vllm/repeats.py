"""Experts kernels that take a token's experts for different ones: re-routed slots often name the same.

Most kernels of vLLM compute each slot on its own. Some keep a token's experts as a set, all of them or for some numbers
of tokens: a second slot of an expert is not counted, and its row is lost or computed with whatever comes next. They are
known by name, and handed tokens whose slots of one expert were made one.

At start each kind of kernel then computes tokens that name an expert twice, in batches of many sizes, and has to get
what the sum of the weights gives them; one that does not is refused.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ProbeError
from ...ops.repeats import merge_repeats
from .engine import NOT_AS_KNOWN, EngineMismatchError, after_reload, fused_experts, put
from .experts import random_tokens
from .ranks import experts_on_own_rows, physical_experts

log = logging.getLogger("vllm.sere_compile")

# By their names, not tried without: these skip slots that name no expert, others may read before their tables for one.
_OF_SETS = re.compile(
    # Bits of a word, for every batch.
    "OAITritonExperts|UnfusedOAITritonExperts"
    # One place per token and expert up to 16 tokens (FlashInfer's routing kernels of TRT-LLM).
    "|TrtLlm.*"
    # The first slot of a token that names an expert, above 256 tokens (FlashInfer's CUTLASS kernels).
    "|FlashInferExperts"
)
# How far a token's output may be apart, relative to its norm. FP8 activations with one scale per tensor differ by up to
# 0.05, for the scale depends on every row; a lost slot of K by 1 / sqrt(K + 2), 0.2 for K = 22.
TOLERANCE = 0.1


def merge_where_needed(runners: Mapping[str, Any], vllm_config: Any, device: torch.device, strict: bool = False) -> int:
    """Hand kernels that need it tokens whose slots of one expert were made one. Returns in how many layers.

    Args:
        runners: vLLM's MoE layers whose slots may come to name one expert, by name.
        vllm_config: the engine's configuration.
        device: of the experts.
        strict: a kernel that cannot be tried is an error, not a line in the log.

    Raises:
        EngineMismatchError: a kernel gives a token that names an expert twice something else, or see `strict`.
    """
    several = {name: runner for name, runner in runners.items() if int(runner.moe_config.experts_per_token) > 1}
    merged = [runner for runner in several.values() if _takes_sets(_name(runner))]
    for runner in merged:
        _merge(runner)
        after_reload(runner, functools.partial(_merge, runner))
    kinds = {_kind(runner): name for name, runner in reversed(several.items())}
    for name in kinds.values():
        _check(name, several[name], vllm_config, device, strict)
    if merged:
        log.info(
            "SERE: slots of a token that name one expert are made one in %d of %d MoE layers", len(merged), len(runners)
        )
    return len(merged)


def _experts(runner: Any) -> Any:
    return fused_experts(runner._quant_method)


def _name(runner: Any) -> str:
    """Of the class that computes a layer's slots."""
    experts = _experts(runner)
    return type(runner._quant_method if experts is None else experts).__name__


def _takes_sets(name: str) -> bool:
    return _OF_SETS.fullmatch(name) is not None


def _kind(runner: Any) -> tuple[Any, ...]:
    """What decides which kernel a layer gets."""
    moe = runner.moe_config
    sizes = (moe.num_logical_experts, moe.experts_per_token, moe.hidden_dim)
    return (type(runner._quant_method), type(_experts(runner)), *map(int, sizes))


def _merge(runner: Any) -> None:
    """Let a layer's experts see a token's slots of one expert as one."""
    experts = _experts(runner)
    original = experts.apply

    def apply(
        output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
        *others: Any, **named: Any,
    ) -> Any:  # fmt: skip
        topk_ids, topk_weights = merge_repeats(topk_ids, topk_weights)
        return original(output, hidden_states, w1, w2, topk_weights, topk_ids, *others, **named)

    put(experts, "apply", apply)


def _check(name: str, runner: Any, vllm_config: Any, device: torch.device, strict: bool) -> None:
    """Refuse a layer whose kernel is wrong, and say so where it cannot be tried."""
    kernel, size, compared = _name(runner), 0, False
    # Behind an exchange experts have the rows of all ranks.
    most = int(vllm_config.scheduler_config.max_num_batched_tokens) * int(runner.moe_config.dp_size)
    try:
        for size in _sizes(most):
            right = _is_right(runner, vllm_config, device, size)
            if right is False:
                break
            compared |= right is not None
        else:
            if compared:
                return
            raise ProbeError("its outputs on random hidden states are all zeros")
    except torch.AcceleratorError:
        raise  # a device that failed, not a kernel that is run otherwise than here
    except NOT_AS_KNOWN as error:
        smaller = ", smaller ones are right" if size > 1 else ""
        text = (
            f"whether {kernel} computes a token right that names an expert twice could not be tried in a batch of "
            f"{size}{smaller} ({type(error).__name__}: {error})"
        )
        known = _takes_sets(kernel)
        if strict and not known:
            raise EngineMismatchError(f'{name}: {text}; substitution="fill" needs no such token') from error
        log.warning("SERE: %s; %s", text, "such slots are made one for it" if known else "it is taken to")
        return
    raise EngineMismatchError(
        f"{name}: {kernel} does not compute a token right whose slots name one expert twice, as re-routed ones do, in "
        f'a batch of {size}: choose another --moe-backend, or substitution="fill", which leaves experts different'
    )


def _sizes(most: int) -> Iterator[int]:
    """Numbers of tokens: powers of two, between which kernels change, and the most."""
    size = 1
    while size < most:
        yield size
        size *= 2
    yield most


def _is_right(runner: Any, vllm_config: Any, device: torch.device, size: int) -> bool | None:
    """Whether tokens whose last slot names their first one's expert get what the sum of both weights gives.

    None where that is nothing: an expert may have been trained, or padded, to zeros.
    """
    moe, held = runner.moe_config, _experts_here(runner)
    # From another expert on for each size.
    first = held[(size + torch.arange(size)) % len(held)]
    hidden, weights, ids = random_tokens(moe, moe.num_logical_experts, size, device, 0, first)
    weights.fill_(1 / weights.shape[1])
    whole, repeated = weights.clone(), ids.clone()
    whole[:, 0] += whole[:, -1]
    whole[:, -1] = 0
    repeated[:, -1] = repeated[:, 0]
    with experts_on_own_rows(runner, vllm_config, device, size) as (experts, _):
        expected = experts(hidden, ids, whole).clone()
        # What a kernel leaves as it was must not be what is expected.
        experts(-hidden, ids, whole)
        got = experts(hidden, repeated, weights)
    norms = _norms(expected)
    if not norms.isfinite().all():
        raise ProbeError("its outputs on random hidden states are not finite")
    # Not "apart > ...", which a NaN would pass.
    right = bool((_norms(got - expected) <= TOLERANCE * norms).all())
    nothing = norms.max() <= torch.finfo(expected.dtype).tiny * expected.shape[1] ** 0.5
    return None if right and nothing else right


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)


def _experts_here(runner: Any) -> Tensor:
    """Logical experts that this rank computes, int64: a token that names another one twice shows nothing here."""
    everyone = torch.arange(int(runner.moe_config.num_logical_experts))
    held = runner.routed_experts.expert_map
    if held is None:
        return everyone
    places = physical_experts(runner.router)
    here = everyone[held.cpu()[everyone if places is None else places.cpu()] >= 0]
    return here if len(here) else everyone
