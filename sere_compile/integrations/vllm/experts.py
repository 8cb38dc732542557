"""The experts of a small batch by `sere::expert_mlp` instead of vLLM's kernels.

vLLM's modular kernel hands a layer's weights, hidden states, ids and weights to an experts object, whose
`apply` writes into an output tensor. Here its `apply` is put before: up to some number of tokens
the layer is `sere::expert_mlp`, which needs no table of aligned blocks, no sort, and no activation
or sum of its own; above, it is what it was. The number of tokens is known when a CUDA graph is
recorded, so each graph holds one or the other. MXFP4 weights of gpt-oss are read as the checkpoint has
them, see `packed_weights`.

Nothing is replaced that was not compared: at start both compute one layer of each kind on the same
random tokens, for every form of kernel that is to be used.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...ops.expert_mlp import MAX_SLOTS, MAX_TOKENS, expert_mlp_into
from ...ops.expert_mlp.stream import device_can
from .engine import NOT_AS_KNOWN, after_reload, fused_experts, put
from .options import VllmOptions
from .packed_weights import PackedWeights, packed_weights, release_packed_weights

log = logging.getLogger("vllm.sere_compile")

# Up to here faster than vLLM's Triton kernels with their tuned tiles wherever it was measured, on an
# H200: docs/vllm.md.
FASTER_TOKENS, FASTER_SLOTS_PER_EXPERT = 64, 8
# How far outputs of 16 bits that were summed in another order may be apart, relative to their norm.
TOLERANCE = 0.02

# vLLM's names of activations, and whether gate and up alternate in its weights.
_ACTIVATIONS = {
    "silu": ("silu_glu", False),
    "gelu": ("gelu_glu", False),
    "gelu_tanh": ("gelu_tanh_glu", False),
    "swigluoai": ("gpt_oss", True),
}


@dataclass(frozen=True)
class Replaced:
    """Attributes: layers: how many; text: by what, and up to how many tokens; cannot_reload: see `_cannot_reload`."""

    layers: int
    text: str
    cannot_reload: str


@dataclass(frozen=True)
class Layer:
    """What `sere::expert_mlp` has to know of a layer beside tensors that come with each call.

    Attributes:
        packed: the weights that it reads instead of those that come with each call.
    """

    activation: str
    interleaved: bool
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    packed: PackedWeights | None

    @classmethod
    def of(cls, layer: Any) -> Layer:
        """As vLLM has it."""
        held, packed = layer.quant_method.moe_kernel.fused_experts, packed_weights(layer)
        first, second = (held.w1_bias, held.w2_bias) if packed is None else (packed.gate_up_bias, packed.down_bias)
        activation, interleaved = _activation(layer) or ("", False)
        return cls(activation, interleaved, first, second, packed)

    def weights(self, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        """What is multiplied where a call brings these."""
        return (w1, w2) if self.packed is None else (self.packed.gate_up, self.packed.down)


def replace_experts(
    runners: Mapping[str, Any], options: VllmOptions, vllm_config: Any, device: torch.device
) -> Replaced | None:
    """Put `sere::expert_mlp` before the experts of small batches, where the option and the layer allow it.

    Args:
        runners: vLLM's MoE layers by name.
        options: what the user wrote; `experts` decides.
        vllm_config: the engine's configuration.
        device: of the experts.

    Returns:
        How many layers it is; None where there is none, after a line in the log that says why.

    Raises:
        ConfigError: `experts="sere"` with `strict`, and a layer for which it cannot be.
    """
    if options.experts == "vllm":
        return None
    forced, reasons, checked = options.experts == "sere", Counter[str](), dict[Any, str]()
    replaced, most, held, cannot_reload = 0, 0, 0, ""
    for name, runner in runners.items():
        limit, reason = _limit(runner, forced, device)
        if not reason:
            key = _kind(runner)
            if key not in checked:
                checked[key] = compare(runner, vllm_config, device, limit)
            reason = checked[key]
        if not reason:
            put_before(runner, limit)
            replaced, most = replaced + 1, max(most, limit)
            packed = packed_weights(runner.routed_experts)
            held += packed.bytes if packed is not None else 0
            impossible = _cannot_reload(packed)
            after_reload(runner, functools.partial(put_before, runner, limit), impossible)
            cannot_reload = cannot_reload or impossible
        elif forced and options.config.strict:
            raise ConfigError(f'{name}: experts="sere" is out of reach: {reason}')
        else:
            reasons[reason] += 1
            release_packed_weights(runner.routed_experts)
    for reason, count in reasons.items():
        level = logging.WARNING if forced or reason.startswith(_WRONG) else logging.INFO
        log.log(level, "SERE: vLLM's own kernels compute the experts of %d MoE layers: %s", count, reason)
    text = f"sere::expert_mlp up to {most} tokens, by vLLM's kernels above"
    if held:
        text += f"; MXFP4 weights are held twice for that, {held / 1e9:.2f} GB more"
    return Replaced(replaced, text, cannot_reload) if replaced else None


def _cannot_reload(packed: PackedWeights | None) -> str:
    """Why a layer's weights cannot be loaded anew while an engine runs; empty where they can."""
    if packed is None:
        return ""
    return (
        'experts="sere" keeps MXFP4 weights a second time, which would stay as they were: start the engine again, or '
        'take "experts": "auto"'
    )


