"""What TensorRT's builder makes of every model, and onnxruntime of the same file: the table of its page.

    python -m benchmarks.tensorrt_page              # print the table (minutes; needs tensorrt-rtx-cu13, no GPU)
    python -m benchmarks.tensorrt_page --write      # and write it into the page

One layer of the real transformers classes with small random weights, S = 1, rho = 0, min_active = 0, free sizes, the
re-routed ids as outputs beside the model's. The engine is built for compute capabilities 8.9 and 12.0 and not run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from sere_compile import SimilarityProfile, attach
from sere_compile.lowering import onnx, tensorrt
from sere_compile.lowering.export import export_rewritten
from sere_compile.lowering.loading import load
from tests.lowering.engine_cases import CONFIG, GRAPHS, MODELS, check_engine, module_of, network, shape_ranges
from tests.lowering.models import oracle_ids, with_ids_as_outputs
from tests.tiny_models import tokens

PAGE = Path(__file__).parents[1] / "docs" / "lowering_tensorrt.md"
BEGIN, END = "<!-- tensorrt: begin -->\n", "<!-- tensorrt: end -->\n"
CAPABILITIES = ("8.9", "12.0")
TITLES = {
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "deepseek_v3": "DeepSeek-V3, groups and bias",
    "gpt_oss": "gpt-oss",
}
HEADER = (
    "| Model | Graph | TensorRT for RTX: parsed, built | Layers with nodes of re-routing (of all) "
    "| onnxruntime: ids equal | Largest logit difference |\n| --- | --- | --- | --- | --- | --- |\n"
)


def random_similarity(model: Any) -> SimilarityProfile:
    """A random matrix for every router weight."""
    generator = torch.Generator().manual_seed(0)
    routers = {n: p for n, p in model.named_parameters() if n.endswith(("mlp.gate.weight", "mlp.router.weight"))}
    halves = {name: torch.rand(len(weight), len(weight), generator=generator) for name, weight in routers.items()}
    return SimilarityProfile({name: (half + half.T) / 2 for name, half in halves.items()})


def calls_of(module: Any, graph: str) -> list[tuple[Any, ...]]:
    """Arguments for batches of other sizes than the traced one, few tokens each: many make every expert primary."""
    if graph == "prefill":
        rows = [tokens(batch, length, seed=batch) for batch, length in ((1, 5), (3, 2), (8, 1))]
        return [(ids, torch.ones_like(ids)) for ids in rows]
    return [(tokens(rows, 1, seed=rows), torch.tensor(0), *module.empty_cache(rows)) for rows in (1, 2, 5)]


def compare(model: Any, module: Any, graph: str, path: Path, profile: SimilarityProfile) -> tuple[bool, float]:
    """Whether onnxruntime's ids are the oracle's in every call, and the largest difference of a logit."""
    run, equal, difference = load("onnx", str(path)), True, 0.0
    with torch.no_grad(), oracle_ids(model, profile, 1, min_active=0) as routed:
        for call in calls_of(module, graph):
            routed.clear()
            logits = pytree.tree_leaves(module(*call))[0]
            got: list[Tensor] = run(*call)
            difference = max(difference, (got[0] - logits).abs().max().item())
            equal &= torch.equal(got[-1].long(), routed[0])
    return equal, difference


def row(name: str, graph: str, folder: Path) -> str:
    """One line of the table, measured."""
    model = network(name)
    profile = random_similarity(model)
    attach(model, profile)
    module = module_of(model, graph)
    program = export_rewritten(
        module, module.example_inputs(4), config=CONFIG, dynamic_shapes="auto", experts="batched_mm"
    )
    inputs, outputs = module.names()
    done = onnx.export(
        with_ids_as_outputs(program), None, folder / "m.onnx", input_names=inputs, output_names=[*outputs, "ids"]
    )
    build = tensorrt.build_onnx(done.path, shapes=shape_ranges(module), capabilities=CAPABILITIES)
    check_engine(build, done.path, 1)
    assert build.layers is not None
    added = sum(layer.added for layer in build.layers)
    equal, difference = compare(model, module, graph, done.path, profile)
    cells = [TITLES[name], graph, "yes, yes", f"{added} (of {len(build.layers)})", "yes" if equal else "NO"]
    return "| " + " | ".join([*cells, f"{difference:.1e}"]) + " |"


def write_table(begin: str, header: str, rows: list[str], end: str) -> None:
    """Replace the table between two marks of the page."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    tail = rest.partition(end)[2]
    PAGE.write_text(head + begin + header + "".join(f"{line}\n" for line in rows) + end + tail, encoding="utf-8")


def main() -> None:
    """Measure everything, print it, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into the page")
    arguments = parser.parse_args()
    print(HEADER, end="", flush=True)
    rows = []
    for name in MODELS:
        for graph in GRAPHS:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(row(name, graph, Path(folder)))
            print(rows[-1], flush=True)
    if arguments.write:
        write_table(BEGIN, HEADER, rows, END)


if __name__ == "__main__":
    main()
