"""How torch_tensorrt divides re-routed models between TensorRT and PyTorch: the second table of TensorRT's page.

    pip install --no-deps torch-tensorrt-rtx==2.14.0 dllist psutil    # beside torch 2.13 and tensorrt-rtx-cu13
    python -m benchmarks.torch_tensorrt_page --only mixtral   # print rows (seconds each, no GPU)
    python -m benchmarks.torch_tensorrt_page --write          # every row, and into the page

`sere_compile.lowering.tensorrt.compile` is run as far as it goes without a GPU: torch_tensorrt lowers and divides the
graph, its converters make a network of every part that is TensorRT's, and TensorRT for RTX builds an engine of it for
compute capability 8.9. What is left out is loading that engine. One layer of the real transformers classes
with small random weights, S = 1, rho = 0, min_active = 0; in bfloat16 with `grouped_mm`, whose grouped product has an
operator of PyTorch's in that type only.

With a CPU build of torch the compiled libraries cannot be loaded, so that `torch_tensorrt/lib/*.so` have to be deleted,
as in its own builds that are Python only, and it asks for a device when it is imported: it is told of one.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import ExportedProgram

from sere_compile.lowering import tensorrt
from sere_compile.lowering.decode_step import DecodeStep
from sere_compile.lowering.engine import _set_capabilities
from sere_compile.lowering.export import export_rewritten
from sere_compile.lowering.prefill import Prefill
from tests.lowering.engine_cases import CONFIG, GRAPHS, MODELS, MOST, module_of, network

from .tensorrt_page import TITLES, write_table

BEGIN, END = "<!-- torch_tensorrt: begin -->\n", "<!-- torch_tensorrt: end -->\n"
HEADER = (
    "| Experts | Model | Graph | Fixed sizes: operators for TensorRT; engines built | Free sizes: likewise "
    "| Left to PyTorch |\n| --- | --- | --- | --- | --- | --- |\n"
)
CAPABILITIES = ("8.9",)
EXPERTS = {"batched_mm": torch.float32, "grouped_mm": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@dataclass
class Division:
    """What becomes of one graph.

    Attributes:
        operators: in the graph that is divided.
        converted: those with a converter.
        left: how often each operator stays in PyTorch, by name.
        parts: of each part that is TensorRT's, the size of its engine in bytes, or why there is none.
        model: the divided program, with the parts that are TensorRT's computed by PyTorch.
    """

    operators: int
    converted: int
    left: collections.Counter[str]
    parts: list[int | str]
    model: Any

    @property
    def built(self) -> list[int]:
        """The sizes of the engines."""
        return [part for part in self.parts if isinstance(part, int)]

    def __str__(self) -> str:
        refused = ", ".join(f"`{part}`" for part in self.parts if isinstance(part, str))
        counted = f" of {len(self.parts)}, none at {refused}" if refused else ""
        return f"{self.converted} of {self.operators}; {len(self.built)}{counted}"


class _InPytorch(nn.Module):
    """A part that is TensorRT's, in the place of a module that would have loaded its engine."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *inputs: Any) -> Any:
        """What the part computes."""
        return self.part(*inputs)

    def setup_engine(self) -> None:
        """Nothing to load."""

    def set_output_tensors_as_unowned(self, _: bool) -> None:
        """Nothing to own."""


@contextlib.contextmanager
def device() -> Iterator[None]:
    """Answers to what torch_tensorrt asks of a device when imported and dividing a graph; tensors stay on the CPU."""
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C._CudaDeviceProperties = type("_CudaDeviceProperties", (), {})
    answers = {
        "get_device_capability": (8, 9),
        "get_device_name": "none",
        "current_device": 0,
        "set_device": None,
        "empty_cache": None,
        "mem_get_info": (8 << 30, 8 << 30),
    }
    with mock.patch.multiple(torch.cuda, **{name: lambda *_, value=value: value for name, value in answers.items()}):
        from torch_tensorrt._Device import Device

        real = Device.to
        with mock.patch.object(
            Device, "to", lambda self, t: torch.device("cpu") if t is torch.device else real(self, t)
        ):
            yield


def _build(part: Any, inputs: Any, settings: Any, parts: list[int | str], **_: Any) -> nn.Module:
    """`torch_tensorrt.dynamo.conversion.convert_module` but for loading the engine, which takes a GPU."""
    import tensorrt as trt  # torch_tensorrt puts tensorrt_rtx there
    from torch_tensorrt.dynamo.conversion._conversion import infer_module_output_dtypes
    from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter

    types = infer_module_output_dtypes(part, truncate_double=settings.truncate_double)
    interpreter = TRTInterpreter(part, inputs, output_dtypes=types, compilation_settings=settings)
    parts.append(_engine(interpreter, trt))
    return _InPytorch(part)


