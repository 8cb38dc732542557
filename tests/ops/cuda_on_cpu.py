"""`stream.cu` compiled for a CPU, with `cuda_on_cpu.h` for its instructions, and launched on CPU tensors."""

import ctypes
import subprocess
from pathlib import Path

import torch

from sere_compile.ops.expert_mlp import stream

BLOCKS = 5
LAUNCHER = """
__align__(1024) u8 shared[256 * 1024];
extern "C" const char* launch(const u8* x, const u8* w1, const float* s1, const u16* b1, const u8* w2, const float* s2,
                       const u16* b2, const void* ids, const void* weights, void* act, float* rows, u16* out,
                       u8* x8, float* f8, u8* act8, float* g8, int tokens, int blocks, int bytes) {
  const int slots = tokens * TOP_K;
  problem = nullptr;
  run_grid(blocks, 1, THREADS, bytes, [=] { gate_up(x, w1, s1, b1, ids, act, x8, f8, slots); });
  run_grid(blocks, 1, THREADS, bytes, [=] { down((const u8*)act, w2, s2, b2, ids, rows, act8, g8, slots); });
  run_grid((HIDDEN + 511) / 512, tokens, 128, bytes, [=] { sum_slots(rows, ids, weights, out); });
  return problem;
}
"""


def build(one: stream.Stream, folder: Path) -> ctypes.CDLL:
    """The library for one specialisation."""
    header = (Path(__file__).parent / "cuda_on_cpu.h").read_text()
    kernels = [(Path(stream.__file__).parent / name).read_text() for name in stream.SOURCES]
    source, library = folder / "stream.cpp", folder / "stream.so"
    source.write_text("\n".join([header, *kernels, LAUNCHER]))
    macros = [f"-D{name}={value}" for name, value in one.macros()]
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *macros, "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def run(call: stream.Call, activation: str, interleaved: bool, config: stream.StreamConfig, folder: Path):
    """What `launch_stream` gives, on poisoned memory."""
    one = stream.stream_of(call, activation, interleaved, config)
    library = build(one, folder)
    tokens = call.hidden.shape[0]
    act = torch.full((tokens * one.top_k, one.inner), torch.nan, dtype=call.hidden.dtype)
    rows = torch.full((tokens * one.top_k, one.hidden), torch.nan)
    out = torch.full_like(call.hidden, torch.nan)
    tensors = (call.hidden, call.gate_up, call.gate_up_scale, call.gate_up_bias, call.down, call.down_scale,
               call.down_bias, call.topk_ids, call.topk_weights, act, rows, out,
               *stream.room_for_rounded(one, call.hidden), *stream.room_for_rounded(one, act))  # fmt: skip
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    library.launch.restype = ctypes.c_char_p
    problem = library.launch(*pointers, tokens, BLOCKS, one.shared_bytes)
    assert problem is None, problem.decode()
    return out
