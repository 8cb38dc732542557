"""`sere::expert_mlp` in CUDA C++ for Hopper and later (`stream.cu`): which calls it takes, and its launch.

For few slots per expert, where all time beyond the weights' is fixed cost. Three kernels that overlap by programmatic
dependent launch, which Inductor cannot give a user's Triton kernel: hence an operator of its own that Inductor calls.
"""

import ctypes
import dataclasses
import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

from ..cuda import nvrtc
from ..native import FLOAT_NUMBERS, compiled_ahead
from .reference import SCALE_BLOCK, Call, activation_number, gate_width

logger = logging.getLogger(__name__)

# The kernels; what comes before them has other contents on a CPU (tests/ops/cuda_on_cpu.py).
INSTRUCTIONS = ("../cuda/common.cuh", "hopper.cuh")
SOURCES = ("plan.cuh", "stream.cu")
# Numbers of theirs.
GRANULES = 8
WEIGHT_WARPS = 2
WEIGHT_BYTES = 16384
CHUNK_BYTES = 128
# A multiprocessor has 228 KiB, and a block takes 1 KiB beside its own. Two blocks, one of each projection, with one of
# the sum; or one block alone.
TWO_BLOCKS, ONE_BLOCK = 112 * 1024, 226 * 1024
MOST_EXPERTS, MOST_TOP_K = 512, 32
# Up to here faster than Triton's kernels wherever it was measured (docs/kernels.md).
MOST_TOKENS, MOST_SLOTS, MOST_SLOTS_PER_EXPERT = 32, 256, 4


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """How a call is cut.

    rows: slots of one expert that one pass over its weights takes: 8, 16, 32 or 64.
    groups: of 8 warps that multiply, which take stages of the ring in turn. 2: one block on a multiprocessor, not two.
    trigger: the second projection's blocks start when the first's have that many stages left to load; -1: at once.
    wgmma: FP8 weights and activations multiplied as they are, on a Hopper GPU alone; at most 32 rows, one group.
    row_warps: warps that copy activations, or round them: 2 or 4.
    blocks: of a multiprocessor at a time: 2, one of each projection, or 1 with all the shared memory.
    rounds_ahead: activations are rounded by a kernel of their own ahead of each projection, not on their way into the
        ring. Without wgmma always, where they are rounded.
    """

    rows: int
    groups: int = 1
    trigger: int = -1
    wgmma: bool = False
    row_warps: int = 2
    blocks: int = 2
    rounds_ahead: bool = False


def stream_config(
    num_slots: int, fp8: bool = False, fp8_activations: bool = False, wgmma: bool = False
) -> StreamConfig:
    """As measured, docs/kernels.md. `wgmma`: whether the GPU has it, `has_wgmma`."""
    rows = 8 if num_slots <= 8 else 16 if num_slots <= 16 else 32
    if fp8_activations and wgmma:
        if num_slots <= 64:
            return StreamConfig(min(rows, 16), trigger=8, wgmma=True, row_warps=4)
        trigger = 16 if num_slots <= 128 else -1
        return StreamConfig(32, trigger=trigger, wgmma=True, row_warps=4, blocks=1, rounds_ahead=True)
    if fp8_activations:
        # All rows of an expert in one pass: those of two would be summed in an order that is not always the same.
        return StreamConfig(rows, trigger=4 if num_slots <= 128 else -1)
    if fp8:
        return StreamConfig(rows, trigger=8) if num_slots <= 64 else StreamConfig(rows, groups=2)
    return StreamConfig(rows, trigger=8 if num_slots <= 128 else 16)


