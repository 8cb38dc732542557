"""TensorRT: through torch_tensorrt here, from an ONNX file in `engine.py`.

What torch_tensorrt would leave to PyTorch can be known without it: `operators_without_converter` looks a program's
operators up in tables that `refresh_operator_tables` reads. `operators_not_in_list` does so for an ONNX file; where
TensorRT is installed `engine.check` asks its own parser, which knows more than names.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..config import SereConfig
from ..errors import LoweringError
from ..extras import require
from ..similarity.profile import SimilarityProfile
from .engine import EngineBuild, build_onnx, check, trtexec_command
from .engine_layers import Layer
from .export import export_rewritten
from .standard_operators import REFERENCES, decompose, refuse_onnx_only

__all__ = [
    "EngineBuild",
    "Layer",
    "build_onnx",
    "check",
    "compile",
    "convertible",
    "operator_tables",
    "operators_not_in_list",
    "operators_without_converter",
    "trtexec_command",
]


def compile(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] | None,
    *,
    kwargs: dict[str, Any] | None = None,
    profile: SimilarityProfile | None = None,
    config: SereConfig | None = None,
    dynamic_shapes: Any = None,
    experts: str | None = "batched_mm",
    allow_no_gates: bool = False,
    **options: Any,
) -> Any:
    """Compile a model with its gates re-routed by `torch_tensorrt.dynamo.compile`.

    Args:
        model: a module on a GPU in eval mode, or a program of torch.export.
        args: example arguments to trace with; None for a program, as for `kwargs` and `dynamic_shapes`.
        kwargs: example keyword arguments.
        profile: a matrix for every gate, by the name of its router weight. None: what is attached to the model;
            without that the experts are probed.
        config: the options of re-routing.
        dynamic_shapes: as torch.export takes it; TensorRT needs a `max` for every `Dim`.
        experts: how Hugging Face models compute their experts in the graph; None leaves that as it is.
        allow_no_gates: compile the model unchanged where nothing can be re-routed.
        **options: passed to `torch_tensorrt.dynamo.compile`; `decompose_attention` is True by default where keys and
            values have other widths (DeepSeek's), for which it has no attention in one piece.

    Returns:
        What `torch_tensorrt.dynamo.compile` returns: a module to call, or to save with `torch_tensorrt.save`.

    Raises:
        MissingExtraError: torch_tensorrt cannot be imported.
        LoweringError: torch.export cannot trace the model, or `experts` is for ONNX alone.
        GateNotFoundError: nothing can be re-routed.
        ProfileError: the profile lacks a gate of the model; the message names the first.
    """
    refuse_onnx_only(experts)
    (compiler,) = require("tensorrt", "torch_tensorrt.dynamo")
    program = export_rewritten(
        model,
        args,
        kwargs=kwargs,
        profile=profile,
        config=config,
        dynamic_shapes=dynamic_shapes,
        experts=experts,
        allow_no_gates=allow_no_gates,
    )
    examples = (args or (), kwargs or {}) if isinstance(model, nn.Module) else program.example_inputs
    if examples is None:
        raise LoweringError("the program has no example inputs (torch.export.save may drop them): give the model")
    if _has_values_of_other_width(program):
        options.setdefault("decompose_attention", True)
    return compiler.compile(convertible(program), arg_inputs=list(examples[0]), kwarg_inputs=examples[1], **options)


def _has_values_of_other_width(program: ExportedProgram) -> bool:
    """Whether an attention reads keys and values of different shapes."""
    attention = torch.ops.aten.scaled_dot_product_attention.default
    read = [node.args[1:3] for node in program.graph.nodes if node.target is attention]
    return any(key.meta["val"].shape[-1] != value.meta["val"].shape[-1] for key, value in read)


def convertible(program: ExportedProgram) -> ExportedProgram:
    """A program, re-routed or not, in operators that torch_tensorrt converts with dynamic shapes."""
    aten = torch.ops.aten
    # Caches: from 2.14 on torch_tensorrt has a converter for index_copy, for static shapes only, and no longer
    # decomposes it itself.
    index_copy: dict[Any, Any] = torch._decomp.get_decompositions([aten.index_copy.default])
    return decompose(program, {**REFERENCES, **index_copy, **_OF_MODELS})


def _gather_by_index(tensor: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """`aten.gather`, which torch_tensorrt converts for static shapes only, as advanced indexing."""
    positions = []
    for d, size in enumerate(index.shape):
        shape = [1] * index.dim()
        shape[d] = -1
        positions.append(torch.arange(size, device=index.device).view(shape))
    positions[dim] = index
    return tensor[tuple(positions)]


def _scatter_by_comparison(tensor: Tensor, dim: int, index: Tensor, value: float) -> Tensor:
    """`aten.scatter.value` (a mask of groups, say), for which the converter has TensorRT make what it refuses."""
    if any(own != other for d, (own, other) in enumerate(zip(tensor.shape, index.shape, strict=True)) if d != dim):
        return NotImplemented
    places = torch.arange(tensor.shape[dim], device=index.device)
    named = (index.movedim(dim, -1)[..., None, :] == places[:, None]).any(-1).movedim(-1, dim)
    return torch.where(named, value, tensor).to(tensor.dtype)


def _slice_by_parts(
    tensor: Tensor, src: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """`aten.slice_scatter` (keys written in two parts, say), of whose converter TensorRT for RTX refuses a scatter."""
    if step != 1:
        return NotImplemented
    size, begin = tensor.shape[dim], 0 if start is None else start
    begin = begin + size if begin < 0 else begin
    rest = begin + src.shape[dim]
    parts = [tensor.narrow(dim, 0, begin), src.to(tensor.dtype), tensor.narrow(dim, rest, size - rest)]
    known_empty = [isinstance(part.shape[dim], int) and part.shape[dim] == 0 for part in parts]
    return torch.cat([part for part, empty in zip(parts, known_empty, strict=True) if not empty] or [src], dim)


def _zeros(size: Any, **options: Any) -> Tensor:
    """`aten.empty`, which has a converter for fixed sizes only."""
    options.pop("memory_format", None)
    return torch.full(size, 0, **options)


# What the models' own operators become where a converter of torch_tensorrt 2.14 stands in the way of one engine.
_OF_MODELS: dict[Any, Any] = {
    torch.ops.aten.gather.default: _gather_by_index,
    torch.ops.aten.scatter.value: _scatter_by_comparison,
    torch.ops.aten.slice_scatter.default: _slice_by_parts,
    torch.ops.aten.empty.memory_format: _zeros,
    torch.ops.aten.new_empty.default: lambda tensor, size, **options: _zeros(
        size, **{"dtype": tensor.dtype, "device": tensor.device, **options}
    ),
}


@functools.cache
def operator_tables() -> dict[str, Any]:
    """The checked-in tables: `torch_tensorrt` (converters by ATen operator) and `onnx` (types by ONNX operator)."""
    return json.loads(Path(__file__).with_name("tensorrt_operators.json").read_text(encoding="utf-8"))


def operators_without_converter(program: ExportedProgram) -> set[str]:
    """Operators of a `convertible` program that torch_tensorrt would leave to PyTorch when shapes are dynamic.

    The decompositions of torch that torch_tensorrt uses are applied first. Its converters have conditions besides
    (dtypes, kinds of indices), and some operators are replaced by code of its own: neither is looked at.
    """
    table = operator_tables()["torch_tensorrt"]
    with torch.no_grad():
        program = program.run_decompositions(_decompositions())
    called = {_name(node.target) for node in program.graph.nodes if node.op == "call_function"}
    # torch_tensorrt removes assertions.
    called = {name for name in called if not name.startswith("aten._assert")}
    return {name for name in called if not (table["converters"].get(name) or _listed(name, table["replaced"]))}


@functools.cache
def _decompositions() -> dict[Any, Any]:
    """Those of torch that torch_tensorrt applies: the ones it lists, and composite operators without one of its own."""
    table = operator_tables()["torch_tensorrt"]

    def applies(operator: Any) -> bool:
        if _listed(str(operator), table["replaced"]):
            return False
        if _listed(str(operator), table["decompositions"]):
            return True
        return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd")

    return {operator: body for operator, body in torch.export.default_decompositions().items() if applies(operator)}


def _listed(name: str, names: Sequence[str]) -> bool:
    """Whether an operator is in a list of operators and of operators without their overload."""
    return name in names or name.rpartition(".")[0] in names


def _name(target: Any) -> str:
    """An operator as the tables name it."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"{target.__module__.strip('_')}.{target.__name__}"


def operators_not_in_list(path: str | os.PathLike[str]) -> set[str]:
    """Operators of an ONNX file, functions included, that TensorRT's list does not have.

    Raises:
        MissingExtraError: onnx is not installed.
    """
    (onnx,) = require("onnx", "onnx")
    listed = operator_tables()["onnx"]["operators"]
    model = onnx.load(os.fspath(path), load_external_data=False)
    functions = {(function.domain, function.name) for function in model.functions}
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    called = {(node.domain, node.op_type) for node in nodes} - functions
    return {f"{domain}::{name}" if domain else name for domain, name in called if domain or listed.get(name) is None}
