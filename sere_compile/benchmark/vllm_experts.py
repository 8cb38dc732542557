"""vLLM's Triton kernel as an experts implementation of transformers: `sere bench` compares with it in the same run."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SereError
from ..extras import require

NAME = "vllm"
# vLLM's names of what it multiplies gate by up with, by transformers'.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def is_at_hand() -> bool:
    """Whether vLLM is installed beside a GPU, on which its kernel runs."""
    return torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None


def cannot_run(model: nn.Module) -> str:
    """Why the kernel does not compute a model's experts; empty where it does."""
    (moe,) = require("hf", "transformers.integrations.moe", needed_for="this needs")
    for name, module in model.named_modules():
        gate = getattr(type(module), "_apply_gate", None)
        if gate is None:
            continue
        other = module.is_transposed or module.has_bias or getattr(module, "has_post_expert_norm", False)
        if other or not module.has_gate or not module.is_concatenated or gate is not moe._default_apply_gate:
            return f"{name} has another layout, biases, a norm, or a gate of its own"
        if _activation(module) is None:
            return f"{name} has an activation that it does not know"
    return ""


def register() -> None:
    """Register "vllm" among the experts implementations of transformers.

    Raises:
        SereError: vLLM is not installed, or has no such kernel.
        MissingExtraError: transformers is not installed.
    """
    (moe,) = require("hf", "transformers.integrations.moe", needed_for="this needs")
    try:
        from vllm.model_executor.layers.fused_moe import MoEActivation
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts
    except ImportError as error:
        raise SereError(f'experts "{NAME}" are vLLM\'s `fused_experts`, which cannot be imported: {error}') from error

    def run(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        activation = MoEActivation(_activation(module))
        weights = module.gate_up_proj, module.down_proj
        ids = top_k_index.to(torch.int32)
        return fused_experts(hidden_states, *weights, top_k_weights, ids, activation=activation)  # type: ignore[no-any-return]

    type(moe.ALL_EXPERTS_FUNCTIONS).register(NAME, run)


def _activation(module: Any) -> str | None:
    return _ACTIVATIONS.get(str(getattr(module.config, "hidden_act", "")))
