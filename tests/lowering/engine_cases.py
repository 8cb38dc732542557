"""Files for TensorRT: models and graphs to export, what an engine of one has to hold, and running it."""

from __future__ import annotations

import collections
import functools
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from sere_compile import SereConfig
from sere_compile.lowering import onnx
from sere_compile.lowering.decode_step import DecodeStep
from sere_compile.lowering.engine import EngineBuild
from sere_compile.lowering.engine_layers import Layer
from sere_compile.lowering.prefill import Prefill

from .. import tiny_models

MODELS = {
    "mixtral": functools.partial(tiny_models.build, "mixtral"),
    "qwen2_moe": functools.partial(tiny_models.build, "qwen2_moe"),
    "qwen3_moe": functools.partial(tiny_models.build, "qwen3_moe"),
    "deepseek_v3": functools.partial(tiny_models.grouped_deepseek, 3),
    "gpt_oss": tiny_models.gpt_oss,
}
GRAPHS = ("prefill", "decode step")
CONFIG = SereConfig(select_top_k=1, min_active=0)
CACHE = 6
MOST = 64
# Of the operators that re-routing adds: those that cannot be computed before the ids are known.
LIVE = ("ReduceMax", "ArgMax", "GatherND")


def network(name: str) -> Any:
    """One layer of a model, random weights."""
    model = MODELS[name]()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


def module_of(model: Any, graph: str) -> Prefill | DecodeStep:
    return Prefill(model).eval() if graph == "prefill" else DecodeStep(model, CACHE).eval()


def write(
    module: Prefill | DecodeStep,
    path: Path,
    free: bool,
    config: SereConfig = CONFIG,
    experts: str = "batched_mm",
    rows: int = 4,
) -> onnx.OnnxExport:
    """The ONNX file of a module, with free sizes or with those of some rows."""
    inputs, outputs = module.names()
    return onnx.export(
        module, module.example_inputs(rows), path, config=config, dynamic_shapes="auto" if free else None,
        input_names=inputs, output_names=outputs, experts=experts,
    )  # fmt: skip


def shape_ranges(module: Prefill | DecodeStep) -> dict[str, Any]:
    """Smallest, best and largest shapes of a module's inputs with a free size."""
    ranges = {}
    for name, leaf in zip(module.names()[0], pytree.tree_leaves(module.example_inputs(4)), strict=True):
        free = 2 if isinstance(module, Prefill) else 1
        fixed = tuple(leaf.shape[free:])
        if leaf.dim():
            ranges[name] = ((1,) * free + fixed, tuple(leaf.shape), (MOST,) * free + fixed)
    return ranges


def added_nodes(path: Path) -> dict[str, str]:
    """Name and operator of the nodes of a file that re-routing adds."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return {node.name: node.op_type for node in graph.node if "sere" in node.name.split("/")}


def check_engine(build: EngineBuild, path: Path, gates: int) -> None:
    """Every node of ours that depends on ids is in the engine, in layers that read what is known only when it runs."""
    assert build.layers is not None
    computing = {node: layer for layer in build.layers if layer.added for node in layer.nodes}
    wanted = {name: operator for name, operator in added_nodes(path).items() if operator in LIVE}
    assert collections.Counter(wanted.values())["ArgMax"] == gates
    missing = sorted(name for name in wanted if name not in computing)
    assert not missing, f"the engine does not compute {missing}"
    constant = {layer.name for layer in fed_by_constants(build.layers)}
    folded = sorted(name for name in wanted if computing[name].name in constant)
    assert not folded, f"{folded} do not depend on the inputs"
    assert not [layer.name for layer in build.layers if layer.added and "Scat" in layer.name]


def fed_by_constants(layers: tuple[Layer, ...]) -> list[Layer]:
    """The layers, in the order in which they run, that read nothing but constants and what such layers write."""
    known: set[str] = set()
    constant = []
    for layer in layers:
        if all(value.name in known for value in layer.inputs):
            constant.append(layer)
            known |= {value.name for value in layer.outputs}
    return constant


def run_engine(trt: Any, loaded: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a loaded engine, on the GPU."""
    context = loaded.create_execution_context()
    names = [loaded.get_tensor_name(i) for i in range(loaded.num_io_tensors)]
    tensors = {name: value.cuda().contiguous() for name, value in inputs.items()}
    for name, value in tensors.items():
        context.set_input_shape(name, tuple(value.shape))
    kinds = {trt.float32: torch.float32, trt.int64: torch.int64, trt.int32: torch.int32}
    for name in names:
        if name not in tensors:
            shape = tuple(context.get_tensor_shape(name))
            tensors[name] = torch.empty(shape, dtype=kinds[loaded.get_tensor_dtype(name)], device="cuda")
        context.set_tensor_address(name, tensors[name].data_ptr())
    assert context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    return {name: tensors[name].cpu() for name in names if name not in inputs}
