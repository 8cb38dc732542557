"""Measure how far each lowering of each model agrees with the eager oracle: the table of docs/lowering.md.

    python -m benchmarks.lowering_page              # print the table (minutes: six AOTInductor packages)
    python -m benchmarks.lowering_page --write      # and write it into the page

Two layers of the real transformers classes with small random weights, S = 1, rho = 0, min_active = 0. Every batch size
but one differs from the traced one. `tests/pages/test_lowering_page.py` holds the page to these measurements.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import ExportedProgram

import sere_compile
from sere_compile import SereConfig, SimilarityProfile
from sere_compile.lowering import aot, onnx, tensorrt
from sere_compile.lowering.decode_step import DecodeStep
from sere_compile.lowering.standard_operators import rerouted_gates
from tests.lowering.cpp_runner import run_cpp
from tests.lowering.models import oracle_ids, with_ids_as_outputs
from tests.tiny_models import LAYERS, MODELS, build, random_profile, tokens

PAGE = Path(__file__).parents[1] / "docs" / "lowering.md"
BEGIN, END = "<!-- agreement: begin -->\n", "<!-- agreement: end -->\n"
TOLERANCE = 1e-4
CONFIG = SereConfig(select_top_k=1, min_active=0)
CACHE = 6
GRAPHS = ("prefill", "decode step")
TITLES = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2-MoE", "qwen3_moe": "Qwen3-MoE"}

Call = tuple[Any, ...]
Run = Callable[[list[Call]], list[list[Tensor]]]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        gates: how many of the model's routers are re-routed, as text.
        ids_equal: whether every layer's ids are the oracle's in every call.
        difference: the largest difference of a logit.
        added: operators that re-routing adds for each gate, and those of the graph without it.
    """

    model: str
    graph: str
    target: str
    gates: str
    ids_equal: bool
    difference: float
    added: int
    of: int

    def __str__(self) -> str:
        equal = "yes" if self.ids_equal else "NO"
        cells = [TITLES[self.model], self.graph, self.target, self.gates, equal, f"{self.difference:.1e}"]
        return "| " + " | ".join([*cells, f"{self.added} (of {self.of})"]) + " |"


HEADER = (
    "| Model | Graph | Target | Gates | Ids equal | Largest logit difference | Operators added a gate |\n"
    "| --- | --- | --- | --- | --- | --- | --- |\n"
)