def _engine(interpreter: Any, trt: Any) -> int | str:
    """The size of a part's engine, or at which operator there was none."""
    with _errors() as errors:
        try:
            interpreter._construct_trt_network_def()
            options = interpreter._populate_trt_builder_config()
            _set_capabilities(trt, options, CAPABILITIES)
            engine = interpreter.builder.build_serialized_network(interpreter.ctx.net, options)
        # What converters raise.
        except (RuntimeError, ValueError, TypeError, AssertionError):
            engine = None
    if engine is not None:
        return len(bytes(engine))
    # TensorRT names the operator that its layer came of; where it said nothing, the converter stopped.
    named = re.search(r"\[aten_ops\.([^\]]+)\]", " ".join(errors))
    return f"aten.{named[1]}" if named else str(interpreter._cur_node.target)


@contextlib.contextmanager
def _errors() -> Iterator[list[str]]:
    """The errors that TensorRT tells torch_tensorrt."""
    told: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("torch_tensorrt [TensorRT Conversion Context]")
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)


def dynamic_shapes(module: Prefill | DecodeStep, free: bool) -> Any:
    """Batch and sequence between 1 and 64, or fixed."""
    if not free:
        return None
    if isinstance(module, DecodeStep):
        return module.dynamic_shapes(MOST)
    sizes = {0: torch.export.Dim("batch", min=1, max=MOST), 1: torch.export.Dim("sequence", min=1, max=MOST)}
    return sizes, sizes


def divide(program: ExportedProgram) -> Division:
    """Compile a re-routed program by `sere_compile.lowering.tensorrt.compile`, every part an engine."""
    trackers: list[Any] = []
    parts: list[int | str] = []
    with device():
        from torch_tensorrt.dynamo import _compiler

        with (
            mock.patch.object(_compiler, "convert_module", functools.partial(_build, parts=parts)),
            mock.patch.object(_compiler, "dryrun_stats_display", lambda tracker, _: trackers.append(tracker)),
        ):
            model = tensorrt.compile(program, None, min_block_size=1)
    [told] = trackers
    left = collections.Counter(line.split(",")[0].removeprefix("Node: torch.ops.") for line in told.to_run_in_torch)
    return Division(told.total_ops_in_graph, told.supported_ops_in_graph, left, parts, model)


def program_of(name: str, graph: str, experts: str, free: bool) -> ExportedProgram:
    """A re-routed program of one layer."""
    module = module_of(network(name).to(EXPERTS[experts]), graph)
    return export_rewritten(
        module, module.example_inputs(4), config=CONFIG, dynamic_shapes=dynamic_shapes(module, free), experts=experts
    )


def largest_difference(division: Division, program: ExportedProgram) -> float:
    """Of a logit: what torch_tensorrt divides computes in PyTorch what it was given."""
    assert program.example_inputs is not None
    call = program.example_inputs[0]
    with torch.no_grad():
        got, want = (pytree.tree_leaves(run(*call))[0] for run in (division.model, program.module()))
    return float((got - want).abs().max())


def row(experts: str, name: str, graph: str) -> str:
    """One line of the table."""
    cells, left = [], []
    for free in (False, True):
        program = program_of(name, graph, experts, free)
        division = divide(program)
        difference = largest_difference(division, program)
        assert difference <= TOLERANCE[EXPERTS[experts]], f"the divided program is off by {difference:.1e}"
        cells.append(str(division))
        each = sorted(division.left.items())
        left.append(
            ", ".join(f"{count} `{operator.removesuffix('.default')}`" for operator, count in each) or "nothing"
        )
    told = left[0] if left[0] == left[1] else f"{left[0]}; with free sizes {left[1]}"
    return "| " + " | ".join([f"`{experts}`", TITLES[name], graph, *cells, told]) + " |"


def table_of(page: Path) -> list[str]:
    """The lines of the table in a page."""
    text = page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    return text.splitlines()[2:]


def main() -> None:
    """Print a line for every graph, and write them where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help="these models")
    parser.add_argument("--write", action="store_true", help="write the table into the page")
    arguments = parser.parse_args()
    print(HEADER, end="", flush=True)
    rows = []
    for experts in EXPERTS:
        for name in MODELS if arguments.write else arguments.only:
            for graph in GRAPHS:
                rows.append(row(experts, name, graph))
                print(rows[-1], flush=True)
    if arguments.write:
        write_table(BEGIN, HEADER, rows, END)


if __name__ == "__main__":
    main()
