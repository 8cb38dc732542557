"""Lowering to an AOTInductor package: one `.pt2` file that runs a re-routed model from Python or from C++.

    model -> torch.export -> sere_compile.rewrite -> AOTInductor -> model.pt2

The package needs neither Python nor this library: similarity matrices are constants of the program, and `sere::reroute`
is compiled like the rest, its Triton kernel on CUDA and its ATen definition on CPU.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..config import SereConfig
from ..errors import LoweringError
from ..similarity.profile import SimilarityProfile
from ..whole_file import check_writable
from .archive_file import archive_file
from .export import export_rewritten, operators
from .standard_operators import refuse_onnx_only

log = logging.getLogger(__name__)

# Namespaces of operators that Inductor compiles or libtorch holds.
_COMPILED = frozenset({"aten", "prim", "prims", "sere"})


def package(
    model_or_program: torch.nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    args: tuple[Any, ...] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    profile: SimilarityProfile | None = None,
    config: SereConfig | None = None,
    dynamic_shapes: Any = None,
    experts: str | None = None,
    inductor_options: Mapping[str, Any] | None = None,
    allow_no_gates: bool = False,
) -> str:
    """Compile a re-routed model to an AOTInductor package, for the device its weights are on.

    Load it with `torch._inductor.aoti_load_package(path)`, or in C++ with `torch::inductor::AOTIModelPackageLoader`,
    which takes the tensor inputs in order.

    Args:
        model_or_program: as in `export_rewritten`, like every argument not described here.
        path: the file to write; its name ends in `.pt2`.
        args: example inputs of a model, positional.
        kwargs: example inputs of a model, by keyword.
        profile: similarity matrices by router weight.
        config: the options of re-routing.
        dynamic_shapes: which sizes of a model's inputs may vary.
        experts: how Hugging Face models compute their experts in the package; None leaves that alone.
        inductor_options: passed to Inductor, such as `{"max_autotune": True}`.
        allow_no_gates: package an unchanged program rather than raise.

    Returns:
        The path, as a string.

    Raises:
        LoweringError: the path does not end in `.pt2`, `experts` is for ONNX alone, this version of torch cannot call
            an operator of the program from a package, or as `export_rewritten`, whose other errors pass as well.
        OutputError: the file cannot be written; an earlier one of the name is as it was, as after every error.
    """
    target = _checked_path(path)
    refuse_onnx_only(experts)
    program = export_rewritten(
        model_or_program,
        args,
        kwargs=kwargs,
        profile=profile,
        config=config,
        dynamic_shapes=dynamic_shapes,
        experts=experts,
        allow_no_gates=allow_no_gates,
    )
    _refuse_without_shim(program)
    _warn_of_foreign_operators(program)
    with archive_file(target) as file:
        # A copy: torch writes into the options.
        torch._inductor.aoti_compile_and_package(
            program, package_path=file, inductor_configs=dict(inductor_options or {})
        )
    return target


def _refuse_without_shim(program: ExportedProgram) -> None:
    """Raise where the C++ that AOTInductor writes would call a function that this torch lacks, before minutes of it.

    Seen with torch 2.11 on CUDA: "'aoti_torch_cuda__grouped_mm' was not declared".
    """
    if torch.ops.aten._grouped_mm.default not in operators(program):
        return
    for device in {tensor.device.type for tensor in program.state_dict.values()}:
        if f"aoti_torch_{device}__grouped_mm" not in _shims(device):
            raise LoweringError(
                f"torch {torch.__version__} cannot call aten::_grouped_mm on {device} from an AOTInductor package: "
                'export with experts="batched_mm", or use torch 2.13 or later'
            )


def _shims(device: str) -> str:
    """Torch's header of the functions by which a package calls ATen's operators on a kind of device."""
    folder = Path(torch.__file__).parent / "include/torch/csrc/inductor/aoti_torch/generated"
    return (folder / f"c_shim_{device}.h").read_text()


def _warn_of_foreign_operators(program: ExportedProgram) -> None:
    """Tell of operators that a package calls and does not hold: most are written in Python."""
    foreign = sorted(str(operator) for operator in operators(program) if operator.namespace not in _COMPILED)
    if foreign:
        log.warning(
            "the package will call %s, which it does not hold: a process must register it before it loads the "
            "package, so one in Python is out of reach of C++. Of transformers' experts implementations "
            '"batched_mm" needs no such operator; "grouped_mm" does on CPU and for other types than bfloat16.',
            ", ".join(foreign),
        )


def _checked_path(path: str | os.PathLike[str]) -> str:
    """The path as torch wants it. A bad one is refused before minutes of compilation, not after."""
    target = os.fspath(path)
    if not target.endswith(".pt2"):
        raise LoweringError(f"an AOTInductor package is a file whose name ends in .pt2, got {target!r}")
    check_writable(target)
    return target
