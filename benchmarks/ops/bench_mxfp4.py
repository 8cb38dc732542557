"""Time `sere::expert_mlp` with MXFP4 weights on a CUDA device: tiles, the same numbers in bf16, and vLLM's kernels.

    python -m benchmarks.ops.bench_mxfp4 [gpt-oss-20b] [--cases 1:4,8:1,32:1] [--variants PATTERN]

A case is T:S, routed as in `bench_expert_mlp`. Without Inductor, each variant one CUDA graph of six calls with ids of
their own, all in turn; the floor is the bytes of the active experts in MXFP4 at the rate of a copy. In brackets: how
far a variant's result is from that in bf16. vLLM's, where it is installed, are what its modular experts for MXFP4 call.
"""

import argparse
import itertools
import re
import statistics
import types

import torch

from sere_compile.benchmark.geometries import GEOMETRIES
from sere_compile.benchmark.timing import capture, copy_bandwidth, time_in_turn
from sere_compile.ops.expert_mlp.kernel import launch_expert_mlp
from sere_compile.ops.expert_mlp.mxfp4 import MX_BLOCK, mxfp4_sizes, unpack_mxfp4
from sere_compile.ops.expert_mlp.tiles import LaunchConfig, TileConfig, launch_config
from sere_compile.ops.repeats import merge_repeats

from .bench_expert_mlp import CALLS, DEVICE, make_routing
from .bench_stream import distances

CASES = "1:4,4:4,8:4,8:1,32:4,32:2,32:1,64:4,64:1,128:4,256:1"
SHARED = 220 * 1024
BYTES = 0.5 + 1 / MX_BLOCK  # of a weight


def make_packed(geometry):
    """(bytes, scales) of gate_up and of down, random, and biases."""
    g = geometry
    packed = []
    for sizes in ((g.experts, 2 * g.inner, g.hidden), (g.experts, g.hidden, g.inner)):
        of_bytes, of_scales = mxfp4_sizes(sizes)
        drawn = torch.randint(256, of_bytes, dtype=torch.uint8, device=DEVICE)
        packed.append((drawn, torch.randint(118, 122, of_scales, dtype=torch.uint8, device=DEVICE)))
    biases = [torch.randn(g.experts, n, dtype=torch.bfloat16, device=DEVICE) for n in (2 * g.inner, g.hidden)]
    return *packed, *(biases if g.bias else (None, None))


def tiles():
    """By name: columns, depth, warps, stages and programs per multiprocessor of both projections."""
    for n, k, stages, per_sm, swap in itertools.product((32, 64), (64, 128, 256), (3, 5), (2, 3), (False, True)):
        # A stage: 2 n rows of k / 2 bytes, and 32 of k activations.
        fits = per_sm * stages * (n * k + 2 * 32 * k) <= SHARED
        if fits and not (swap and n < 64):
            tile = TileConfig(n, k, 4, stages, per_sm, swap=swap)
            yield f"{n} {k} {stages} {per_sm}{' swap' * swap}", LaunchConfig(tile, tile)


def vllm_experts(packed):
    """vLLM's experts for MXFP4 as a function of (hidden, ids, weights); None where it has none here."""
    try:
        from vllm.utils.import_utils import has_triton_kernels

        has_triton_kernels()  # vLLM has its own copy of the package, which this makes importable
        from triton_kernels.matmul_ogs import FlexCtx, PrecisionConfig
        from vllm.model_executor.layers.fused_moe.experts import gpt_oss_triton_kernels_moe as kernels
        from vllm.model_executor.layers.quantization.utils.mxfp4_utils import _swizzle_mxfp4
    except ImportError as error:
        print(f"without vLLM's kernels: {error}")
        return None
    (gate_up, gate_up_scale), (down, down_scale), *biases = packed
    layouts = [_swizzle_mxfp4(gate_up, gate_up_scale), _swizzle_mxfp4(down, down_scale)]
    precisions = [PrecisionConfig(weight_scale=scale, flex_ctx=FlexCtx(rhs_data=flex)) for _, flex, scale in layouts]
    config = types.SimpleNamespace(
        w1_bias=biases[0].float(), w2_bias=biases[1].float(), w1_precision=precisions[0], w2_precision=precisions[1]
    )
    experts = gate_up.shape[0]

    def run(hidden, ids, weights):
        # As the plug-in calls them: they take a token's experts for different ones.
        ids, weights = merge_repeats(ids, weights)
        routing = kernels.make_routing_data(ids, weights, experts)
        out = torch.empty_like(hidden)
        return kernels.triton_kernel_fused_experts(
            out, hidden, layouts[0][0], layouts[1][0], *routing, topk=ids.shape[1], quant_config=config
        )

    return run


def variants(geometry, packed, wanted):
    """Functions of (hidden, ids, weights) by name; the first is in bf16."""
    g = geometry
    (gate_up, gate_up_scale), (down, down_scale), *biases = packed
    wide = [unpack_mxfp4(*pair).bfloat16() for pair in packed[:2]]
    options = (g.activation, g.interleaved, False)

    def mxfp4(config):
        scales = gate_up_scale, down_scale
        return lambda *x: launch_expert_mlp(*x, gate_up, down, *biases, *options, config, *scales)

    found = {"bf16": lambda *x: launch_expert_mlp(*x, *wide, *biases, *options), "in use": mxfp4(None)}
    vllm = vllm_experts(packed) if g.activation == "gpt_oss" else None
    found |= {"vllm": vllm} if vllm is not None else {}
    found |= {name: mxfp4(config) for name, config in tiles()}
    return {name: function for name, function in found.items() if name == "bf16" or wanted.search(name)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometry", choices=GEOMETRIES, nargs="?", default="gpt-oss-20b")
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--variants", type=re.compile, default="", help="those whose names have this (a pattern)")
    arguments = parser.parse_args()
    geometry = GEOMETRIES[arguments.geometry]
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    print(f"in use: {launch_config(torch.bfloat16, False, mxfp4=True)}")
    with torch.inference_mode():
        functions = variants(geometry, make_packed(geometry), re.compile(arguments.variants))
        for case in arguments.cases.split(","):
            tokens, select = map(int, case.split(":"))
            inputs = [make_routing(geometry, tokens, select, seed) for seed in range(CALLS)]
            active = statistics.mean(len(i[1].unique()) for i in inputs)
            floor = active * geometry.expert_elements * BYTES / bandwidth * 1e6
            apart = distances(functions, inputs[0])
            graphs = {name: capture(lambda x, f=f: f(*x), inputs) for name, f in functions.items()}
            times = time_in_turn(graphs, CALLS, 15)
            print(f"T={tokens} S={select}: {active:.1f} active, floor {floor:.1f} us", flush=True)
            for name in sorted(times, key=lambda name: times[name].median):
                print(f"    {times[name].median:7.1f} us  {name} ({apart[name]:.0e})", flush=True)


if __name__ == "__main__":
    main()
