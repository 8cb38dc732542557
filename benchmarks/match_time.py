"""How long finding the gates of every architecture takes, in milliseconds per 1,000 nodes of its graph.

    python -m benchmarks.match_time            # prints the median and the worst of the zoo
    python -m benchmarks.match_time mixtral    # only these architectures

The graph is Dynamo's of the whole small model, with the first experts implementation. Two figures: `find_gates` alone,
and all that the backend does to a graph before it hands it over (copy, find, cut out dispatches, rewrite, check).
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

import sere_compile
from sere_compile import SereConfig
from sere_compile.backend import SereBackend
from sere_compile.compiler.dynamo_graph import GraphInputs
from sere_compile.compiler.gate_plan import experts_are_live
from sere_compile.experts.owner import Owners
from sere_compile.passes import find_gates
from tests.zoo.registry import ENTRIES, build, implementations, inputs

from .survey import random_profile

_RUNS = 3


def times(name: str) -> tuple[int, float, float]:
    """Nodes of all graphs of an architecture, seconds of `find_gates`, seconds of the whole backend; best of three."""
    model, call = build(name, implementations(name)[0]), inputs(name)
    profile = random_profile(name, model)
    if profile is not None:
        sere_compile.attach(model, profile)
    backend = SereBackend(SereConfig(select_top_k=1, inner=lambda graph, _: graph.forward))
    total = [0, 0.0, 0.0]

    def timed(graph: GraphModule, example_inputs: Sequence[Any]) -> Any:
        value_of = GraphInputs(graph).values_of(example_inputs)
        total[0] += len(graph.graph.nodes)
        total[1] += min(_seconds(lambda: find_gates(graph, experts_are_live(value_of, Owners()))) for _ in range(_RUNS))
        total[2] += min(_seconds(lambda: backend(graph, example_inputs)) for _ in range(_RUNS))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=512):
        torch.compile(model, backend=timed)(**call)
    torch._dynamo.reset()
    return int(total[0]), total[1], total[2]


def _seconds(work: Any) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """One line per architecture, then the zoo's median and worst."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ARCHITECTURE", help="all of them if none is given")
    names = parser.parse_args().names
    if unknown := set(names) - set(ENTRIES):
        parser.error(f"no architecture of tests/zoo/registry.py: {', '.join(sorted(unknown))}")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    figures: dict[str, tuple[float, float]] = {}
    for name in names or sorted(ENTRIES):
        size, found, whole = times(name)
        figures[name] = (1e6 * found / size, 1e6 * whole / size)
        print(f"{name}: {size} nodes, find_gates {figures[name][0]:.1f}, whole {figures[name][1]:.1f} ms", flush=True)
    for position, what in enumerate(("find_gates", "whole backend")):
        worst = max(figures, key=lambda name: figures[name][position])
        middle = statistics.median(figure[position] for figure in figures.values())
        print(f"{what}: median {middle:.1f}, worst {figures[worst][position]:.1f} ({worst}) ms / 1,000 nodes")


if __name__ == "__main__":
    main()