class Logits(nn.Module):
    """Tokens [B, L] to logits [B, L, vocabulary]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


class Case:
    """A model as a prefill graph or as a decoding step: its program, calls, and what the oracle says to them."""

    def __init__(self, model: str, graph: str) -> None:
        self.model, self.graph = model, graph
        network = build(model, "batched_mm")
        profile = random_profile(network)
        inside = SimilarityProfile({f"model.{gate}": matrix for gate, matrix in profile.items()})
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        if graph == "prefill":
            module: nn.Module = Logits(network)
            length = {1: torch.export.Dim("length", min=1, max=64)}
            examples, dynamic = (tokens(4, 6),), (batch | length,)
        else:
            module = DecodeStep(network, CACHE).eval()
            examples, dynamic = module.example_inputs(), module.dynamic_shapes()
        with torch.no_grad():
            self.original = torch.export.export(module, examples, dynamic_shapes=dynamic)
        self.program = sere_compile.rewrite(self.original, profile=inside, config=CONFIG)
        self.gates = rerouted_gates(self.program)
        self.observed = with_ids_as_outputs(sere_compile.rewrite(self.original, profile=inside, config=CONFIG))
        self.calls: list[Call] = []
        self.expected: list[list[Tensor]] = []
        with torch.no_grad(), oracle_ids(network, profile, 1, min_active=0) as routed:
            for call in self._calls(module):
                routed.clear()
                output = module(*call)
                self.calls.append(call)
                # The caches that a step returns follow from the rest.
                logits = output if graph == "prefill" else output[0]
                self.expected.append([logits, *routed])
        plain = _in_python(self.original.module())(self.calls)
        changed = [not torch.allclose(a[0], b[0], atol=0.1) for a, b in zip(plain, self.expected, strict=True)]
        assert sum(changed) > 1, "re-routing changes too little in this case to be seen"

    def _calls(self, module: Any) -> Any:
        """Prefill: three sizes, few tokens each (the primary experts of many are all). Decoding: steps from nothing."""
        if self.graph == "prefill":
            yield from ((tokens(batch, length, seed=batch),) for batch, length in ((1, 5), (3, 2), (8, 1)))
            return
        for size in (2, 5):
            ids, (keys, values) = tokens(size, 3, seed=size), module.empty_cache(size)
            for position in range(ids.shape[1]):
                call = (ids[:, position : position + 1].contiguous(), torch.tensor(position), keys, values)
                yield call
                _, keys, values = module(*call)

    def row(self, target: str, run: Run, added: int, of: int) -> Row:
        """Run the calls on a target and compare."""
        difference, equal = 0.0, True
        for got, (logits, *ids) in zip(run(self.calls), self.expected, strict=True):
            difference = max(difference, (got[0] - logits).abs().max().item())
            routed = got[-len(ids) :]
            equal &= all(torch.equal(a.long(), b) for a, b in zip(routed, ids, strict=True))
        gates = f"{self.gates} of {LAYERS}"
        return Row(self.model, self.graph, target, gates, equal, difference, added // self.gates, of)


def exported_program(case: Case) -> list[Row]:
    """The program of `rewrite`, run by PyTorch."""
    before, after = _operations(case.original), _operations(case.program)
    return [case.row("exported program", _in_python(case.observed.module()), after - before, before)]


def tensorrt_program(case: Case) -> list[Row]:
    """What torch_tensorrt would be given, run by PyTorch: no engine is built."""
    with torch.no_grad():
        before = _operations(case.original.run_decompositions({}))
    observed = tensorrt.convertible(case.observed)
    assert not tensorrt.operators_without_converter(observed)
    run = _in_python(observed.module())
    return [case.row("TensorRT's program, in PyTorch", run, _operations(observed) - before, before)]


def onnx_file(case: Case, folder: Path) -> list[Row]:
    """The ONNX file, run by onnxruntime."""
    import onnxruntime

    plain = onnx.export(case.original, None, folder / "plain.onnx", allow_no_gates=True, config=_IDENTITY)
    done = onnx.export(case.observed, None, folder / "rerouted.onnx")
    assert not tensorrt.operators_not_in_list(done.path)
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(calls: list[Call]) -> list[list[Tensor]]:
        feeds = [dict(zip(names, (leaf.numpy() for leaf in pytree.tree_leaves(call)), strict=True)) for call in calls]
        return [[torch.from_numpy(value) for value in session.run(None, feed)] for feed in feeds]

    before, after = plain.operators.total(), done.operators.total()
    return [case.row("ONNX, onnxruntime", run, after - before, before)]


def aot_package(case: Case, folder: Path) -> list[Row]:
    """The AOTInductor package, from Python and from C++."""
    before, after = _operations(case.original), _operations(case.program)
    path = aot.package(case.observed, folder / "model.pt2")
    in_cpp: Run = lambda calls: run_cpp(folder, path, [pytree.tree_leaves(call) for call in calls])  # noqa: E731
    return [
        case.row("AOTInductor, Python", _in_python(torch._inductor.aoti_load_package(path)), after - before, before),
        case.row("AOTInductor, C++", in_cpp, after - before, before),
    ]


_IDENTITY = SereConfig(select_top_k=1024)


def _in_python(function: Callable[..., Any]) -> Run:
    def run(calls: list[Call]) -> list[list[Tensor]]:
        with torch.no_grad():
            return [pytree.tree_leaves(function(*call)) for call in calls]

    return run


def _operations(program: ExportedProgram) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)


def measure(case: Case) -> list[Row]:
    """Every target of one case, printed as it comes."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows = [*exported_program(case), *aot_package(case, place), *onnx_file(case, place), *tensorrt_program(case)]
    print(*rows, sep="\n", flush=True)
    return rows


def table_of(page: Path) -> list[str]:
    """The lines of the page's table, without its head."""
    text = page.read_text(encoding="utf-8")
    inside = text.partition(BEGIN)[2].partition(END)[0]
    return [line for line in inside.splitlines() if line.startswith("| ")][2:]


def write(page: Path, rows: list[Row]) -> None:
    """Replace the page's table."""
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    lines = "".join(f"{row}\n" for row in rows)
    page.write_text(head + BEGIN + HEADER + lines + END + tail, encoding="utf-8")


def main() -> None:
    """Measure everything, print it, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into the page")
    arguments = parser.parse_args()
    print(HEADER, end="", flush=True)
    rows = [row for model in MODELS for graph in GRAPHS for row in measure(Case(model, graph))]
    if arguments.write:
        write(PAGE, rows)
    if not all(row.ids_equal and row.difference <= TOLERANCE for row in rows):
        sys.exit("a lowering differs from the oracle")


if __name__ == "__main__":
    main()
