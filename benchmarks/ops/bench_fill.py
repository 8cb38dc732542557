"""Time filling beside re-routing: `python -m benchmarks.ops.bench_fill` (needs CUDA).

Each variant is one CUDA graph of 20 calls on inputs of their own, replayed in turn; printed is the median of a call in
microseconds. First the kernels are compared with the ATen reference on random cases. "route" is selection alone,
"route + reroute" and "route + fill" are selection and re-routing by `sere::route`, "fill" is `sere::fill` on given ids,
weights and scores; "Triton" beside them: its two launches, where one is used otherwise. `--tiles` times other cuts of
these.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from unittest import mock

import torch

from benchmarks.ops.bench_route import CALLS, ROUTERS, TOKENS, Router, time_all
from sere_compile.ops.fill import fill
from sere_compile.ops.fill.launch import Tile
from sere_compile.ops.fill.reference import fill_reference
from sere_compile.ops.route import launch, route

# Tokens and warps of a filling program.
TILES = ((1, 1), (1, 4), (2, 2), (2, 4), (2, 8), (4, 2), (4, 4), (4, 8), (8, 4), (8, 8))
# Experts, K and S of the comparison.
SHAPES = ((8, 2, 1), (60, 4, 2), (128, 8, 1), (512, 8, 2))


def check(cases: int = 200) -> None:
    """Exit with status 1 where kernel and reference differ on random input without near ties."""
    for seed in range(cases):
        generator = torch.Generator("cuda").manual_seed(seed)
        tokens, (experts, top_k, select) = (1, 7, 64, 300)[seed % 4], SHAPES[seed // 4 % len(SHAPES)]
        logits = torch.randn(tokens, experts, device="cuda", generator=generator) * 2
        scores = logits.softmax(-1)
        values, ids = scores.topk(top_k)
        # Whole numbers of 1/256: sums of squares are the same in any order.
        weights = (values / values.sum(-1, keepdim=True) * 256).round() / 256
        arguments = (ids, weights, scores, select, 0.0, seed % 9)
        new, want = fill(*arguments), fill_reference(*arguments)
        if not torch.equal(new[0], want[0]) or not torch.allclose(new[1], want[1], rtol=1e-5, atol=1e-8):
            sys.exit(f"MISMATCH between kernel and reference: seed {seed}, T={tokens}, E={experts}, K={top_k}")
    print(f"correctness: kernel == reference on {cases} random cases")


def bench(router: Router, tokens: int, tiles: bool) -> None:
    """One row: all variants of one router and number of tokens."""
    torch.manual_seed(0)
    experts, top_k = router.experts, router.top_k
    bias = torch.randn(experts, device="cuda") * 0.1 if router.bias else None
    similarity = torch.rand(experts, experts, device="cuda")
    inputs = [torch.randn(tokens, experts, device="cuda").to(router.dtype) for _ in range(CALLS)]
    settings = router.settings()
    numbers = (top_k, settings.scoring, True, 0.0, 1.0, torch.bfloat16, *router.groups)
    select = 1
    functions = {
        "route": lambda x: route(x, bias, *numbers),
        "route + reroute": lambda x: route(x, bias, *numbers, similarity, select, 0.0, top_k),
        "route + fill": lambda x: route(x, bias, *numbers, None, select, 0.0, top_k, fill=True),
    }
    functions["route + fill, Triton"] = _by_triton(functions["route + fill"])
    if tiles:
        del functions["route + reroute"], functions["route + fill"]
        for cut, tile in itertools.product((2, 4, 8, 16), TILES):
            if tokens <= cut * 16 <= 2 * max(16, tokens):
                functions[f"{cut}|{tile[0]},{tile[1]}"] = _cut(functions["route + fill, Triton"], cut, Tile(*tile))
    times = time_all(functions, inputs)
    if tiles:
        best = sorted(times, key=times.__getitem__)[:12]
        times = {name: times[name] for name in ("route", "route + fill, Triton", *best)}
    else:
        scored = [(x, x.float().softmax(-1), *functions["route"](x)) for x in inputs]
        alone = lambda x: fill(x[3], x[2], x[1], select, 0.0, top_k)  # noqa: E731
        times |= time_all({"fill": alone, "fill, Triton": _by_triton(alone)}, scored)
    row = ", ".join(f"{name} {value:.2f}" for name, value in times.items())
    print(f"E={experts} K={top_k} T={tokens}: {row}", flush=True)


def _by_triton(function):
    """The function with what `cluster.cu` would take left to Triton's kernels."""

    def call(x):
        with mock.patch("sere_compile.ops.cuda.cluster.takes", return_value=False):
            return function(x)

    return call


def _cut(function, tokens, tile):
    """The function with tokens of a selecting program and the filling programs' tile replaced."""

    def call(x):
        with (
            mock.patch.object(launch, "FILL_TOKENS", (tokens,)),
            mock.patch("sere_compile.ops.fill.launch.default_tile", return_value=tile),
        ):
            return function(x)

    return call


def main() -> None:
    """Compare, then print a row for each router and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", action="store_true", help="time cuts of the first router")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="T, several with commas")
    parser.add_argument("--routers", type=int, nargs="+", default=list(range(len(ROUTERS))), help="which")
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    if not arguments.tiles:
        check()
    for router in ROUTERS[:1] if arguments.tiles else [ROUTERS[i] for i in arguments.routers]:
        print(router)
        for tokens in map(int, arguments.tokens.split(",")):
            bench(router, tokens, arguments.tiles)


if __name__ == "__main__":
    main()
