"""gpt-oss's experts of transformers in MXFP4, as its checkpoints hold them, for compiled models.

transformers' own MXFP4 layer is one kernel that selects experts itself, so that no graph shows its router. Loaded
dequantised, the router is in the graph, and the experts have four times the bytes. `pack_experts` gives them back.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, expect
from ..extras import require
from ..ops.expert_mlp.mxfp4 import pack_mxfp4, unpack_mxfp4
from ..ops.expert_mlp.op import MAX_TOKENS
from ..ops.expert_mlp.reference import GPT_OSS_ALPHA, GPT_OSS_LIMIT
from .experts import NAME

log = logging.getLogger(__name__)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def pack_experts(model: nn.Module) -> int:
    """Hold the experts of a gpt-oss model of transformers in MXFP4, a little more than a quarter of bfloat16's bytes.

    For a checkpoint in MXFP4 that was loaded dequantised: what is packed stands for the same numbers, exactly. Up to
    256 tokens a layer is then `sere::expert_mlp`, which reads the bytes of active experts alone; with more tokens it is
    unpacked for each call, and computed as the model's `experts_implementation` says.

    Example:
        >>> config = Mxfp4Config(dequantize=True)
        >>> model = AutoModelForCausalLM.from_pretrained("openai/gpt-oss-20b", quantization_config=config)
        >>> sere_compile.pack_experts(model)
        >>> model.forward = torch.compile(model.forward, backend="sere")

    Args:
        model: is changed in place, before it is compiled; its experts are bfloat16 or float32. Packed experts do not
            train, and a state dict holds them as they are.

    Returns:
        How many layers were packed.

    Raises:
        ArgumentError: `model` is no nn.Module.
        ConfigError: no experts of gpt-oss are there, some are no numbers of MXFP4, or have hooks; then nothing is
            changed.
        MissingExtraError: transformers is not installed.
    """
    expect(model, nn.Module, "pack_experts takes a torch.nn.Module")
    kind = _packed_class()
    stock = kind.__mro__[1]
    every = {name: module for name, module in model.named_modules() if isinstance(module, stock)}
    found = {name: module for name, module in every.items() if not isinstance(module, kind)}
    if not found:
        raise ConfigError(
            f"all experts of {type(model).__name__} are packed already"
            if every
            else f"{type(model).__name__} has no experts of gpt-oss to pack: load a gpt-oss model with "
            "quantization_config=Mxfp4Config(dequantize=True)"
        )
    packed = {name: kind(name, module) for name, module in found.items()}
    for name, module in packed.items():
        model.set_submodule(name, module)
    log.info("packed the experts of %d layers in MXFP4", len(packed))
    return len(packed)


@functools.cache
def _packed_class() -> type[nn.Module]:
    """The class of packed experts, a subclass of transformers' own so that it is taken for that."""
    gpt_oss, moe = require(
        "hf", "transformers.models.gpt_oss.modeling_gpt_oss", "transformers.integrations.moe", needed_for="this needs"
    )

    class PackedExperts(gpt_oss.GptOssExperts):  # type: ignore[misc, name-defined]
        """Experts [E] whose weights are bytes [E, 2 I, H / 2] and [E, H, I / 2], with scales."""

        __qualname__ = "PackedExperts"  # as `__getattr__` finds it, where a model is unpickled

        def __init__(self, name: str, experts: Any) -> None:
            nn.Module.__init__(self)
            _check(name, experts)
            self.__dict__.update({key: value for key, value in vars(experts).items() if key not in vars(self)})
            self.training = experts.training
            for which in ("gate_up_proj", "down_proj"):
                self.register_parameter(f"{which}_bias", getattr(experts, f"{which}_bias"))
                for kind, tensor in zip(("blocks", "scales"), _pack(name, getattr(experts, which)), strict=True):
                    self.register_parameter(f"{which}_{kind}", nn.Parameter(tensor, requires_grad=False))

        @property
        def gate_up_proj(self) -> Tensor:
            """[E, H, 2 I], unpacked."""
            return _unpack(self.gate_up_proj_blocks, self.gate_up_proj_scales, self.gate_up_proj_bias.dtype)

        @property
        def down_proj(self) -> Tensor:
            """[E, I, H], unpacked."""
            return _unpack(self.down_proj_blocks, self.down_proj_scales, self.down_proj_bias.dtype)

        def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
            """[T, H], of hidden states [T, H], ids [T, K] and weights [T, K]."""
            if hidden_states.shape[0] > MAX_TOKENS:
                return super().forward(hidden_states, router_indices, routing_weights)
            if self.config._experts_implementation == NAME:
                rerouted = moe.ALL_EXPERTS_FUNCTIONS[NAME].rerouted
                router_indices, routing_weights = rerouted(self, router_indices, routing_weights)
            return torch.ops.sere.expert_mlp(
                hidden_states, router_indices, routing_weights, self.gate_up_proj_blocks, self.down_proj_blocks,
                self.gate_up_proj_bias, self.down_proj_bias, "gpt_oss", True, False,
                self.gate_up_proj_scales, self.down_proj_scales,
            )  # fmt: skip

    return PackedExperts


def __getattr__(name: str) -> Any:
    if name == "PackedExperts":
        return _packed_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _check(name: str, experts: Any) -> None:
    if "forward" in vars(experts) or any(getattr(experts, hooks) for hooks in _HOOKS):
        raise ConfigError(
            f"{name} has hooks or a forward of its own, as accelerate gives them to a model on several devices, and "
            "they belong to the experts as they are: load it on one device, pack it, then dispatch it or add hooks"
        )
    constants = float(experts.alpha), float(experts.limit)
    if constants != (GPT_OSS_ALPHA, GPT_OSS_LIMIT):
        raise ConfigError(
            f"{name}: its activation has alpha and limit {constants}, and the kernels have {GPT_OSS_ALPHA} and "
            f"{GPT_OSS_LIMIT}: it cannot be packed"
        )
    weight = experts.gate_up_proj
    if weight.dtype not in (torch.bfloat16, torch.float32) or weight.is_meta:
        raise ConfigError(
            f"{name}: expected weights in torch.bfloat16 or torch.float32, got {weight.dtype} on {weight.device}"
        )


def _pack(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes and scales of a weight [E, N, M] with its rows and columns exchanged, an expert at a time."""
    try:
        packed = [pack_mxfp4(one.detach().T.contiguous()) for one in weight]
    except ValueError as error:
        raise ConfigError(
            f"{name}: {error}. Only a checkpoint in MXFP4, loaded with quantization_config="
            "Mxfp4Config(dequantize=True) and not trained or cast since, can be packed"
        ) from error
    blocks, scales = zip(*packed, strict=True)
    return torch.stack(blocks), torch.stack(scales)


def _unpack(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, N, M] of bytes [E, M, N / 2]."""
    if torch.compiler.is_compiling():
        return unpack_mxfp4(blocks, scales).to(dtype).transpose(1, 2)
    # An expert at a time, since eager mode keeps what is in between.
    each = (unpack_mxfp4(*one).to(dtype) for one in zip(blocks, scales, strict=True))
    return torch.stack(list(each)).transpose(1, 2)
