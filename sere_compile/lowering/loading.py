"""How a written file is loaded: as a function, and as lines of Python for whoever gets the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.export import ExportedProgram

from ..extras import require
from .export import operators

# Operators that a file calls and does not hold, by their namespace: the import that registers them.
_REGISTERED_BY = {"transformers": "import transformers.integrations.moe  # the grouped product of its experts"}

TARGETS = ("aot", "onnx", "exported")
Run = Callable[..., list[Tensor]]


def load(target: str, path: str) -> Run:
    """A file of `sere export` as a function of the lowered module's arguments; its outputs, flat."""
    if target == "onnx":
        return _onnx_session(path)
    module = torch._inductor.aoti_load_package(path) if target == "aot" else torch.export.load(path).module()

    def run(*inputs: Any) -> list[Tensor]:
        with torch.no_grad():
            return pytree.tree_leaves(module(*inputs))

    return run


def _onnx_session(path: str) -> Run:
    (onnxruntime,) = require("onnx", "onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*inputs: Any) -> list[Tensor]:
        arrays = [leaf.cpu().numpy() for leaf in pytree.tree_leaves(inputs)]
        return [torch.from_numpy(value) for value in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


def imports_of(program: ExportedProgram) -> list[str]:
    """Lines that register what a file of this program calls and does not hold, besides operators of this library."""
    called = {operator.namespace for operator in operators(program)}
    return [line for namespace, line in _REGISTERED_BY.items() if namespace in called]


def snippet(target: str, path: str, args: Sequence[Any], names: Sequence[str], imports: Sequence[str] = ()) -> str:
    """Lines of Python that load a file of `sere export` and call it once, in a process that has only what they import.

    Args:
        target: one of `TARGETS`.
        path: the file.
        args: example arguments of the lowered module, tensors and lists of them.
        names: of the inputs, flat, as in the file.
        imports: what `imports_of` says of the program.
    """
    given = [f"    {_made(arg)}," for arg in args]
    if target == "onnx":
        feeds = (
            f'    "{name}": {_made(leaf)}.numpy(),' for name, leaf in zip(names, pytree.tree_leaves(args), strict=True)
        )
        return "\n".join(
            ["import onnxruntime", "import torch", "", f"session = onnxruntime.InferenceSession({json.dumps(path)})"]
            + ["inputs = {", *feeds, "}", "logits = session.run(None, inputs)[0]", "print(logits.shape)"]
        )
    if target == "aot":
        head = ["import torch", *imports, "", f"model = torch._inductor.aoti_load_package({json.dumps(path)})"]
    else:
        head = [
            "import torch",
            "import sere_compile.ops  # what re-routing is, for the program's operators",
            *imports,
            "",
            f"model = torch.export.load({json.dumps(path)}).module()",
        ]
    first = "[0]" if isinstance(args[-1], list) else ""
    call = ["with torch.no_grad():", "    logits = model(", *(f"    {line}" for line in given), f"    ){first}"]
    return "\n".join([*head, "", *call, "print(tuple(logits.shape))"])


def _made(value: Any) -> str:
    """Code that makes an argument like the given one."""
    if isinstance(value, list):
        return f"[{', '.join(map(_made, value))}]"
    maker = "ones" if value.dtype == torch.int64 and value.bool().any() else "zeros"
    size = ", ".join(map(str, value.shape)) if value.dim() else "()"
    where = "" if value.device.type == "cpu" else f', device="{value.device.type}"'
    return f"torch.{maker}({size}, dtype={value.dtype}{where})"
