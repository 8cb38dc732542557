"""ONNX: a model with re-routing inside, as standard operators or with one function of the domain `sere` a gate."""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from ..config import SereConfig
from ..errors import ConfigError, LoweringError
from ..passes import nodes
from ..similarity import SimilarityProfile
from .aot import export_rewritten
from .standard_operators import REFERENCES, decompose, require, rerouted_gates

# What torch.onnx translates to; below it torch has to convert the finished graph, which can fail.
LOWEST_OPSET = 18
DOMAIN = "sere"


@dataclass(frozen=True)
class OnnxExport:
    """What was written.

    Attributes:
        path: the file.
        opset: of the standard operators.
        gates: how many gates are re-routed.
        operators: how often each standard operator occurs, without constants, in functions once for each call.
        operators_in_functions: how many of them stand in functions of the domain `sere`: what re-routing adds.
    """

    path: Path
    opset: int
    gates: int
    operators: collections.Counter[str] = field(repr=False)
    operators_in_functions: int = 0


def export(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] | None,
    path: str | os.PathLike[str],
    *,
    kwargs: dict[str, Any] | None = None,
    profile: SimilarityProfile | None = None,
    config: SereConfig | None = None,
    dynamic_shapes: Any = None,
    as_function: bool = False,
    opset: int = LOWEST_OPSET,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    experts: str | None = "batched_mm",
    allow_no_gates: bool = False,
) -> OnnxExport:
    """Write a model to ONNX with its gates re-routed.

    The model is traced by torch.export, rewritten, and translated by torch.onnx. The file passes onnx.checker. The
    similarity matrices are initializers, named `sere_similarity_0`, ... in the order of the gates.

    Args:
        model: a module in eval mode, or a program of torch.export.
        args: example arguments to trace with; None for a program, as for `kwargs` and `dynamic_shapes`.
        path: where to write; weights above 1.5 GB go to a file beside it.
        kwargs: example keyword arguments.
        profile: a matrix for every gate, by the name of its router weight. None: what is attached to the model;
            without that the experts are probed.
        config: the options of re-routing. `inner` and `collect_stats` have no meaning here.
        dynamic_shapes: as torch.export takes it; without it all sizes are those of the example.
        as_function: keep each re-routing as one node `sere.reroute` (or `sere.reroute_merged`), whose function the file
            holds too; for looking at the graph. Without it only standard operators are used.
        opset: version of the standard operators, from 18 up.
        input_names: names for the graph's inputs.
        output_names: names for its outputs.
        experts: how Hugging Face models compute their experts in the graph; None leaves that as it is.
        allow_no_gates: write the model unchanged where nothing can be re-routed.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        ConfigError: `opset` is too low.
        LoweringError: torch.export cannot trace the model, or the traced program does what ONNX cannot say.
        GateNotFoundError: nothing can be re-routed.
        ProfileError: the profile lacks a gate of the model; the message names the first.
    """
    require("onnx", "onnx", "onnxscript")
    if opset < LOWEST_OPSET:
        raise ConfigError(f"opset must be at least {LOWEST_OPSET}, got {opset}")
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
    gates = rerouted_gates(program)
    _check_translatable(program)
    functions = _Functions(opset)
    program = decompose(program, functions.table() if as_function else None)
    _check_translatable(program)
    translated = _translate(program, opset, input_names, output_names)
    functions.add_to(translated.model)
    translated.save(str(path))
    return _checked(Path(path), opset, gates)


def _translate(
    program: ExportedProgram, opset: int, inputs: Sequence[str] | None, outputs: Sequence[str] | None
) -> torch.onnx.ONNXProgram:
    translated = torch.onnx.export(
        program, dynamo=True, opset_version=opset, input_names=inputs, output_names=outputs, verbose=False
    )
    assert translated is not None
    return translated


def _check_translatable(program: ExportedProgram) -> None:
    """Raise for what torch.onnx would refuse without a hint, or leave out without a word."""
    written = _written_input(program)
    if written is not None:
        raise LoweringError(
            f"the program writes to {written}, and an ONNX graph keeps no state. Let the model take what it updates "
            "as an input and return the new value; sere_compile.lowering.decode_step.DecodeStep does so for the caches "
            "of Hugging Face models."
        )
    grouped = next((n for n in program.graph.nodes if "grouped_mm" in str(n.target)), None)
    if grouped is not None:
        raise LoweringError(
            f"the program computes its experts by {grouped.target}, for which ONNX has no operator; trace the model "
            'after model.set_experts_implementation("batched_mm")'
        )


def _written_input(program: ExportedProgram) -> str | None:
    """The name of a buffer or input that the program certainly changes; None if there is none."""
    signature = program.graph_signature
    # Known after decompositions.
    mutated = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if mutated:
        return mutated[0]
    for node in program.graph.nodes:
        for written in nodes.writes(node):
            root: Node | None = written
            # A cast may be a copy.
            while root is not None and nodes.kind(root) in nodes.ALIASING - {"to", "contiguous"}:
                root = nodes.operand(root)
            if root is not None and root.op == "placeholder":
                return signature.inputs_to_buffers.get(root.name, root.name)
    return None


