"""Time `sere::reroute` on a CUDA device against its ATen reference, eager and compiled.

    python -m benchmarks.ops.bench_reroute            # correctness, then the table
    python -m benchmarks.ops.bench_reroute --sweep    # also every launch configuration worth trying

Nothing is timed before the kernel agrees with the reference on random cases; a mismatch exits with status 1.
"""

import argparse
import itertools
import sys
import time

import torch

from sere_compile.benchmark.timing import capture, summarize, time_in_turn
from sere_compile.ops import reroute
from sere_compile.ops.reroute.reference import reroute_reference
from tests.ops.cases import STRUCTURES, Structure, draw_case

EXPERTS, SLOTS, SELECT = 128, 8, 2
TOKENS = (8, 64, 256, 1024)
CALLS, REPLAYS = 20, 300
METHOD = f"""Method: one CUDA graph of {CALLS} calls in a row on {CALLS} different ids tensors, one similarity matrix;
{REPLAYS} replays of each graph, variants in turn, CUDA events around each replay; the time of a replay
divided by {CALLS} is one sample, so gaps between launches count. median [p20 .. p80] in us per call.
Everything is in L2, as it is behind a router.
E={EXPERTS}, K={SLOTS}, S={SELECT}, threshold 0, int64 ids, fp32 similarity."""


def check_correctness():
    """Exit with status 1 if kernel and reference differ on any random case."""
    checked = 0
    structures = [*STRUCTURES, Structure(EXPERTS, SLOTS, SELECT, masked=True, min_active=SLOTS)]
    for structure, seed, num_tokens in itertools.product(structures, range(8), (None, None, 130, 1500)):
        case = draw_case(structure, seed, num_tokens).to("cuda")
        result = reroute(case.ids, case.similarity, *case.options)
        if not result.equal(reroute_reference(case.ids, case.similarity, *case.options)):
            sys.exit(f"MISMATCH between kernel and reference: {structure}, seed {seed}, T={num_tokens}")
        checked += 1
    print(f"correctness: kernel == reference on {checked} random cases\n")


def make_ids(num_tokens):
    scores = torch.rand(num_tokens, EXPERTS, device="cuda")
    return scores.topk(SLOTS, dim=1).indices


def precise(timing):
    """Two digits, for calls of a few microseconds."""
    return f"{timing.median:.2f} [{timing.low:.2f} .. {timing.high:.2f}]"


def compare(similarity):
    """The table: kernel, kernel through Inductor, reference eager, reference through Inductor."""
    print("| T | sere::reroute | sere::reroute in torch.compile | reference eager | reference in torch.compile |")
    print("| --- | --- | --- | --- | --- |")
    for num_tokens in TOKENS:
        torch._dynamo.reset()
        inputs = [make_ids(num_tokens) for _ in range(CALLS)]
        functions = [
            reroute,
            torch.compile(reroute, fullgraph=True, dynamic=False),
            reroute_reference,
            torch.compile(reroute_reference, fullgraph=True, dynamic=False),
        ]
        graphs = {i: capture(lambda ids, f=f: f(ids, similarity, SELECT), inputs) for i, f in enumerate(functions)}
        times = time_in_turn(graphs, CALLS, REPLAYS, 20)
        print(f"| {num_tokens} | " + " | ".join(map(precise, times.values())) + " |")


def time_host(similarity):
    """Us of host time per eager call, with the GPU far from busy."""
    ids = make_ids(8)
    for name, function in (("sere::reroute", reroute), ("reference", reroute_reference)):
        samples = []
        for _ in range(200):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(10):
                function(ids, similarity, SELECT)
            samples.append((time.perf_counter() - start) * 1e5)
        print(f"host time of an eager call, {name}: {precise(summarize(samples))} us")


def sweep(similarity):
    """Every launch configuration of the one-launch path, fastest first."""
    from sere_compile.ops.reroute.kernel import LaunchConfig, launch_config, launch_reroute

    for num_tokens in TOKENS:
        inputs = [make_ids(num_tokens) for _ in range(CALLS)]
        configs = [
            LaunchConfig(slots, chunk, warps)
            for slots, chunk, warps in itertools.product((4, 8, 16, 32, 64), (64, 128, 256, 512, 1024), (2, 4, 8))
        ]
        graphs = {
            c: capture(lambda ids, c=c: launch_reroute(ids, similarity, SELECT, 0.0, 0, None, c), inputs)
            for c in configs
        }
        times = time_in_turn(graphs, CALLS, REPLAYS, 20)
        print(f"\nT={num_tokens}: launch_config gives {launch_config(num_tokens, EXPERTS)}")
        for config in sorted(times, key=lambda config: times[config].median)[:8]:
            print(f"    {precise(times[config])}  {config}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="also time the launch configurations")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    torch.manual_seed(0)
    check_correctness()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n{METHOD}\n")
    similarity = torch.rand(EXPERTS, EXPERTS, device="cuda")
    with torch.inference_mode():
        compare(similarity)
        print()
        time_host(similarity)
        if arguments.sweep:
            sweep(similarity)


if __name__ == "__main__":
    main()
