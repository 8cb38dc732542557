"""How torch_tensorrt's dynamo front end would divide re-routed models between TensorRT and PyTorch: its dry run.

    pip install --no-deps torch-tensorrt-rtx==2.13.0 dllist psutil    # beside torch 2.13 and tensorrt-rtx-cu13
    python -m benchmarks.torch_tensorrt_dry_run [mixtral qwen3_moe ...]

For every model and graph: operators, those with a converter, engines, and by name what stays in
PyTorch. It runs without a GPU, and then torch_tensorrt is told of one that is not there (compute capability 8.9): which
operators have a converter does not depend on it. With a CPU build of torch its compiled libraries cannot be loaded
either: delete `torch_tensorrt/lib/*.so`, as in its own builds that are Python only. No engine is built.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import re
from collections.abc import Iterator
from unittest import mock

import torch

from sere_compile.lowering import tensorrt
from sere_compile.lowering.export import export_rewritten
from tests.lowering.engine_cases import CONFIG, GRAPHS, MODELS, module_of, network

TOLD = re.compile(r"consists of (\d+) Total Operators, of which (\d+) operators")


@contextlib.contextmanager
def device() -> Iterator[None]:
    """A device: the machine's, or answers to what torch_tensorrt asks of one when imported and dividing a graph."""
    if torch.cuda.is_available():
        yield
        return
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C._CudaDeviceProperties = type("_CudaDeviceProperties", (), {})
    answers = {
        "get_device_capability": (8, 9),
        "get_device_name": "none",
        "current_device": 0,
        "set_device": None,
        "mem_get_info": (8 << 30, 8 << 30),
    }
    with mock.patch.multiple(torch.cuda, **{name: lambda *_, value=value: value for name, value in answers.items()}):
        yield


def dry_run(name: str, graph: str, experts: str, free: bool) -> str:
    """One line on one graph."""
    module = module_of(network(name), graph)
    program = export_rewritten(
        module, module.example_inputs(4), config=CONFIG, dynamic_shapes="auto" if free else None, experts=experts
    )
    report, log = io.StringIO(), logging.StreamHandler(text := io.StringIO())
    logger = logging.getLogger("torch_tensorrt")
    logger.addHandler(log)
    logger.setLevel(logging.DEBUG)
    try:
        with device(), contextlib.redirect_stdout(report):
            import torch_tensorrt

            torch_tensorrt.dynamo.compile(
                tensorrt.convertible(program), arg_inputs=list(program.example_inputs[0]), dryrun=True, min_block_size=1
            )
    finally:
        logger.removeHandler(log)
    told = report.getvalue() + text.getvalue()
    found = TOLD.search(told)
    total, supported = found.groups() if found else ("?", "?")
    engines = len(set(re.findall(r"TRT Engine #(\d+)", told)))
    # The log's last list: "Unsupported or Excluded Nodes:", a line each.
    left = sorted(set(re.findall(r"- (\S+) \+ Operator Count", told.partition("Unsupported or Excluded")[2])))
    where = f"{name}, {graph}, {experts}, {'free' if free else 'fixed'} sizes"
    return f"{where}: {supported} of {total} operators, {engines} engines; left: {', '.join(left) or 'nothing'}"


def main() -> None:
    """Print a line for every graph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), choices=MODELS, help="all without any")
    parser.add_argument(
        "--experts", default="batched_mm", help="grouped_mm needs a device: its empty_permuted asks for one"
    )
    arguments = parser.parse_args()
    for name in arguments.models:
        for graph in GRAPHS:
            for free in (False, True):
                print(dry_run(name, graph, arguments.experts, free), flush=True)


if __name__ == "__main__":
    main()