def _limit(runner: Any, forced: bool, device: torch.device) -> tuple[int, str]:
    """Up to how many tokens, and why not at all. Whatever of vLLM's is not as it is known, is a reason."""
    try:
        return most_tokens(runner, forced), cannot_serve(runner) or ("" if forced else not_faster(device))
    except AttributeError as error:
        return 0, f"this vLLM's layers are not as those of the releases that were tested: {error}"


def most_tokens(runner: Any, forced: bool) -> int:
    """Up to how many tokens of a forward a layer is `sere::expert_mlp`."""
    top_k, experts = int(runner.moe_config.experts_per_token), int(runner.moe_config.num_local_experts)
    possible = min(MAX_TOKENS, MAX_SLOTS // top_k)
    return possible if forced else min(possible, FASTER_TOKENS, FASTER_SLOTS_PER_EXPERT * experts // top_k)


def not_faster(device: torch.device) -> str:
    """Why it is not known to be faster on a device; empty where it is."""
    if not device_can(device):
        return 'on this device ours were not measured to be faster (experts="sere" takes them anyway)'
    return ""


def cannot_serve(runner: Any) -> str:
    """Why a layer cannot be computed by `sere::expert_mlp`; empty where it can."""
    kernel = getattr(runner._quant_method, "moe_kernel", None)
    exchange = type(getattr(kernel, "prepare_finalize", None)).__name__
    layer, moe = runner.routed_experts, runner.moe_config
    reason = _other_weights(runner, type(fused_experts(runner._quant_method)).__name__)
    if reason:
        return reason
    if exchange != "MoEPrepareAndFinalizeNoDPEPModular":
        return f"{exchange} exchanges tokens with other ranks"
    if layer.expert_map is not None:
        return "a rank has a part of the experts (expert parallelism)"
    if layer.apply_router_weight_on_input or moe.is_lora_enabled:
        return "router weights on the input, or LoRA"
    if _activation(layer) is None:
        return f"the activation {layer.activation.value}"
    return ""


def _other_weights(runner: Any, experts: str) -> str:
    """Why the weights of a layer, which experts of this name multiply, are none that `sere::expert_mlp` reads."""
    method, layer, moe = type(runner._quant_method).__name__, runner.routed_experts, runner.moe_config
    if method == "GptOssMxfp4MoEMethod":
        return _other_packed_weights(packed_weights(layer), moe, experts)
    if method != "UnquantizedFusedMoEMethod":
        return f"their weights are neither bfloat16 or float16 as they are nor gpt-oss's MXFP4 ({method})"
    if experts != "TritonExperts":
        return f"{experts} may keep weights in a layout of its own"
    weights = (layer.w13_weight, layer.w2_weight)
    if any(w.dtype not in (torch.bfloat16, torch.float16) or w.dtype != moe.in_dtype for w in weights):
        return f"weights of {weights[0].dtype} and hidden states of {moe.in_dtype}"
    if not all(w.is_contiguous() for w in weights) or weights[1].shape[2] * 2 != weights[0].shape[1]:
        return "weights that are not contiguous, or an activation without a gate"
    return ""


def _other_packed_weights(packed: PackedWeights | None, moe: Any, experts: str) -> str:
    if packed is None:
        return 'MXFP4 weights, which experts="sere" keeps a second time, as the checkpoint has them'
    if experts not in ("OAITritonExperts", "UnfusedOAITritonExperts"):
        return f"{experts} may change MXFP4 weights where they lie"
    width = packed.gate_up.shape[2] * 2
    if moe.in_dtype != torch.bfloat16 or width != moe.hidden_dim:
        return f"{moe.hidden_dim} hidden states of {moe.in_dtype}, and MXFP4 weights of {width}, which take bfloat16"
    return ""


def _activation(layer: Any) -> tuple[str, bool] | None:
    """Name and layout of a layer's activation for `sere::expert_mlp`; None where it has none that computes this."""
    known = _ACTIVATIONS.get(layer.activation.value)
    config = layer.quant_method.moe_kernel.fused_experts.activation_config
    if known is None or (known[0] != "gpt_oss" and config.clamp_limit is not None):
        return None
    return known


def _kind(runner: Any) -> tuple[Any, ...]:
    """What decides which kernels a layer gets."""
    layer = runner.routed_experts
    known = Layer.of(layer)
    weights = known.weights(layer.w13_weight, layer.w2_weight)
    shapes = (*(tuple(weight.shape) for weight in weights), runner.moe_config.experts_per_token)
    return (*shapes, weights[0].dtype, layer.activation, known.gate_up_bias is not None)


def put_before(runner: Any, limit: int) -> Callable[[], int]:
    """Let a layer's experts be `sere::expert_mlp` up to `limit` tokens.

    Returns:
        What takes it back, and tells how many calls it computed.
    """
    layer = runner.routed_experts
    experts = layer.quant_method.moe_kernel.fused_experts
    known, dtype, computed = Layer.of(layer), runner.moe_config.in_dtype, 0
    scales = (None, None) if known.packed is None else (known.packed.gate_up_scale, known.packed.down_scale)
    original = experts.apply

    def apply(
        output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
        **others: Any,
    ) -> Any:  # fmt: skip
        nonlocal computed
        mine = (
            hidden_states.shape[0] <= limit
            and others.get("expert_map") is None
            and others.get("a1q_scale") is None
            and others.get("expert_tokens_meta") is None
            and topk_ids.dtype in (torch.int32, torch.int64)
            and hidden_states.dtype == dtype == output.dtype
            and getattr(experts, "post_gemm2_hook", None) is None
        )
        if not mine:
            return original(
                output=output, hidden_states=hidden_states, w1=w1, w2=w2, topk_weights=topk_weights,
                topk_ids=topk_ids, **others,
            )  # fmt: skip
        computed += 1
        expert_mlp_into(
            output, hidden_states, topk_ids, topk_weights, *known.weights(w1, w2), known.gate_up_bias, known.down_bias,
            known.activation, known.interleaved, *scales,
        )  # fmt: skip
        return None

    take_ours = put(experts, "apply", apply)

    def take_back() -> int:
        take_ours()
        return computed

    return take_back


_WRONG = "sere::expert_mlp"


def compare(runner: Any, vllm_config: Any, device: torch.device, limit: int) -> str:
    """Compute a layer both ways, for every form of kernel up to `limit` tokens.

    That also compiles them before graphs are recorded.

    Returns:
        What differs, or what of the engine was not as it is known; empty where outputs agree.
    """
    top_k = int(runner.moe_config.experts_per_token)
    # Kernels are cut for up to 8, 16, or more slots, and others come above 32 tokens.
    sizes = sorted({size for size in (1, max(1, 16 // top_k), 32, limit) if size <= limit})
    try:
        for size in sizes:
            inputs = _random_tokens(runner, size, device)
            expected = _layer(runner, vllm_config, inputs)
            take_back = put_before(runner, limit)
            try:
                got = _layer(runner, vllm_config, inputs)
            finally:
                computed = take_back()
            if not computed:
                return (
                    f"{_WRONG} was not asked: calls of {size} tokens are not as those of the releases that were tested"
                )
            apart, norm = (got - expected).norm().item(), expected.norm().item()
            if not apart <= TOLERANCE * norm:
                return f"{_WRONG} differs from them by {apart:.2e} of {norm:.2e} for {size} tokens"
    except NOT_AS_KNOWN as error:
        return f"{_WRONG} could not be compared with them: {type(error).__name__}: {error}"
    return ""


def _random_tokens(runner: Any, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, H], weights [T, K] that sum to 1, ids [T, K] of different experts."""
    hidden, weights, ids = random_tokens(runner.moe_config, runner.moe_config.num_local_experts, size, device, size)
    return hidden, weights, ids.to(runner._quant_method.topk_indices_dtype or torch.int32)


def random_tokens(
    moe: Any, num_experts: int, size: int, device: torch.device, seed: int, first: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, H], weights [T, K] that sum to 1, ids int64 [T, K] of different ones of the first experts.

    first: int64 [T], each token's best expert.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(size, int(moe.hidden_dim), generator=generator).to(device, moe.in_dtype)
    scores = torch.rand(size, int(num_experts), generator=generator)
    if first is not None:
        scores.scatter_(1, first[:, None], 2.0)
    weights, ids = scores.softmax(-1).topk(int(moe.experts_per_token), dim=-1)
    return hidden, (weights / weights.sum(-1, keepdim=True)).to(device), ids.to(device)


def _layer(runner: Any, vllm_config: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The experts' weighted sum in fp32."""
    from vllm.forward_context import set_forward_context

    hidden, weights, ids = inputs
    runner.routed_experts._ensure_moe_quant_config_init()
    with set_forward_context(None, vllm_config, num_tokens=hidden.shape[0]):
        output = runner.routed_experts.forward_modular(x=hidden, topk_weights=weights, topk_ids=ids)
    if not isinstance(output, Tensor):
        raise TypeError(f"experts gave {type(output).__name__}, no tensor")
    return output.float()
