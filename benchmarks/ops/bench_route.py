"""Time `sere::route` against the same routing in PyTorch: `python -m benchmarks.ops.bench_route` (needs CUDA).

Each variant is one CUDA graph of 20 calls on inputs of their own, replayed in turn; printed is the median of a call
in microseconds. Outputs are compared first. Two launches are `sere::route` and `sere::reroute` one after the other,
one launch is Triton's with a similarity, with the tile that it chooses; a cluster is `sere::route` itself on Hopper
and later, up to 64 tokens. `--tiles` times others. `--hidden H` times
routing from hidden states instead: the router's product and what follows it, by Triton's two launches, with
re-routing in one launch, and with the product in that launch too.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable

import torch

from sere_compile.benchmark.timing import capture, time_in_turn
from sere_compile.ops.cuda.cluster import MOST_REROUTED_TOKENS, takes
from sere_compile.ops.reroute import reroute
from sere_compile.ops.route import route
from sere_compile.ops.route.launch import Tile, is_narrow, launch_route, one_launch, tile_for
from sere_compile.ops.route.reference import Rerouting, Scoring

CALLS, REPLAYS, WARM_UP = 20, 130, 20


@dataclasses.dataclass(frozen=True)
class Router:
    experts: int
    top_k: int
    scoring: str
    bias: bool
    dtype: torch.dtype
    groups: tuple = (1, 1, "max", True)

    def settings(self) -> Scoring:
        return Scoring(self.top_k, self.scoring, True, 0.0, 1.0, torch.bfloat16, *self.groups)


ROUTERS = [
    Router(128, 8, "softmax", False, torch.bfloat16),
    Router(8, 2, "softmax", False, torch.bfloat16),
    Router(64, 6, "softmax", False, torch.float32),
    Router(256, 8, "sigmoid", True, torch.float32, (8, 4, "top2", False)),
]
TOKENS = (1, 8, 32, 64, 128, 256)
TILES = [
    (2, 16, 2),
    (4, 16, 4),
    (4, 32, 4),
    (4, 64, 4),
    (8, 32, 8),
    (8, 64, 8),
    (8, 128, 8),
    (16, 64, 16),
    (16, 128, 16),
]


def stock(logits, bias, router: Router):
    """The chain as models write it."""
    scores = logits.float().softmax(-1) if router.scoring == "softmax" else logits.float().sigmoid()
    choice = scores if bias is None else scores + bias
    count, chosen = router.groups[:2]
    if chosen < count:
        best = choice.view(-1, count, router.experts // count).topk(2, dim=-1)[0].sum(-1)
        mask = torch.zeros_like(best).scatter_(1, torch.topk(best, chosen, sorted=False)[1], 1)
        mask = mask.unsqueeze(-1).expand(-1, count, router.experts // count).reshape(-1, router.experts)
        choice = choice.masked_fill(~mask.bool(), float("-inf"))
    values, ids = torch.topk(choice, router.top_k, dim=-1)
    if bias is not None:
        values = scores.gather(-1, ids)
    return (values / values.sum(-1, keepdim=True)).to(torch.bfloat16), ids


def time_all(functions: dict[str, Callable], inputs: list[torch.Tensor]) -> dict[str, float]:
    graphs = {name: capture(f, inputs) for name, f in functions.items()}
    return {name: timing.median for name, timing in time_in_turn(graphs, CALLS, REPLAYS, WARM_UP).items()}


def bench(router: Router, tokens: int, tiles: list[tuple], with_stock: bool) -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    bias = torch.randn(router.experts, device=device) * 0.1 if router.bias else None
    similarity = torch.rand(router.experts, router.experts, device=device)
    inputs = [torch.randn(tokens, router.experts, device=device).to(router.dtype) for _ in range(CALLS)]
    settings, narrow = router.settings(), is_narrow(inputs[0], bias, router.settings())
    numbers = dataclasses.astuple(settings)
    selects = [s for s in (2, 1) if s < router.top_k]
    functions: dict[str, Callable] = {}
    if with_stock:
        torch._dynamo.reset()
        compiled = torch.compile(stock, dynamic=False)
        functions["inductor"] = lambda x: compiled(x, bias, router)
    functions["route"] = lambda x: route(x, bias, *numbers)
    for s in selects:
        rerouting = Rerouting(similarity, s, 0.0, router.top_k)
        functions[f"two, S={s}"] = lambda x, s=s: (
            (y := route(x, bias, *numbers))[0],
            reroute(y[1], similarity, s, 0.0, router.top_k),
        )
        chosen = tile_for(tokens, 1 << (router.experts - 1).bit_length(), narrow)
        options = {f"one, S={s}": chosen} if not tiles else {f"{t}, S={s}": Tile(*t) for t in tiles}
        for name, tile in options.items():
            functions[name] = lambda x, tile=tile, r=rerouting: launch_route(x, bias, settings, r, tile)
        if takes(inputs[0].shape, router.top_k, inputs[0], bias, most=MOST_REROUTED_TOKENS):
            functions[f"cluster, S={s}"] = lambda x, s=s: route(x, bias, *numbers, similarity, s, 0.0, router.top_k)
    for s in selects:
        want = functions[f"two, S={s}"](inputs[0])
        for name, function in functions.items():
            if name.endswith(f"S={s}"):
                assert torch.equal(function(inputs[0])[1], want[1]), f"{name} disagrees"
    torch.testing.assert_close(
        functions["route"](inputs[0])[0], stock(inputs[0], bias, router)[0], rtol=2e-2, atol=1e-3
    )
    times = time_all(functions, inputs)
    joined = one_launch(tokens, router.experts, narrow, Rerouting(similarity, 1))
    row = ", ".join(f"{name} {value:.2f}" for name, value in times.items())
    print(f"E={router.experts} K={router.top_k} T={tokens}: {row}; chooses {'one' if joined else 'two'}", flush=True)


def bench_hidden(router: Router, tokens: int, width: int) -> None:
    """One row of routing from hidden states [T, H], S = 1."""
    torch.manual_seed(0)
    bias = torch.randn(router.experts, device="cuda") * 0.1 if router.bias else None
    similarity = torch.rand(router.experts, router.experts, device="cuda")
    inputs = [torch.randn(tokens, width, device="cuda", dtype=router.dtype) for _ in range(CALLS)]
    # As many weights as calls: each layer of a model reads its own, and what lies between them fills the L2.
    weights = [torch.randn(router.experts, width, device="cuda", dtype=router.dtype) / width**0.5 for _ in inputs]
    settings, rerouting = router.settings(), Rerouting(similarity, 1, 0.0, router.top_k)
    numbers = (*dataclasses.astuple(settings), similarity, 1, 0.0, router.top_k)
    linear = torch.nn.functional.linear
    functions: dict[str, Callable] = {
        "linear": lambda x: linear(*x),
        "linear, two": lambda x: launch_route(linear(*x), bias, settings, rerouting),
        "linear, one": lambda x: route(linear(*x), bias, *numbers),
        "all in one": lambda x: route(x[0], bias, *numbers, router_weight=x[1]),
    }
    pairs = [*zip(inputs, weights, strict=True)]
    want, got = (functions[name](pairs[0])[1] for name in ("linear, two", "all in one"))
    same = float((want == got).all(1).float().mean())
    times = time_all(functions, pairs)
    row = ", ".join(f"{name} {value:.2f}" for name, value in times.items())
    print(f"E={router.experts} K={router.top_k} H={width} T={tokens}: {row}; {same:.0%} of tokens have the same ids")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", action="store_true", help="time every tile of the first router")
    parser.add_argument("--routers", type=int, default=len(ROUTERS), help="how many of the routers")
    parser.add_argument("--skip", type=int, default=0, help="how many to leave out first")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="T, several with commas")
    parser.add_argument("--hidden", type=int, help="H: from hidden states")
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    if arguments.hidden:
        for router, tokens in itertools.product(ROUTERS[:2], map(int, arguments.tokens.split(","))):
            bench_hidden(router, tokens, arguments.hidden)
        return
    for router in ROUTERS[arguments.skip : 1 if arguments.tiles else arguments.routers]:
        print(router)
        for tokens in map(int, arguments.tokens.split(",")):
            bench(router, tokens, TILES if arguments.tiles else [], not arguments.tiles)


if __name__ == "__main__":
    main()
