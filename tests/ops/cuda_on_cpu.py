"""Kernels in CUDA C++ compiled for a CPU, with `cuda_on_cpu.h` for instructions, and launched on CPU tensors."""

import ctypes
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from sere_compile.ops.cuda import cluster, nvrtc
from sere_compile.ops.cuda.cluster import Rows, Selection
from sere_compile.ops.expert_mlp import stream
from sere_compile.ops.route.reference import Rerouting

Outs = tuple[Tensor, Tensor]

BLOCKS = 5
LAUNCHER = """
extern "C" const char* launch(const u8* x, const u8* w1, const float* s1, const u16* b1, const u8* w2, const float* s2,
                       const u16* b2, const void* ids, const void* weights, void* act, float* rows, u16* out,
                       u8* x8, float* f8, u8* act8, float* g8, int tokens, int blocks, int bytes) {
  const int slots = tokens * TOP_K;
  problem = nullptr;
#if ROUNDS_AHEAD
  const int items = tokens * HIDDEN / 128, act_items = slots * INNER / 128;
  run_grid((items + 15) / 16, 1, 128, 0, [=] { round_ahead(x, x8, f8, items, 1); });
#endif
  run_grid(blocks, 1, THREADS, bytes, [=] { gate_up(x, w1, s1, b1, ids, act, x8, f8, slots); });
#if ROUNDS_AHEAD
  run_grid((act_items + 15) / 16, 1, 128, 0, [=] { round_ahead((const u8*)act, act8, g8, act_items, 0); });
#endif
  run_grid(blocks, 1, THREADS, bytes, [=] { down((const u8*)act, w2, s2, b2, ids, rows, act8, g8, slots); });
  run_grid((HIDDEN + 511) / 512, tokens, 128, bytes, [=] { sum_slots(rows, ids, weights, out); });
  return problem;
}
"""


CLUSTER_LAUNCHER = """
extern "C" const char* launch(const void* scores, const void* router, const void* choice, const void* bias,
    const void* ids, const void* weights, const u8* mask, const void* similarity, const float* projection,
    const long long* real, const long long* rerouted, void* out_ids, void* out_weights, int num_tokens, int stride,
    int choice_stride,
    int mask_stride, float epsilon, float scale, float threshold, int least, int budget, int blocks, int threads,
    int bytes) {
  problem = nullptr;
  if (bytes < (int)sizeof(Board)) return "less shared memory than a board takes";
  run_grid(blocks, 1, threads, bytes, [=] {
    route_cluster(scores, router, choice, bias, ids, weights, mask, similarity, projection, real, rerouted, out_ids,
                  out_weights, num_tokens, stride, choice_stride, mask_stride, epsilon, scale, threshold, least, budget,
                  blocks); }, blocks);
  return problem;
}
"""


def build(files: list[Path], macros: list[tuple[str, int]], launcher: str, folder: Path) -> ctypes.CDLL:
    """The library for one specialisation of kernels in these files."""
    header = (Path(__file__).parent / "cuda_on_cpu.h").read_text()
    # One of the same name would be taken for a library that is loaded already.
    own = Path(tempfile.mkdtemp(dir=folder))
    source, library = own / "kernels.cpp", own / "kernels.so"
    source.write_text("\n".join([header, *(file.read_text() for file in files), launcher]))
    options = [f"-D{name}={value}" for name, value in macros]
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *options, "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = ctypes.CDLL(str(library))
    found.launch.restype = ctypes.c_char_p
    return found


def files_of(module: ModuleType) -> list[Path]:
    """The kernels that a module launches."""
    return [Path(str(module.__file__)).parent / name for name in module.SOURCES]


def run_cluster(rows: Rows, rerouting: Rerouting, selection: Selection, outs: Outs, cut: tuple[int, int], folder: Path):
    """What `launch_cluster` does, with blocks and threads of choice."""
    one = cluster.cluster_of(rows, rerouting, selection, *outs)
    library = build(files_of(cluster), one.macros(), CLUSTER_LAUNCHER, folder)
    blocks, threads = cut
    values = [nvrtc._value(a) for a in cluster.arguments(rows, rerouting, selection, *outs, blocks)]
    problem = library.launch(*values, threads, one.shared_bytes)
    assert problem is None, problem.decode()


def run(call: stream.Call, activation: str, interleaved: bool, config: stream.StreamConfig, folder: Path):
    """What `launch_stream` gives, on poisoned memory."""
    one = stream.stream_of(call, activation, interleaved, config)
    library = build(files_of(stream), one.macros(), LAUNCHER, folder)
    tokens = call.hidden.shape[0]
    act = torch.full((tokens * one.top_k, one.inner), torch.nan, dtype=call.hidden.dtype)
    rows = torch.full((tokens * one.top_k, one.hidden), torch.nan)
    out = torch.full_like(call.hidden, torch.nan)
    tensors = (call.hidden, call.gate_up, call.gate_up_scale, call.gate_up_bias, call.down, call.down_scale,
               call.down_bias, call.topk_ids, call.topk_weights, act, rows, out,
               *stream.room_for_rounded(one, call.hidden), *stream.room_for_rounded(one, act))  # fmt: skip
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    problem = library.launch(*pointers, tokens, BLOCKS, one.shared_bytes)
    assert problem is None, problem.decode()
    return out
