"""Time the kernels of `sere::expert_mlp` on a CUDA device and search their tiles.

    python -m benchmarks.ops.bench_expert_mlp qwen3-30b-a3b [--sweep] [--tokens 8,32] [--stock] [--seconds 60]

Routing: top-k of Gaussian logits (near uniform), re-routed along a random similarity matrix for S < K. Every call of
a captured graph has its own ids. `%` is of the bandwidth of a device-to-device copy, over the weights of active
experts alone.
"""

import argparse
import concurrent.futures
import itertools
import multiprocessing
import statistics
import sys
import time

import torch

from sere_compile.benchmark.geometries import GEOMETRIES
from sere_compile.benchmark.timing import capture, copy_bandwidth, time_in_turn
from sere_compile.ops import expert_mlp, reroute
from sere_compile.ops.expert_mlp import kernel as K
from sere_compile.ops.expert_mlp.reference import activate
from sere_compile.ops.expert_mlp.tiles import TileConfig, launch_config

CALLS = 6
DEVICE = "cuda"
SMS = 132


def make_layer(geometry):
    """Random weights in bf16: gate_up, down, biases, activation, interleaved, transposed."""
    g, kind = geometry, {"dtype": torch.bfloat16, "device": DEVICE}
    gate_up = torch.empty(g.experts, 2 * g.inner, g.hidden, **kind).normal_(std=0.02)
    down = torch.empty(g.experts, g.hidden, g.inner, **kind).normal_(std=0.02)
    if g.transposed:
        gate_up, down = gate_up.view(g.experts, g.hidden, 2 * g.inner), down.view(g.experts, g.inner, g.hidden)
    biases = [torch.randn(g.experts, n, **kind) if g.bias else None for n in (2 * g.inner, g.hidden)]
    return gate_up, down, *biases, g.activation, g.interleaved, g.transposed


def make_routing(geometry, tokens, select, seed=0):
    """(hidden, ids, weights) with S = select."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    logits = torch.randn(tokens, geometry.experts, device=DEVICE, generator=generator)
    similarity = torch.rand(geometry.experts, geometry.experts, device=DEVICE, generator=generator)
    weights, ids = logits.softmax(1).topk(geometry.top_k, dim=1)
    hidden = torch.randn(tokens, geometry.hidden, dtype=torch.bfloat16, device=DEVICE, generator=generator)
    return hidden, reroute(ids, similarity, select), (weights / weights.sum(1, keepdim=True)).bfloat16()


def check(geometry, layer):
    for tokens in (1, 5, 64):
        x = make_routing(geometry, tokens, geometry.top_k)
        got = expert_mlp(*x, *layer).double()
        want = torch.zeros_like(got)
        rows = min(tokens, 3)
        for t, k in itertools.product(range(rows), range(geometry.top_k)):
            expert = [w[x[1][t, k]].double() if isinstance(w, torch.Tensor) else w for w in layer]
            want[t] += x[2][t, k].double() * expert_fp64(x[0][t].double(), *expert)
        error = ((got[:rows] - want[:rows]).norm() / want[:rows].norm()).item()
        print(f"T={tokens}: relative error against fp64 {error:.1e}")
        if not error < 8e-3:
            sys.exit("MISMATCH")


def expert_fp64(x, gate_up, down, gate_up_bias, down_bias, activation, interleaved, transposed):
    """One expert's output for one token."""
    first, second = (gate_up.T, down.T) if transposed else (gate_up, down)
    y = first @ x
    y = y if gate_up_bias is None else y + gate_up_bias
    y = second @ activate(y, activation, interleaved)
    return y if down_bias is None else y + down_bias


# The sweep


