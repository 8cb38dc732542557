"""`sere::expert_mlp` in CUDA C++ for Hopper and later (`stream.cu`): which calls it takes, and its launch."""

import dataclasses
import functools
from pathlib import Path

import torch
from torch import Tensor

from . import nvrtc
from .reference import gate_width

# Numbers of `stream.cu`.
THREADS = 12 * 32
WEIGHT_BYTES = 16384
# Two blocks of a multiprocessor, one of each projection, and a block of the sum: 228 KiB less 1 KiB that each takes beside.
SHARED_BYTES = 112 * 1024
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "gpt_oss")
_WEIGHTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclasses.dataclass(frozen=True)
class Stream:
    """What the kernels are compiled for."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    rows: int
    max_slots: int
    ids64: bool
    activation: str
    interleaved: bool
    bias: bool
    half: bool
    fp8: bool
    weights: int
    trigger: int = -1
    prefetch: int = 0
    shared: int = 0
    carveout: int = 100
    groups: int = 1
    ahead: int = 0

    @property
    def plan_bytes(self) -> int:
        """At least the size of `Plan`, and what the last tile of 8 rows may read beyond the last stage."""
        return 10 * self.experts + 4 * self.max_slots + 256 + 7 * 256 + (512 * self.rows if self.groups == 2 else 0)

    @property
    def stage_bytes(self) -> int:
        """Of one stage of the ring: weights, activations, scales."""
        return WEIGHT_BYTES + self.rows * (256 if self.fp8 else 128) + (128 if self.fp8 else 0)

    @property
    def stages(self) -> int:
        """As many as fit."""
        most = ((226 * 1024 if self.groups == 2 else SHARED_BYTES) - self.plan_bytes) // self.stage_bytes
        return most // self.groups * self.groups

    @property
    def shared_bytes(self) -> int:
        """Of one block."""
        return self.stages * self.stage_bytes + self.plan_bytes

    def macros(self) -> list[tuple[str, int]]:
        """What `stream.cu` is compiled with."""
        name = self.activation.removesuffix("_glu")
        return [
            ("EXPERTS", self.experts), ("TOP_K", self.top_k), ("HIDDEN", self.hidden), ("INNER", self.inner),
            ("ROWS", self.rows), ("STAGES", self.stages), ("MAX_SLOTS", self.max_slots), ("IDS64", int(self.ids64)),
            ("GATED", int(gate_width(self.activation) == 2)), ("INTERLEAVED", int(self.interleaved)),
            ("ACTIVATION", _ACTIVATIONS.index(name)), ("BIAS", int(self.bias)), ("HALF", int(self.half)),
            ("FP8", int(self.fp8)), ("WEIGHTS", self.weights), ("TRIGGER", self.trigger), ("PREFETCH", self.prefetch), ("GROUPS", self.groups), ("FETCH_STAGES", self.ahead),
        ]  # fmt: skip


def rows_of(num_slots: int, fp8: bool) -> int:
    """Slots of one expert that one pass over its weights takes."""
    if num_slots <= 16:
        return 8 if num_slots <= 8 else 16
    return 32 if num_slots <= 256 or fp8 else 64


@functools.cache
def functions(stream: Stream, device: int) -> list:
    """The three kernels on a device, compiled."""
    source = (Path(__file__).parent / "stream.cu").read_text()
    code = nvrtc.compile_source(source, stream.macros(), torch.cuda.get_device_capability(device))
    return nvrtc.load_functions(code, ("gate_up", "down", "sum_slots"), stream.shared_bytes)


def launch_stream(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    rows: int | None = None,
) -> Tensor:
    """`sere::expert_mlp` on checked arguments."""
    hidden, topk_ids, topk_weights = hidden.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    num_tokens, top_k = topk_ids.shape
    num_slots = num_tokens * top_k
    fp8 = gate_up_scale is not None
    stream = Stream(
        experts=down.shape[0], top_k=top_k, hidden=hidden.shape[1], inner=down.shape[2],
        rows=rows or rows_of(num_slots, fp8), max_slots=512 if num_slots <= 512 else 4096,
        ids64=topk_ids.dtype == torch.int64, activation=activation, interleaved=interleaved,
        bias=gate_up_bias is not None, half=hidden.dtype == torch.float16, fp8=fp8,
        weights=_WEIGHTS[topk_weights.dtype], trigger=TRIGGER, prefetch=PREFETCH, shared=SHARED, carveout=nvrtc.CARVEOUT, groups=GROUPS, ahead=AHEAD,
    )  # fmt: skip
    gate_up_function, down_function, sum_function = functions(stream, hidden.device.index)
    act = torch.empty((num_slots, stream.inner), dtype=hidden.dtype, device=hidden.device)
    slots = torch.empty((num_slots, stream.hidden), dtype=torch.float32, device=hidden.device)
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    threads = (8 * stream.groups + 4) * 32
    grid = (torch.cuda.get_device_properties(hidden.device).multi_processor_count, 1)
    nvrtc.launch(gate_up_function, grid, threads, stream.shared_bytes,
                 (hidden, gate_up, gate_up_scale, gate_up_bias, topk_ids, act, num_slots), early=False)  # fmt: skip
    if PARTS == 1:
        return out
    nvrtc.launch(down_function, grid, threads, stream.shared_bytes,
                 (act, down, down_scale, down_bias, topk_ids, slots, num_slots), early=EARLY)  # fmt: skip
    if PARTS == 2:
        return out
    nvrtc.launch(sum_function, (-(-stream.hidden // 512), num_tokens), 128, 0, (slots, topk_ids, topk_weights, out), early=EARLY)
    return out


EARLY = True
PARTS = 3
TRIGGER = -1
PREFETCH = 0
SHARED = 0
GROUPS = 1
AHEAD = 0