def _checked(path: Path, opset: int, gates: int) -> OnnxExport:
    """Check the written file and count what is in it."""
    import onnx

    onnx.checker.check_model(str(path))
    proto = onnx.load(str(path), load_external_data=False)
    bodies = {(f.domain, f.name): collections.Counter(node.op_type for node in f.node) for f in proto.functions}
    for body in bodies.values():
        body.pop("Constant", None)
    operators: collections.Counter[str] = collections.Counter()
    inside = 0
    for node in proto.graph.node:
        if node.op_type == "Constant":
            continue
        body = bodies.get((node.domain, node.op_type), collections.Counter([node.op_type]))
        operators += body
        inside += body.total() if node.domain == DOMAIN else 0
    return OnnxExport(path, opset, gates, operators, inside)


# S, threshold, min_active, max_active.
Numbers = tuple[int, float, int, int]


@dataclass(frozen=True)
class _Body:
    """One function: an operator with its numbers, and what its body depends on besides."""

    operator: torch._ops.OpOverload
    numbers: Numbers
    sizes: tuple[tuple[int | None, ...], ...]
    dtypes: tuple[torch.dtype, ...]


class _Functions:
    """The functions of a file: one for each operator, setting and number of experts that occurs in it."""

    def __init__(self, opset: int) -> None:
        self._opset = opset
        self._names: dict[_Body, str] = {}

    def table(self) -> dict[torch._ops.OpOverload, Any]:
        """Decompositions of the `sere::` operators into calls of functions."""
        return {
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
        _check_unmasked(token_mask)
        numbers = (select_top_k, threshold, min_active, max_active)
        name = self._name(torch.ops.sere.reroute.default, numbers, ids, similarity)
        return torch.onnx.ops.symbolic(name, (ids, similarity), dtype=ids.dtype, shape=ids.shape, version=1)

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
        _check_unmasked(token_mask)
        numbers = (select_top_k, threshold, min_active, 0)
        name = self._name(torch.ops.sere.reroute_merged.default, numbers, ids, weights, similarity)
        both = torch.onnx.ops.symbolic_multi_out(
            name,
            (ids, weights, similarity),
            dtypes=(ids.dtype, weights.dtype),
            shapes=(ids.shape, weights.shape),
            version=1,
        )
        return tuple(both)

    def _name(self, operator: torch._ops.OpOverload, numbers: Numbers, *tensors: Tensor) -> str:
        """The name of the function for a call, `sere::reroute`, `sere::reroute_2` and so on."""
        *routing, similarity = tensors
        free: tuple[int | None, ...] = (None,) * (routing[0].dim() - 1)
        sizes = [(*free, int(tensor.shape[-1])) for tensor in routing] + [tuple(map(int, similarity.shape))]
        body = _Body(operator, numbers, tuple(sizes), tuple(tensor.dtype for tensor in tensors))
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
        results = ["new_ids", "new_weights"][: len(body.sizes) - 1]
        inputs = ["topk_ids", "topk_weights"][: len(body.sizes) - 1] + ["similarity"]
        graph = _translate(program, self._opset, inputs, results).model.graph
        _initializers_to_constants(graph)
        function = ir.Function(DOMAIN, name, graph=graph, attributes=[])
        experts, slots = body.sizes[-1][0], body.sizes[0][-1]
        select_top_k, threshold, min_active, max_active = body.numbers
        budget = f", max_active={max_active}" if max_active else ""
        function.doc_string = (
            f"SERE: select_top_k={select_top_k} of {slots} slots{budget}, threshold={threshold}, "
            f"min_active={min_active}, {experts} experts"
        )
        return function


def _check_unmasked(token_mask: Tensor | None) -> None:
    """Raise for the one argument of an operator that functions do not have."""
    if token_mask is not None:
        raise LoweringError("a function of the file takes no token_mask; export without as_function")


class _Reference(nn.Module):
    """The ATen reference of an operator with its numbers filled in, as a module to trace."""

    def __init__(self, body: _Body) -> None:
        super().__init__()
        self._body = body

    def forward(self, *tensors: Tensor) -> Any:
        *numbers, max_active = self._body.numbers
        # Merging has no budget.
        options = {"max_active": max_active} if max_active else {}
        return REFERENCES[self._body.operator](*tensors, *numbers, **options)


def _initializers_to_constants(graph: Any) -> None:
    """A function has no initializers: make them constants at its beginning."""
    from onnxscript import ir

    for value in list(graph.initializers.values()):
        constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", value.const_value)])
        constant.outputs[0].name = value.name
        ir.convenience.replace_all_uses_with(value, constant.outputs[0])
        graph.initializers.pop(value.name)
        graph.insert_before(graph[0], constant)
