"""ONNX files in TensorRT: what its own parser says of one, an engine built from it, and the engine's layers.

Either of two libraries does it: `tensorrt`, which builds for the GPU of the machine, or `tensorrt_rtx` (TensorRT for
RTX, on PyPI), which builds on a machine without a GPU, for the compute capabilities that it is told.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import LoweringError, MissingExtraError
from ..whole_file import write_whole
from .engine_layers import Layer, read_layers
from .standard_operators import SCOPE

logger = logging.getLogger(__name__)

# Smallest, best and largest size of a dynamic input.
ShapeRange = tuple[Sequence[int], Sequence[int], Sequence[int]]
LIBRARIES = ("tensorrt", "tensorrt_rtx")
# How many of the log's errors a message holds.
_TOLD = 5


@dataclass(frozen=True)
class EngineBuild:
    """What was built.

    Attributes:
        path: the file.
        library: name and version of the library that built it.
        layers: of the engine, as the builder's log gives them; None where the log went to another logger, because this
            process had created a builder before.
    """

    path: Path
    library: str
    layers: tuple[Layer, ...] | None = field(repr=False)


def check(path: str | os.PathLike[str]) -> str:
    """Ask TensorRT's own parser whether it takes an ONNX file. Seconds, without a GPU.

    Returns:
        Name and version of the library that took it.

    Raises:
        MissingExtraError: neither library is installed.
        LoweringError: the parser refuses the file; the message names node, operator, line of the model, and what to do.
    """
    trt = _library()
    _parsed(trt, Path(path))
    return _named(trt)


def build_onnx(
    path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str] | None = None,
    *,
    shapes: Mapping[str, ShapeRange] | None = None,
    capabilities: Sequence[str] = (),
) -> EngineBuild:
    """Build an engine from an ONNX file of `sere_compile.lowering.onnx.export`, as `trtexec --onnx` does.

    Args:
        path: the ONNX file, with standard operators only or with `sere` functions (TensorRT inlines functions).
        engine_path: where to write the engine; beside the file by default.
        shapes: smallest, best and largest shape of every input with a free size, by its name.
        capabilities: compute capabilities such as "8.9" and "12.0" to build for, with TensorRT for RTX. Without them
            the library's own choice: the GPU of this machine for TensorRT.

    Raises:
        MissingExtraError: neither library is installed; `trtexec_command` is for a machine where one is.
        LoweringError: TensorRT cannot read the file or build it, `shapes` lacks an input with a free size or names
            one that is none, or the library cannot build for a capability.
        OutputError: the file cannot be written.
    """
    trt = _library()
    target = Path(path).with_suffix(".engine") if engine_path is None else Path(engine_path)
    builder, network = _parsed(trt, Path(path))
    options = builder.create_builder_config()
    options.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _set_capabilities(trt, options, capabilities)
    _set_shapes(builder, options, network, shapes or {})
    log = _log(trt)
    log.messages.clear()
    engine = builder.build_serialized_network(network, options)
    if engine is None:
        raise LoweringError(f"{_named(trt)} cannot build {path}: {_errors(trt)}")
    write_whole(target, bytes(engine))
    listed = [text for _, text in log.messages if text.startswith("Layers:\n")]
    return EngineBuild(target, _named(trt), read_layers(listed[-1]) if listed else None)


def trtexec_command(
    path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str] | None = None,
    *,
    shapes: Mapping[str, ShapeRange] | None = None,
) -> list[str]:
    """The command line that does what `build_onnx` does, for a machine with TensorRT's own tools."""
    target = Path(path).with_suffix(".engine") if engine_path is None else Path(engine_path)
    command = ["trtexec", f"--onnx={os.fspath(path)}", f"--saveEngine={target}"]
    for i, kind in enumerate(("min", "opt", "max")):
        each = [f"{name}:{'x'.join(map(str, ranges[i]))}" for name, ranges in (shapes or {}).items()]
        command += [f"--{kind}Shapes={','.join(each)}"] if each else []
    return command


def _library() -> ModuleType:
    """The first of the two libraries that is installed."""
    for name in LIBRARIES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise MissingExtraError(
        "this needs tensorrt or tensorrt_rtx, and neither can be imported: pip install 'sere-compile[tensorrt-rtx]'"
    )


def _named(trt: ModuleType) -> str:
    return f"{'TensorRT for RTX' if trt.__name__ == 'tensorrt_rtx' else 'TensorRT'} {trt.__version__}"


