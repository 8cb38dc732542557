"""`sere::expert_mlp` on a CPU: C++ compiled at first use (`cpu.cpp`), or a matmul per active expert without a compiler.

Which calls these take, and their launch. Both visit active experts only. Inductor would inline ATen: hence an operator
of its own, `sere::expert_mlp_cpu`, that Inductor calls.
"""

import ctypes
import dataclasses
import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

from ..native import FLOAT_NUMBERS, compiled_ahead
from .mxfp4 import unpack_mxfp4
from .reference import Call, activate, activation_number, gate_width

logger = logging.getLogger(__name__)


class _Matrix(ctypes.Structure):
    """`Matrix` of cpu.cpp."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("expert", "output", "input"))]


class _Layer(ctypes.Structure):
    """`Layer` of cpu.cpp."""

    _fields_ = [
        ("hidden", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("hidden_row", "hidden_column")),
        *((name, ctypes.c_void_p) for name in ("ids", "slot_weights")),
        *((name, _Matrix) for name in ("gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("gate_up_bias", "down_bias", "out")),
        *((name, ctypes.c_int64) for name in ("tokens", "slots", "experts", "width", "inner")),
        *((name, ctypes.c_int32) for name in ("activation", "gated", "interleaved", "threads")),
    ]


def takes(call: Call) -> bool:
    """Whether a call, real or fake, is one for `sere::expert_mlp_cpu`.

    Not while AOTInductor traces: its packages run without Python.
    """
    return call.hidden.device.type == "cpu" and not call.fp8 and not compiled_ahead()


def launch_cpu(call: Call, activation: str, interleaved: bool, transposed: bool) -> Tensor:
    """`sere::expert_mlp` on checked arguments, whose weights are not FP8."""
    if transposed:
        call = dataclasses.replace(call, gate_up=call.gate_up.transpose(1, 2), down=call.down.transpose(1, 2))
    kernel = library() if _can_run(call) else None
    return (
        by_expert(call, activation, interleaved) if kernel is None else _launch(kernel, call, activation, interleaved)
    )


def _can_run(call: Call) -> bool:
    """Whether cpu.cpp reads these tensors where they are."""
    if call.mxfp4:
        return False
    sizes_of_one = all(1 in (weight.stride(1), weight.stride(2)) for weight in (call.gate_up, call.down))
    return sizes_of_one and all(b is None or b.dtype == call.hidden.dtype for b in (call.gate_up_bias, call.down_bias))


@functools.cache
def library() -> ctypes.CDLL | None:
    """cpu.cpp, compiled by the compiler and into the cache that Inductor uses; None, after a warning, where that fails.

    OpenMP's threads are those of torch, which has loaded the same library.
    """
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        found = CppCodeCache.load((Path(__file__).parent / "cpu.cpp").read_text(encoding="utf-8"))
        found.sere_expert_mlp.argtypes = [ctypes.POINTER(_Layer), ctypes.c_int]
        found.sere_expert_mlp.restype = ctypes.c_int
        return found
    except (CppCompileError, InvalidCxxCompiler, OSError) as error:
        logger.warning(
            "sere::expert_mlp: cpu.cpp cannot be used, so that each active expert is a few calls of torch, which is "
            "slower; with a C++ compiler that Inductor finds (g++, or $CXX) it is: %s",
            error,
        )
        return None


def _launch(kernel: ctypes.CDLL, call: Call, activation: str, interleaved: bool) -> Tensor:
    """Weights are [E, N, M], N outputs, with a step of 1 along one of the last two dimensions."""
    hidden, gated = call.hidden, gate_width(activation) == 2
    out = torch.empty(hidden.shape, dtype=hidden.dtype)
    ids, weights = call.topk_ids.long().contiguous(), call.topk_weights.float().contiguous()
    biases = [None if bias is None else bias.contiguous() for bias in (call.gate_up_bias, call.down_bias)]
    layer = _Layer(
        hidden=hidden.data_ptr(), hidden_row=hidden.stride(0), hidden_column=hidden.stride(1), ids=ids.data_ptr(),
        slot_weights=weights.data_ptr(), gate_up=_matrix(call.gate_up), down=_matrix(call.down),
        gate_up_bias=_address(biases[0]), down_bias=_address(biases[1]), out=out.data_ptr(),
        tokens=hidden.shape[0], slots=ids.shape[1], experts=call.down.shape[0], width=hidden.shape[1],
        inner=call.down.shape[2], activation=activation_number(activation), gated=gated,
        interleaved=interleaved and gated, threads=torch.get_num_threads(),
    )  # fmt: skip
    if kernel.sere_expert_mlp(ctypes.byref(layer), FLOAT_NUMBERS[hidden.dtype]):
        raise MemoryError(f"sere::expert_mlp: no memory for {ids.numel()} slots of {hidden.shape[1]} columns")
    return out


def _matrix(weight: Tensor) -> _Matrix:
    return _Matrix(weight.data_ptr(), *weight.stride())


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def by_expert(call: Call, activation: str, interleaved: bool) -> Tensor:
    """The same in calls of torch: the rows of one active expert after the other; weights are [E, N, M], N outputs."""
    hidden = call.hidden
    total = torch.zeros(hidden.shape, dtype=torch.float32)
    experts = torch.unique(call.topk_ids)
    for expert in experts[(experts >= 0) & (experts < call.down.shape[0])].tolist():
        named = call.topk_ids == expert
        tokens = named.any(1).nonzero()[:, 0]
        weights = torch.where(named, call.topk_weights.float(), 0.0).sum(1)[tokens, None]
        x = _linear(hidden[tokens], call.gate_up, call.gate_up_scale, call.gate_up_bias, expert)
        x = activate(x, activation, interleaved).to(hidden.dtype)
        x = _linear(x, call.down, call.down_scale, call.down_bias, expert)
        total.index_add_(0, tokens, x * weights)
    return total.to(hidden.dtype)


def _linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, expert: int) -> Tensor:
    """Rows [R, M] through the weight [N, M] of an expert, MXFP4 with a scale: fp32 [R, N]."""
    if scale is None:
        out = torch.mm(x, weight[expert].t()).float()
    else:
        out = torch.mm(x.float(), unpack_mxfp4(weight[expert], scale[expert]).t())
    return out if bias is None else out + bias[expert].float()