def gate_up_launch(geometry, tensors, config):
    """Kernel, grid, arguments of the first projection; tensors may be dtypes, to compile alone."""
    g = geometry
    strides = (2 * g.inner * g.hidden, *((1, 2 * g.inner) if g.transposed else (g.hidden, 1)))
    names = ("hidden", "gate_up", "gate_up_bias", "scale", "ids", "act", "order", "active", "first", "num_slots")
    args = [*(tensors[n] for n in names), g.top_k, 1]
    kwargs = dict(
        K=g.top_k, E=g.experts, HIDDEN=g.hidden, INNER=g.inner, ACTIVATION=g.activation.removesuffix("_glu"),
        GATED=True, INTERLEAVED=g.interleaved, HAS_BIAS=g.bias,
        SCALE=0, ALIGN=config.step, PLANNED=False, **K.chunk_of(tensors["num_slots"], g.experts, 4096),
        **config.arguments(),
    )  # fmt: skip
    return K.gate_up_kernel, (config.per_sm * SMS,), (*args, *strides), kwargs


def down_launch(geometry, tensors, config):
    g = geometry
    strides = (g.inner * g.hidden, *((1, g.hidden) if g.transposed else (g.inner, 1)), g.top_k, 1)
    args = [tensors[n] for n in ("act", "down", "down_bias", "scale", "weights", "out", "order", "active", "first")]
    kwargs = dict(
        K=g.top_k, E=g.experts, HIDDEN=g.hidden, INNER=g.inner, HAS_BIAS=g.bias, SCALE=0, **config.arguments()
    )
    return K.down_kernel, (config.per_sm * SMS,), (*args, tensors["num_slots"], *strides), kwargs


def start(launch):
    kernel, grid, args, kwargs = launch
    kernel[grid](*args, **kwargs)


LAUNCHES = {"gate_up": gate_up_launch, "down": down_launch}


