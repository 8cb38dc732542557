"""MXFP4 weights as a checkpoint has them, which vLLM turns into a layout of its kernels when a model is loaded.

`sere::expert_mlp` reads them as they are. vLLM's kernels stay for larger batches, so a layer has its weights twice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .engine import found, replaced

_MODULE, _METHOD = "vllm.model_executor.layers.quantization.mxfp4", "GptOssMxfp4MoEMethod"
_HELD_AS = "_sere_packed"


@dataclass(frozen=True)
class PackedWeights:
    """The experts of a layer.

    Attributes:
        gate_up: uint8 [E, 2 I, H / 2], gate and up alternating, and `gate_up_scale` uint8 [E, 2 I, H / 32].
        down: uint8 [E, H, I / 2], and `down_scale` uint8 [E, H, I / 32].
        gate_up_bias: [E, 2 I] or None, and `down_bias` [E, H] or None.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_scale: Tensor
    down_scale: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    @property
    def bytes(self) -> int:
        """Of memory that they take."""
        tensors = (self.gate_up, self.down, self.gate_up_scale, self.down_scale)
        return sum(tensor.numel() for tensor in tensors)


@contextmanager
def keeping_packed_weights(wanted: bool) -> Iterator[None]:
    """While a model is loaded: layers of gpt-oss keep their MXFP4 weights as they were loaded, if that is wanted.

    Nothing is kept where this vLLM has no such method; `packed_weights` then gives None.
    """
    method = found(_MODULE, _METHOD) if wanted else None
    original = vars(method).get("process_weights_after_loading") if method is not None else None
    if original is None:
        yield
        return

    @functools.wraps(original)
    def process_weights_after_loading(self: Any, layer: Any) -> Any:
        kept = PackedWeights(
            layer.w13_weight.data,
            layer.w2_weight.data,
            layer.w13_weight_scale.data,
            layer.w2_weight_scale.data,
            *(getattr(getattr(layer, name, None), "data", None) for name in ("w13_bias", "w2_bias")),
        )
        result = original(self, layer)
        setattr(layer, _HELD_AS, kept)
        return result

    with replaced(method, "process_weights_after_loading", process_weights_after_loading):
        yield


def packed_weights(layer: Any) -> PackedWeights | None:
    """What `keeping_packed_weights` kept of a layer."""
    return getattr(layer, _HELD_AS, None)


def release_packed_weights(layer: Any) -> None:
    """Give their memory back, where nothing reads them after all."""
    vars(layer).pop(_HELD_AS, None)