@dataclasses.dataclass(frozen=True)
class Stream:
    """What the kernels are compiled for."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    max_slots: int
    ids64: bool
    activation: str
    interleaved: bool
    gate_up_bias: bool
    down_bias: bool
    half: bool
    fp8: bool
    fp8_rows: bool
    weights: int
    config: StreamConfig

    @property
    def row_bytes(self) -> int:
        """Of one slot's activations in a stage."""
        return CHUNK_BYTES * (2 if self.fp8 and not self.fp8_rows else 1)

    @property
    def rounds_ahead(self) -> bool:
        """Whether a kernel of its own rounds activations."""
        return self.config.rounds_ahead or (self.fp8_rows and not self.config.wgmma)

    @property
    def plan_bytes(self) -> int:
        """At least: of `Plan`, of the sums that groups exchange, and of what a last tile of 8 rows reads too far."""
        exchange = 512 * self.config.rows if self.config.groups == 2 else 0
        too_far = 0 if self.config.wgmma else 7 * self.row_bytes
        return -(-(10 * self.experts + 4 * self.max_slots + 256 + max(exchange, too_far)) // 16) * 16

    @property
    def stage_bytes(self) -> int:
        """Of one stage of the ring: weights, activations, scales of both."""
        scales = (128 if self.fp8 else 0) + (4 * self.config.rows if self.fp8_rows else 0)
        return WEIGHT_BYTES + self.config.rows * self.row_bytes + scales

    @property
    def stages(self) -> int:
        """As many as fit; as many for each group."""
        two = self.config.groups == 1 and self.config.blocks == 2
        room = (TWO_BLOCKS if two else ONE_BLOCK) - self.plan_bytes
        return room // self.stage_bytes // self.config.groups * self.config.groups

    @property
    def shared_bytes(self) -> int:
        """Of one block."""
        return self.stages * self.stage_bytes + self.plan_bytes

    @property
    def threads(self) -> int:
        """Of one block."""
        return (GRANULES * self.config.groups + WEIGHT_WARPS + self.config.row_warps) * 32

    def macros(self) -> list[tuple[str, int]]:
        """What `stream.cu` is compiled with."""
        return [
            ("EXPERTS", self.experts), ("TOP_K", self.top_k), ("HIDDEN", self.hidden), ("INNER", self.inner),
            ("ROWS", self.config.rows), ("STAGES", self.stages), ("PLAN_BYTES", self.plan_bytes),
            ("MAX_SLOTS", self.max_slots),
            ("IDS64", int(self.ids64)), ("GATED", int(gate_width(self.activation) == 2)),
            ("INTERLEAVED", int(self.interleaved)), ("ACTIVATION", activation_number(self.activation)),
            ("GATE_UP_BIAS", int(self.gate_up_bias)), ("DOWN_BIAS", int(self.down_bias)), ("HALF", int(self.half)),
            ("FP8", int(self.fp8)), ("FP8_ROWS", int(self.fp8_rows)), ("WEIGHTS", self.weights),
            ("TRIGGER", self.config.trigger), ("GROUPS", self.config.groups), ("WGMMA", int(self.config.wgmma)),
            ("ROW_WARPS", self.config.row_warps), ("BLOCKS", self.config.blocks),
            ("ROUNDS_AHEAD", int(self.rounds_ahead)),
        ]  # fmt: skip


def takes(call: Call, transposed: bool) -> bool:
    """Whether a call is one for these kernels, which then `sere::expert_mlp_stream` runs."""
    num_tokens, top_k = call.topk_ids.shape
    if not isinstance(num_tokens, int) or transposed or compiled_ahead() or not device_can(call.hidden.device):
        return False
    most = min(MOST_SLOTS, MOST_SLOTS_PER_EXPERT * call.down.shape[0])
    return num_tokens <= MOST_TOKENS and 0 < num_tokens * top_k <= most and _can_run(call)


def _can_run(call: Call) -> bool:
    """Whether `stream.cu` can be compiled for what these tensors are: dtypes, sizes, layout."""
    half, step = call.hidden.dtype, 128 if call.fp8 else 64
    biases = [b for b in (call.gate_up_bias, call.down_bias) if b is not None]
    return (
        not call.mxfp4
        and (half == torch.bfloat16 or (half == torch.float16 and not call.fp8))
        and all(b.dtype == half for b in biases)
        and call.topk_weights.dtype in FLOAT_NUMBERS
        and call.down.shape[0] <= MOST_EXPERTS
        and call.topk_ids.shape[1] <= MOST_TOP_K
        and all(isinstance(d, int) and d > 0 and d % step == 0 for d in (call.hidden.shape[1], call.down.shape[2]))
        and call.gate_up.is_contiguous()
        and call.down.is_contiguous()
    )


@functools.cache
def device_can(device: torch.device) -> bool:
    """Whether the kernels run on a device."""
    if not nvrtc.serves(device):
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return nvrtc.shared_memory(index) >= ONE_BLOCK


def has_wgmma(device: torch.device | int) -> bool:
    """Whether a GPU multiplies FP8 numbers by `wgmma`, which Hopper alone has, neither older nor later ones."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def source() -> str:
    """The kernels, with what comes before them."""
    return nvrtc.read(Path(__file__).parent, (*INSTRUCTIONS, *SOURCES))


@functools.cache
def functions(stream: Stream, device: int) -> list | None:
    """The three kernels on a device, compiled; None, after a warning, where that fails."""
    try:
        capability = torch.cuda.get_device_capability(device)
        code = nvrtc.compile_source(source(), stream.macros(), capability, stream.config.wgmma)
        names = ("gate_up", "down", "sum_slots", *["round_ahead"] * stream.rounds_ahead)
        return nvrtc.load_functions(code, names, stream.shared_bytes)
    except RuntimeError as error:
        logger.warning("sere::expert_mlp: stream.cu cannot be used, Triton's kernels are instead: %s", error)
        return None


def stream_of(call: Call, activation: str, interleaved: bool, config: StreamConfig) -> Stream:
    """What a call needs."""
    num_slots = call.topk_ids.numel()
    # With wgmma a stage more fits beside 256.
    room = (256, 512, 4096) if config.wgmma else (512, 4096)
    return Stream(
        experts=call.down.shape[0], top_k=call.topk_ids.shape[1], hidden=call.hidden.shape[1],
        inner=call.down.shape[2], max_slots=next(most for most in room if num_slots <= most),
        ids64=call.topk_ids.dtype == torch.int64, activation=activation, interleaved=interleaved,
        gate_up_bias=call.gate_up_bias is not None, down_bias=call.down_bias is not None,
        half=call.hidden.dtype == torch.float16, fp8=call.fp8, fp8_rows=call.fp8_activations,
        weights=FLOAT_NUMBERS[call.topk_weights.dtype],
        config=config,
    )  # fmt: skip


def launch_stream(
    call: Call, activation: str, interleaved: bool, config: StreamConfig | None = None, out: Tensor | None = None
) -> Tensor | None:
    """`sere::expert_mlp` on a call that `takes` allows; None where the kernels cannot be had after all.

    `out`: contiguous [T, H] in the dtype of hidden, where the result is wanted; a new tensor without it.
    """
    num_tokens, top_k = call.topk_ids.shape
    num_slots, hidden = num_tokens * top_k, _aligned(call.hidden)
    config = config or stream_config(num_slots, call.fp8, call.fp8_activations, has_wgmma(hidden.device))
    stream = stream_of(call, activation, interleaved, config)
    kernels = functions(stream, hidden.device.index)
    if kernels is None or call.gate_up.data_ptr() % 16 or call.down.data_ptr() % 16:
        return None
    ids, weights = call.topk_ids.contiguous(), call.topk_weights.contiguous()
    act = torch.empty((num_slots, stream.inner), dtype=hidden.dtype, device=hidden.device)
    rows = torch.empty((num_slots, stream.hidden), dtype=torch.float32, device=hidden.device)
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if out is None else out
    gate_up_scale, down_scale, gate_up_bias, down_bias = map(
        _contiguous, (call.gate_up_scale, call.down_scale, call.gate_up_bias, call.down_bias)
    )
    grid = (torch.cuda.get_device_properties(hidden.device).multi_processor_count, 1)
    of_hidden, of_act = room_for_rounded(stream, hidden), room_for_rounded(stream, act)
    first = (hidden, call.gate_up, gate_up_scale, gate_up_bias, ids, act, *of_hidden, num_slots)
    second = (act, call.down, down_scale, down_bias, ids, rows, *of_act, num_slots)
    ahead = stream.rounds_ahead
    if ahead:
        _launch_rounding(kernels[3], hidden, of_hidden, is_first=True)
    nvrtc.launch(kernels[0], grid, stream.threads, stream.shared_bytes, first, early=True)
    if ahead:
        _launch_rounding(kernels[3], act, of_act, is_first=False)
    nvrtc.launch(kernels[1], grid, stream.threads, stream.shared_bytes, second, early=True)
    sum_grid = (-(-stream.hidden // 512), num_tokens)
    nvrtc.launch(kernels[2], sum_grid, 128, 0, (rows, ids, weights, out), early=True)
    return out


def _launch_rounding(kernel: ctypes.c_void_p, rows: Tensor, to: tuple[Tensor | None, Tensor | None], is_first: bool):
    items = rows.numel() // SCALE_BLOCK
    nvrtc.launch(kernel, (-(-items // 16), 1), 128, 0, (rows, *to, items, int(is_first)), early=True)


def room_for_rounded(stream: Stream, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """For FP8 numbers of rows [R, N], and a factor for each block of a row; nothing where not rounded ahead."""
    if not stream.rounds_ahead:
        return None, None
    numbers = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    return numbers, torch.empty((len(rows), rows.shape[1] // SCALE_BLOCK), dtype=torch.float32, device=rows.device)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and its start a multiple of 16 bytes, as the kernels' copies need it."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