def candidates(geometry, which):
    """Tiles that fill the shared memory of a multiprocessor with 48 KiB of weights in flight or more."""
    width, depth = (geometry.inner, geometry.hidden) if which == "gate_up" else (geometry.hidden, geometry.inner)
    wide = 2 if which == "gate_up" else 1
    for n, k, warps, stages, swap, m, per_sm in itertools.product(
        (16, 32, 64, 128), (64, 128, 256), (2, 4, 8), (2, 3, 4, 5), (False, True), (32, 64), (1, 2, 3, 4, 6)
    ):
        weights, rows = wide * n * k * 2, m * k * 2
        buffers = stages if swap else stages - 1
        shared = per_sm * buffers * (weights + rows)
        if width % n or depth % k or not 8192 <= weights <= 65536 or per_sm * warps > 16 or (m == 64 and k != 128):
            continue
        if shared > 225000 or per_sm * buffers * weights < 49152 or shared * (per_sm + 1) / per_sm < 130000:
            continue
        if (swap and (n < 64 or warps != n // 16)) or (warps == 2 and n > 32) or (warps == 8 and n < 64):
            continue
        for align in (4, None) if which == "gate_up" else (None,):
            yield TileConfig(n, k, warps, stages, per_sm, m, swap, align)


def compile_alone(name, which, configs, tokens_of):
    """In a process of its own: fill Triton's cache."""
    geometry = GEOMETRIES[name]
    dtypes = dict.fromkeys(
        ("hidden", "gate_up", "gate_up_bias", "scale", "act", "down", "down_bias", "weights"), torch.bfloat16
    )
    dtypes |= dict.fromkeys(("order", "active", "first"), torch.int32) | {"out": torch.float32, "ids": torch.int64}
    for config, tokens in itertools.product(configs, tokens_of if which == "gate_up" else tokens_of[:1]):
        slots = tokens * geometry.top_k
        kernel, grid, args, kwargs = LAUNCHES[which](geometry, dtypes | {"num_slots": slots}, config)
        try:
            kernel.warmup(*args, grid=grid, **kwargs)
        except Exception as error:  # noqa: BLE001 - reported where it is timed
            print("cannot compile", config, type(error).__name__, str(error)[:100])


def sweep(name, geometry, layer, cases, bandwidth, seconds):
    """Time each projection alone for each case (tokens, select)."""
    configs = {which: list(candidates(geometry, which)) for which in LAUNCHES}
    print({which: len(c) for which, c in configs.items()}, "candidates")
    begin, timed_since = time.time(), None
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(14, mp_context=context) as pool:
        work = [(which, configs[which][i::14]) for which in LAUNCHES for i in range(14)]
        tokens_of = [sorted({tokens for tokens, _ in cases})] * len(work)
        list(pool.map(compile_alone, [name] * len(work), *zip(*work, strict=True), tokens_of))
    print(f"compiled in {time.time() - begin:.0f} s")
    for which in LAUNCHES:
        results = []
        inputs = {case: [case_tensors(geometry, layer, *case, seed) for seed in range(CALLS)] for case in cases}
        for config in configs[which]:
            if timed_since is not None and time.time() - timed_since > seconds:
                print("out of time")
                break
            row = []
            try:
                for case in cases:
                    launches = [LAUNCHES[which](geometry, t, config) for t in inputs[case]]
                    compare_launch(launches[0], which, inputs[case][0])
                    graph = capture(start, launches)
                    row.append(time_in_turn({"": graph}, CALLS, 9)[""].median)
            except Exception as error:  # noqa: BLE001 - a tile that does not fit is a result
                print("failed:", config, type(error).__name__, str(error)[:80])
                continue
            results.append((row, config))
            timed_since = timed_since or time.time()
        share = (2 if which == "gate_up" else 1) * geometry.hidden * geometry.inner * 2
        bytes_read = [statistics.mean(len(t["ids"].unique()) for t in inputs[case]) * share for case in cases]
        floors = [b / bandwidth * 1e6 for b in bytes_read]
        print(f"\n{which}: us per launch at (T, S) {cases}; floors {[f'{f:.1f}' for f in floors]}")
        best = [min(row[i] for row, _ in results) for i in range(len(cases))]
        shown = sorted(results, key=lambda r: sum(t / b for t, b in zip(r[0], best, strict=True)))[:12]
        for i in range(len(cases)):
            shown += sorted(results, key=lambda r, i=i: r[0][i])[:3]
        for row, config in shown:
            print("  ", " ".join(f"{t:7.1f} ({f / t:4.0%})" for t, f in zip(row, floors, strict=True)), config)


def compare_launch(launch, which, tensors):
    """Raise AssertionError where a tile's results are not those of the tiles in use."""
    result = tensors["act" if which == "gate_up" else "out"]
    result.fill_(float("nan"))
    start(launch)
    want = tensors[f"{which}_wanted"]
    torch.testing.assert_close(result, want, rtol=1e-2, atol=1e-2 * want.abs().max().item())


def case_tensors(geometry, layer, tokens, select, seed):
    hidden, ids, weights = make_routing(geometry, tokens, select, seed)
    slots = ids.numel()
    gate_up, down, gate_up_bias, down_bias, *options = layer
    tiles = launch_config(torch.bfloat16, geometry.transposed)
    act, order, active, first = K.launch_gate_up(hidden, ids, gate_up, gate_up_bias, *options, tiles)
    tensors = {
        "hidden": hidden, "ids": ids, "weights": weights, "order": order, "active": active, "first": first,
        "num_slots": slots,
        "gate_up": gate_up, "scale": hidden,
        "down": down, "gate_up_bias": hidden if gate_up_bias is None else gate_up_bias,
        "down_bias": act if down_bias is None else down_bias, "act": act,
        "out": torch.empty(slots, geometry.hidden, device="cuda"),
        "gate_up_wanted": act.clone(),
    }  # fmt: skip
    start(down_launch(geometry, tensors, tiles.down))
    return tensors | {"down_wanted": tensors["out"].clone()}


# The whole operator


def stock_experts(name, layer, implementation):
    """Transformers' module of experts over the same weights, compiled."""
    from transformers import AutoModel

    config = GEOMETRIES[name].config(2)
    with torch.device("meta"):
        model = AutoModel.from_config(config, experts_implementation=implementation)
    experts = next(m for n, m in model.named_modules() if n.endswith("experts") and hasattr(m, "gate_up_proj"))
    gate_up, down, gate_up_bias, down_bias, *_ = layer
    experts.gate_up_proj, experts.down_proj = torch.nn.Parameter(gate_up, False), torch.nn.Parameter(down, False)
    if gate_up_bias is not None:
        experts.gate_up_proj_bias = torch.nn.Parameter(gate_up_bias, False)
        experts.down_proj_bias = torch.nn.Parameter(down_bias, False)
    return torch.compile(experts, dynamic=False)


def prepare(name, geometry, layer, tokens, selects, stock, batched_up_to):
    """For every (T, S): mean active experts and one CUDA graph a variant. What has to be compiled is compiled here."""
    cases = {}
    for count in tokens:
        torch._dynamo.reset()
        functions = {"ours": torch.compile(lambda *x: expert_mlp(*x, *layer), dynamic=False)}
        used = [s for s in stock if s != "batched_mm" or count <= batched_up_to]
        functions |= {s: stock_experts(name, layer, s) for s in used}
        for select in selects:
            inputs = [make_routing(geometry, count, select, seed) for seed in range(CALLS)]
            active = statistics.mean(len(i[1].unique()) for i in inputs)
            graphs = {n: capture(lambda x, f=f: f(*x), inputs) for n, f in functions.items()}
            cases[count, select] = active, graphs, inputs
    return cases


def compare(name, geometry, cases, bandwidth):
    """The operator in torch.compile, and stock modules compiled: a line for each T and S, then the fixed cost."""
    print(f"\n{name}: us per layer, experts alone")
    points = []
    for (count, select), (active, graphs, _) in cases.items():
        times = time_in_turn(graphs, CALLS, 15)
        floor = active * geometry.expert_elements * 2 / bandwidth * 1e6
        points.append((active, times["ours"].median))
        text = ", ".join(f"{n} {t}" for n, t in times.items())
        best = min((t.median for n, t in times.items() if n != "ours"), default=float("nan")) / times["ours"].median
        share = floor / times["ours"].median
        print(
            f"T={count} S={select}: {active:.1f} active, floor {floor:.1f}, {share:.0%}; {best:.2f}x; {text}",
            flush=True,
        )
    if len(points) > 1:
        mean_x, mean_y = (statistics.mean(c) for c in zip(*points, strict=True))
        slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
        print(f"a line through the times: fixed {mean_y - slope * mean_x:.1f} us, {slope:.2f} us per expert")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometry", choices=GEOMETRIES)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--stock", default="", help="experts implementations of transformers, best first")
    parser.add_argument("--batched-up-to", type=int, default=32, help="most tokens that batched_mm is timed with")
    parser.add_argument("--tokens", default="8,32")
    parser.add_argument("--selects", default="")
    parser.add_argument("--sweep-cases", default="8:8,32:8,32:1")
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    name, geometry = arguments.geometry, GEOMETRIES[arguments.geometry]
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    layer = make_layer(geometry)
    with torch.inference_mode():
        check(geometry, layer)
        if arguments.sweep:
            cases = [tuple(map(int, case.split(":"))) for case in arguments.sweep_cases.split(",")]
            sweep(name, geometry, layer, cases, bandwidth, arguments.seconds)
        selects = [int(s) for s in arguments.selects.split(",") if s] or [geometry.top_k]
        tokens = [int(t) for t in arguments.tokens.split(",")]
        stock = [s for s in arguments.stock.split(",") if s]
        compare(
            name, geometry, prepare(name, geometry, layer, tokens, selects, stock, arguments.batched_up_to), bandwidth
        )


if __name__ == "__main__":
    main()
