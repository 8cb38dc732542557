"""Time `sere::route` against the same routing in PyTorch: `python tests/ops/bench_route.py` (needs CUDA).

Each variant is one CUDA graph of 20 calls on inputs of their own, replayed in turn; printed is the median of a call
in microseconds. Outputs are compared first.
"""

from __future__ import annotations

import statistics

import torch

from sere_compile.ops.reroute import reroute
from sere_compile.ops.route import route

CALLS, REPLAYS, WARM_UP = 20, 200, 20
# E, K, scoring, bias, renormalize
GEOMETRIES = [(128, 8, "softmax", False, True), (8, 2, "softmax", False, True), (256, 8, "sigmoid", True, True)]
TOKENS = (1, 8, 32, 64, 128, 256)


def stock(logits, bias, top_k, scoring, renormalize):
    scores = logits.float().softmax(-1) if scoring == "softmax" else logits.float().sigmoid()
    values, ids = torch.topk(scores if bias is None else scores + bias, top_k, dim=-1)
    if bias is not None:
        values = scores.gather(-1, ids)
    if renormalize:
        values = values / values.sum(-1, keepdim=True)
    return values.to(logits.dtype), ids


def capture(function, inputs):
    for x in inputs[:3]:
        function(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = [function(x) for x in inputs]
    return graph, keep


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    print(f"{'E':>4} {'K':>2} {'T':>4} {'eager':>8} {'inductor':>9} {'route':>7} {'route+reroute':>14}")
    for experts, top_k, scoring, has_bias, renormalize in GEOMETRIES:
        bias = torch.randn(experts, device="cuda") * 0.1 if has_bias else None
        similarity = torch.rand(experts, experts, device="cuda")
        compiled = torch.compile(stock, dynamic=False)
        for tokens in TOKENS:
            inputs = [torch.randn(tokens, experts, device="cuda", dtype=torch.bfloat16) for _ in range(CALLS)]
            options = (bias, top_k, scoring, renormalize)

            def ours(x, options=options):
                return route(x, *options, dtype=torch.bfloat16)

            def both(x, ours=ours, similarity=similarity):
                weights, ids = ours(x)
                return weights, reroute(ids, similarity, 2 if ids.shape[1] > 2 else 1)

            torch.testing.assert_close(ours(inputs[0])[0], stock(inputs[0], *options)[0], rtol=2e-2, atol=1e-3)
            functions = {
                "eager": lambda x, options=options: stock(x, *options),
                "inductor": lambda x, options=options, compiled=compiled: compiled(x, *options),
                "route": ours,
                "both": both,
            }
            graphs = {name: capture(function, inputs) for name, function in functions.items()}
            times: dict[str, list[float]] = {name: [] for name in functions}
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for step in range(REPLAYS):
                for name, (graph, _) in graphs.items():
                    start.record()
                    graph.replay()
                    end.record()
                    end.synchronize()
                    if step >= WARM_UP:
                        times[name].append(start.elapsed_time(end) * 1e3 / CALLS)
            median = {name: statistics.median(values) for name, values in times.items()}
            print(
                f"{experts:4} {top_k:2} {tokens:4} {median['eager']:8.1f} {median['inductor']:9.1f} "
                f"{median['route']:7.1f} {median['both']:14.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