@functools.cache
def _log(trt: ModuleType) -> Any:
    """A logger that keeps what it is told. TensorRT has one for a process, so there is one here."""
    base: Any = trt.ILogger

    class Log(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.messages: list[tuple[Any, str]] = []

        def log(self, severity: Any, text: str) -> None:
            self.messages.append((severity, text))

    return Log()


def _errors(trt: ModuleType) -> str:
    """The errors of the log, the first ones."""
    worst = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
    told = [text for severity, text in _log(trt).messages if severity in worst]
    return "; ".join(told[:_TOLD]) or "its log has no error (TensorRT has one logger a process, and it is another's)"


def _parsed(trt: ModuleType, path: Path) -> tuple[Any, Any]:
    """A builder and the network that it made of a file."""
    if not path.is_file():
        raise LoweringError(f"there is no file {path}")
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        refused = [_refusal(path, parser.get_error(i)) for i in range(parser.num_errors)]
        raise LoweringError(f"{_named(trt)} cannot take {path}: {'; '.join(refused) or _errors(trt)}")
    for name, places in _limited_scatters(trt, network):
        logger.warning(
            "node %s of %s%s scatters a free number of indices into %d places: TensorRT builds it, and the engine "
            "stops with an error when there are more",
            name, path, _source(path, name), places,
        )  # fmt: skip
    return builder, network


def _limited_scatters(trt: ModuleType, network: Any) -> Iterator[tuple[str, int]]:
    """Scatters that TensorRT takes only as long as a free size is small: name, and up to which size."""
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type == trt.LayerType.SCATTER:
            data, indices = tuple(layer.get_input(0).shape), tuple(layer.get_input(1).shape)
            # Other kinds of scatter name a place by several indices.
            limits = [size for size, count in zip(data, indices, strict=False) if count == -1 and size != -1]
            if len(data) == len(indices) and limits:
                yield layer.name, min(limits)


def _refusal(path: Path, error: Any) -> str:
    """What a parser's error means for the model: node, operator, line, reason, what to do."""
    name, operator = error.node_name(), error.node_operator()
    if not operator:
        return error.desc()
    if SCOPE in name.split("/"):
        cure = "re-routing added this node, so this is a fault of sere_compile: please report it with this message"
    else:
        cure = (
            "it is the model's own: write that line with other operators, or use sere_compile.lowering.tensorrt."
            "compile, which leaves what TensorRT does not take to PyTorch"
        )
    # What the parser says of an operator that it does not know at all.
    reason = "there is no such operator" if error.desc() == "false" else error.desc()
    return f"node {name} ({operator}){_source(path, name)}: {reason} ({cure})"


def _source(path: Path, name: str) -> str:
    """Where in the model's code a node comes from: `, from FILE:LINE "CODE"`; empty where the file does not say."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    told = next((entry for node in graph.node if node.name == name for entry in node.metadata_props
                 if entry.key == "pkg.torch.onnx.stack_trace"), None)  # fmt: skip
    frames = re.findall(r'File "(.*)", line (\d+), in .*\n\s*(.*)', told.value if told is not None else "")
    return ', from {}:{} "{}"'.format(*frames[-1]) if frames else ""


def _set_capabilities(trt: ModuleType, options: Any, capabilities: Sequence[str]) -> None:
    if not capabilities:
        return
    known = getattr(trt, "ComputeCapability", None)
    if known is None:
        raise LoweringError(f"{_named(trt)} builds for the GPU of this machine only; tensorrt_rtx takes capabilities")
    members = {f"{name[2:-1]}.{name[-1]}": value for name, value in known.__members__.items() if name.startswith("SM")}
    options.num_compute_capabilities = len(capabilities)
    for i, wanted in enumerate(capabilities):
        if wanted not in members:
            raise LoweringError(f"{_named(trt)} builds for {', '.join(members)}, not for {wanted!r}")
        options.set_compute_capability(members[wanted], i)


def _set_shapes(builder: Any, options: Any, network: Any, shapes: Mapping[str, ShapeRange]) -> None:
    """Tell the sizes between which free ones will lie."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    free = {tensor.name: tuple(tensor.shape) for tensor in inputs if -1 in tuple(tensor.shape)}
    missing = [f"{name} {list(shape)}" for name, shape in free.items() if name not in shapes]
    if missing:
        raise LoweringError(
            f"TensorRT has to know between which sizes a free one (-1) will lie: shapes lacks {', '.join(missing)}; "
            "give (smallest, best, largest) for each"
        )
    unknown = sorted(set(shapes) - {tensor.name for tensor in inputs})
    if unknown:
        named = ", ".join(tensor.name for tensor in inputs)
        raise LoweringError(f"shapes names {', '.join(unknown)}, and the inputs of the file are {named}")
    if not free:
        return
    sizes = builder.create_optimization_profile()
    for name in free:
        sizes.set_shape(name, *map(tuple, shapes[name]))
    options.add_optimization_profile(sizes)
