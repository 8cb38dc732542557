"""Time `sere::expert_mlp`'s CUDA C++ kernels against Triton's on a CUDA device: configurations, sizes, FP8.

    python -m benchmarks.ops.bench_stream [qwen3-30b-a3b] [--fp8 | --fp8-activations] [--cases 1:8,8:1,32:1] [--wgmma]

A case is T:S, routed as in `bench_expert_mlp`. Without Inductor, each variant one CUDA graph of six calls with ids of
their own, all in turn; the floor is the bytes of the active experts' weights at the rate of a copy. In brackets: how
far a variant's result is from the first one's.
"""

import argparse
import dataclasses
import itertools
import re
import statistics

import torch

from sere_compile.benchmark.geometries import GEOMETRIES
from sere_compile.benchmark.timing import capture, copy_bandwidth, time_in_turn
from sere_compile.ops.expert_mlp.kernel import launch_expert_mlp
from sere_compile.ops.expert_mlp.reference import Call
from sere_compile.ops.expert_mlp.stream import StreamConfig, has_wgmma, launch_stream, stream_config

from .bench_expert_mlp import CALLS, make_layer, make_routing

CASES = "1:8,2:8,4:8,8:8,8:1,16:1,32:8,32:2,32:1,64:8,64:1"


def wgmma_configs(num_slots):
    """By name: mma.sync as before, what is in use, wgmma with other starts, slots per pass, warps, blocks."""
    rows = 8 if num_slots <= 8 else 16
    one = StreamConfig(rows, trigger=8, wgmma=True, row_warps=4)
    changes = {
        "wgmma": {}, "start -1": {"trigger": -1}, "start 4": {"trigger": 4}, "start 16": {"trigger": 16},
        "2 warps": {"row_warps": 2}, "32 rows": {"rows": 32}, "1 block": {"blocks": 1},
        "ahead": {"rounds_ahead": True}, "ahead, 2 warps": {"rounds_ahead": True, "row_warps": 2},
        "ahead, 2 warps, start -1": {"rounds_ahead": True, "row_warps": 2, "trigger": -1},
        "ahead, 32 rows": {"rounds_ahead": True, "rows": 32}, "ahead, 1 block": {"rounds_ahead": True, "blocks": 1},
    }  # fmt: skip
    chosen = {name: dataclasses.replace(one, **change) for name, change in changes.items()}
    used = stream_config(num_slots, True, True, True)
    return {"mma.sync": stream_config(num_slots, True, True), "in use": used} | chosen


def configs(num_slots, fp8, fp8_activations):
    """By name: the one in use, and others of groups, starts of the second projection and slots per pass."""
    used = stream_config(num_slots, fp8, fp8_activations, has_wgmma(0))
    found = {"stream": used}
    if num_slots > 512:
        return found
    others = [StreamConfig(used.rows, *other) for other in itertools.product((1, 2), (-1, 8, 16))]
    others += [StreamConfig(rows, used.groups, used.trigger) for rows in (16, 32)]
    return found | {f"{c.rows}x{c.groups} {c.trigger}": c for c in others if c != used}


def as_fp8(weight):
    """(FP8 values, a scale for each block) of a weight [E, R, C]: random ones, as timing needs no others."""
    experts, rows, columns = weight.shape
    scale = torch.full((experts, -(-rows // 128), -(-columns // 128)), 1e-3, device=weight.device)
    return (weight.float() * 1000).clamp(-400, 400).to(torch.float8_e4m3fn), scale


def variants(layer, num_slots, fp8, fp8_activations, wgmma, wanted):
    """Functions of (hidden, ids, weights) by name; `wgmma`: ways to use it, without Triton's kernels."""
    gate_up, down, gate_up_bias, down_bias, activation, interleaved, transposed = layer
    fp8, scales = fp8 or fp8_activations, (None, None, False)
    if fp8:
        (gate_up, gate_up_scale), (down, down_scale) = as_fp8(gate_up), as_fp8(down)
        scales = (gate_up_scale, down_scale, fp8_activations)
    weights = (gate_up, down, gate_up_bias, down_bias)

    def triton(*x):
        return launch_expert_mlp(*x, *weights, activation, interleaved, transposed, None, *scales)

    def stream(config):
        return lambda *x: launch_stream(Call(*x, *weights, *scales), activation, interleaved, config)

    if wgmma:
        found = {name: stream(config) for name, config in wgmma_configs(num_slots).items()}
    else:
        chosen = configs(num_slots, fp8, fp8_activations)
        found = {"triton": triton} | {name: stream(config) for name, config in chosen.items()}
    return {name: function for name, function in found.items() if wanted.search(name)}


def distances(functions, x):
    """Of each function's result for x from the first one's, relative to that."""
    results = {name: f(*x) for name, f in functions.items()}
    if any(result is None for result in results.values()):
        raise SystemExit("CUDA C++ that does not compile: see the warning above")
    first = next(iter(results.values())).double()
    return {name: float((result.double() - first).norm() / first.norm()) for name, result in results.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometry", choices=GEOMETRIES, nargs="?", default="qwen3-30b-a3b")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--fp8", action="store_true", help="FP8 weights, 16-bit activations")
    kind.add_argument("--fp8-activations", action="store_true", help="FP8 weights, activations rounded to FP8")
    parser.add_argument(
        "--wgmma", action="store_true", help="ways to use wgmma, against mma.sync; with --fp8-activations"
    )
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--variants", type=re.compile, default="", help="those whose names have this (a pattern)")
    arguments = parser.parse_args()
    fp8 = arguments.fp8 or arguments.fp8_activations
    if arguments.wgmma and not arguments.fp8_activations:
        parser.error("--wgmma needs --fp8-activations")
    geometry = GEOMETRIES[arguments.geometry]
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    with torch.inference_mode():
        layer = make_layer(geometry)
        for case in arguments.cases.split(","):
            tokens, select = map(int, case.split(":"))
            inputs = [make_routing(geometry, tokens, select, seed) for seed in range(CALLS)]
            active = statistics.mean(len(i[1].unique()) for i in inputs)
            size = 1 if fp8 else 2
            floor = active * geometry.expert_elements * size / bandwidth * 1e6
            kind = (arguments.fp8, arguments.fp8_activations, arguments.wgmma, arguments.variants)
            functions = variants(layer, inputs[0][1].numel(), *kind)
            far = distances(functions, inputs[0])
            graphs = {name: capture(lambda x, f=f: f(*x), inputs) for name, f in functions.items()}
            times = time_in_turn(graphs, CALLS, 15)
            text = ", ".join(f"{name} {time.median:.1f} ({far[name]:.0e})" for name, time in times.items())
            print(f"T={tokens} S={select}: {active:.1f} active, floor {floor:.1f}; {text}", flush=True)


if __name__ == "__main__":
    main()
