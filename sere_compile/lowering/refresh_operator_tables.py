"""Write `tensorrt_operators.json` anew from what torch_tensorrt and TensorRT publish.

    pip download --no-deps torch-tensorrt==2.13.0
    python -m sere_compile.lowering.refresh_operator_tables torch_tensorrt-2.13.0-*.whl [operators.md]

The wheel is read as source, never imported: importing torch_tensorrt needs TensorRT and a GPU's driver. `operators.md`
is the file of that name under docs/ in the repository onnx/onnx-tensorrt, at the release that torch_tensorrt uses;
without it the list stays as it is. Names and versions are kept, no text and no code.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TABLES = Path(__file__).with_name("tensorrt_operators.json")
_CONVERTERS = "torch_tensorrt/dynamo/conversion/"
_DECOMPOSITIONS = "torch_tensorrt/dynamo/lowering/_decomposition_groups.py"
_OWN_DECOMPOSITIONS = "torch_tensorrt/dynamo/lowering/_decompositions.py"


def read_wheel(wheel: Path) -> dict[str, Any]:
    """Which operators torch_tensorrt converts, and which it decomposes before.

    Returns:
        version, `converters` ({"aten.add.Tensor": whether a converter allows dynamic shapes}), `decompositions`
        (operators that torch's decompositions replace before conversion) and `replaced` (those that torch_tensorrt's
        own do).
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(_CONVERTERS) and name.endswith(".py")]
        sources = [archive.read(name).decode() for name in names]
        groups = ast.parse(archive.read(_DECOMPOSITIONS))
        own = ast.parse(archive.read(_OWN_DECOMPOSITIONS))
    converters: dict[str, bool] = {}
    for source in sources:
        for operator, dynamic in _registered(ast.parse(source), "dynamo_tensorrt_converter"):
            # Not those that a function registers for whatever it is given.
            if operator.startswith(("aten.", "prims.", "operator.")):
                converters[operator] = converters.get(operator, False) or dynamic
    return {
        "version": wheel.name.split("-")[1],
        "converters": dict(sorted(converters.items())),
        "decompositions": sorted(_named_set(groups, "torch_enabled_decompositions")),
        "replaced": sorted({name for name, _ in _registered(own, "register_torch_trt_decomposition") if "." in name}),
    }


def _registered(tree: ast.Module, by: str) -> Iterator[tuple[str, bool]]:
    """The first argument of every call of `by`, and whether the call allows dynamic shapes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == by and node.args:
            says = next((k.value for k in node.keywords if k.arg == "supports_dynamic_shapes"), None)
            yield _short(ast.unparse(node.args[0])), isinstance(says, ast.Constant) and says.value is True


def _named_set(tree: ast.Module, name: str) -> set[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and isinstance(node.value, ast.Set):
            return {_short(ast.unparse(element)) for element in node.value.elts}
    raise ValueError(f"{_DECOMPOSITIONS} has no set {name}")


def _short(operator: str) -> str:
    return operator.removeprefix("torch.ops.")


def read_operators(text: str) -> dict[str, Any]:
    """TensorRT's table of ONNX operators: release, opsets, and types (or null) by operator."""
    head = re.search(r"TensorRT (\S+) supports operators in the inclusive range of opset (\d+) to opset (\d+)", text)
    if head is None:
        raise ValueError("operators.md does not say which TensorRT release and opsets it is for")
    operators: dict[str, list[str] | None] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 3 and cells[2][:1] in ("Y", "N"):
            types = [kind.strip() for kind in cells[3].split(",") if kind.strip()]
            operators[cells[1]] = types if cells[2].startswith("Y") else None
    return {"version": head[1], "opsets": [int(head[2]), int(head[3])], "operators": dict(sorted(operators.items()))}


def main(wheel: str, operators: str | None = None) -> None:
    """Read the sources and write the tables."""
    tables = json.loads(TABLES.read_text(encoding="utf-8"))
    tables["torch_tensorrt"] = {"source": "the wheel of torch-tensorrt on PyPI", **read_wheel(Path(wheel))}
    if operators is not None:
        tables["onnx"] = {
            "source": "docs/operators.md of github.com/onnx/onnx-tensorrt",
            **read_operators(Path(operators).read_text(encoding="utf-8")),
        }
    text = json.dumps(tables, indent=1)
    # Lists of types on one line.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda match: re.sub(r"\s+", " ", match[0]), text)
    TABLES.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
