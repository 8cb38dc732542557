"""ONNX functions of the domain `sere`, one for each kind of re-routing in a file: viewers show it as one node."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..errors import LoweringError
from .standard_operators import REFERENCES

DOMAIN = "sere"

# S, threshold, min_active, max_active.
Numbers = tuple[int, float, int, int]


@dataclass(frozen=True)
class _Body:
    """One function: an operator with its numbers, and what its body depends on besides."""

    operator: torch._ops.OpOverload
    numbers: Numbers
    inputs: tuple[str, ...]
    sizes: tuple[tuple[int | None, ...], ...]
    dtypes: tuple[torch.dtype, ...]


class Functions:
    """The functions of a file: one for each operator, setting and number of experts that occurs in it."""

    def __init__(self, opset: int) -> None:
        self._opset = opset
        self._names: dict[_Body, str] = {}

    def table(self) -> dict[torch._ops.OpOverload, Any]:
        """Decompositions of the `sere::` operators into calls of functions; filling is plain operators."""
        return {
            torch.ops.sere.fill.default: REFERENCES[torch.ops.sere.fill.default],
            torch.ops.sere.reroute.default: self._reroute,
            torch.ops.sere.reroute_merged.default: self._reroute_merged,
        }

    def add_to(self, model: Any) -> None:
        """Give a translated model the functions that it calls."""
        for body, name in self._names.items():
            function = self._function(body, name)
            model.functions[function.identifier()] = function

    def _reroute(
        self,
        ids: Tensor,
        similarity: Tensor,
        select_top_k: int,
        threshold: float = 0.0,
        min_active: int = 0,
        token_mask: Tensor | None = None,
        max_active: int = 0,
    ) -> Tensor:
        numbers = (select_top_k, threshold, min_active, max_active)
        given = {"topk_ids": ids, "similarity": similarity} | _masked_by(token_mask)
        name = self._name(torch.ops.sere.reroute.default, numbers, given)
        return torch.onnx.ops.symbolic(name, tuple(given.values()), dtype=ids.dtype, shape=ids.shape, version=1)

    def _reroute_merged(
        self,
        ids: Tensor,
        weights: Tensor,
        similarity: Tensor,
        select_top_k: int,
        threshold: float = 0.0,
        min_active: int = 0,
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        numbers = (select_top_k, threshold, min_active, 0)
        given = {"topk_ids": ids, "topk_weights": weights, "similarity": similarity} | _masked_by(token_mask)
        name = self._name(torch.ops.sere.reroute_merged.default, numbers, given)
        both = torch.onnx.ops.symbolic_multi_out(
            name,
            tuple(given.values()),
            dtypes=(ids.dtype, weights.dtype),
            shapes=(ids.shape, weights.shape),
            version=1,
        )
        return tuple(both)

    def _name(self, operator: torch._ops.OpOverload, numbers: Numbers, given: Mapping[str, Tensor]) -> str:
        """The name of the function for a call, `sere::reroute`, `sere::reroute_2` and so on."""
        sizes = tuple(_fixed_sizes(name, tensor) for name, tensor in given.items())
        body = _Body(operator, numbers, tuple(given), sizes, tuple(tensor.dtype for tensor in given.values()))
        same = [known for known in self._names if known.operator is operator]
        base = operator._schema.name.partition("::")[2]
        self._names.setdefault(body, f"{base}_{len(same) + 1}" if same else base)
        return f"{DOMAIN}::{self._names[body]}"

    def _function(self, body: _Body, name: str) -> Any:
        """The operator's reference, translated with free leading sizes, as a function of the file."""
        from onnxscript import ir

        examples = tuple(
            torch.zeros([2 + i if size is None else size for i, size in enumerate(sizes)], dtype=dtype)
            for sizes, dtype in zip(body.sizes, body.dtypes, strict=True)
        )
        free = tuple({i: Dim.DYNAMIC for i, size in enumerate(sizes) if size is None} for sizes in body.sizes)
        with torch.no_grad():
            program = torch.export.export(_Reference(body), examples, dynamic_shapes=(free,), strict=False)
        results = ["new_ids", "new_weights"] if "topk_weights" in body.inputs else ["new_ids"]
        graph = translate(program, self._opset, body.inputs, results).model.graph
        initializers_to_constants(graph)
        function = ir.Function(DOMAIN, name, graph=graph, attributes=[])
        experts, slots = body.sizes[body.inputs.index("similarity")][0], body.sizes[0][-1]
        select_top_k, threshold, min_active, max_active = body.numbers
        budget = f", max_active={max_active}" if max_active else ""
        function.doc_string = (
            f"SERE: select_top_k={select_top_k} of {slots} slots{budget}, threshold={threshold}, "
            f"min_active={min_active}, {experts} experts"
        )
        return function


def _masked_by(token_mask: Tensor | None) -> dict[str, Tensor]:
    return {} if token_mask is None else {"token_mask": token_mask}


def _fixed_sizes(name: str, tensor: Tensor) -> tuple[int | None, ...]:
    """Those of an input that a function depends on; None where any size will do, as for tokens."""
    if name == "similarity":
        return tuple(map(int, tensor.shape))
    slots = () if name == "token_mask" else (int(tensor.shape[-1]),)
    return (None,) * (tensor.dim() - len(slots)) + slots


class _Reference(nn.Module):
    """The ATen reference of an operator with its numbers filled in, as a module to trace."""

    def __init__(self, body: _Body) -> None:
        super().__init__()
        self._body = body

    def forward(self, *tensors: Tensor) -> Any:
        *numbers, max_active = self._body.numbers
        # Merging has no budget.
        options: dict[str, Any] = {"max_active": max_active} if max_active else {}
        given = dict(zip(self._body.inputs, tensors, strict=True))
        options |= _masked_by(given.pop("token_mask", None))
        return REFERENCES[self._body.operator](*given.values(), *numbers, **options)


def scopes_of(node: Any) -> list[str]:
    """The modules around a translated node, from the outermost to the innermost, then the node itself."""
    return ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))


def initializers_to_constants(graph: Any) -> None:
    """A function has no initializers: make them constants at its beginning."""
    from onnxscript import ir

    for value in list(graph.initializers.values()):
        constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", value.const_value)])
        constant.outputs[0].name = value.name
        ir.convenience.replace_all_uses_with(value, constant.outputs[0])
        graph.initializers.pop(value.name)
        graph.insert_before(graph[0], constant)


def _innermost(error: BaseException) -> str:
    """The first line of what an error comes from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def translate(
    program: ExportedProgram, opset: int, inputs: Sequence[str] | None, outputs: Sequence[str] | None
) -> torch.onnx.ONNXProgram:
    """A program in standard operators; calls of functions stay calls.

    Raises:
        LoweringError: torch.onnx does not know an operator of the program; it does not reach that opset: it logs why,
            and leaves the model at a lower one.
    """
    try:
        translated = torch.onnx.export(
            program, dynamo=True, opset_version=opset, input_names=inputs, output_names=outputs, verbose=False
        )
    except torch.onnx.OnnxExporterError as error:
        raise LoweringError(f"torch.onnx does not translate the program: {_innermost(error)}") from error
    assert translated is not None
    written = translated.model.opset_imports[""]
    if written != opset:
        raise LoweringError(f"torch.onnx wrote opset {written} where {opset} was asked for")
    return translated
