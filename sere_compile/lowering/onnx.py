"""ONNX: a model with re-routing inside, as standard operators or with one function of the domain `sere` a gate."""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import ExportedProgram

from ..config import SereConfig
from ..errors import ConfigError, LoweringError
from ..extras import require
from ..passes.graph import nodes
from ..similarity.profile import SimilarityProfile
from ..whole_file import whole_file
from .conditional_experts import as_one_node, build_conditions
from .export import export_rewritten
from .free_sizes import name_axes
from .onnx_functions import DOMAIN, Functions, scopes_of, translate
from .onnxruntime_moe import moe_node
from .onnxruntime_qmoe import qmoe_node, quantise_experts
from .standard_operators import ONNXRUNTIME_MOE, QUANTISED, REFERENCES, SCOPE, decompose, rerouted_gates

# What torch.onnx translates to; below it torch has to convert the finished graph, which can fail.
LOWEST_OPSET = 18


@dataclass(frozen=True)
class OnnxExport:
    """What was written.

    Attributes:
        path: the file.
        opset: of the standard operators.
        gates: how many gates are re-routed.
        operators: how often each standard operator occurs, without constants, in functions once for each call, in
            conditions once for each.
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
        dynamic_shapes: as torch.export takes it, or "auto": batch and sequence vary. Without it all sizes are those
            of the example, and re-routing depends on the batch.
        as_function: keep each re-routing as one node `sere.reroute` (or `sere.reroute_merged`), whose function the file
            holds too; for looking at the graph. Without it only standard operators are used.
        opset: version of the standard operators, from 18 up.
        input_names: names for the graph's inputs; by default the model's own.
        output_names: names for its outputs; by default those of the fields that the model returns, such as `logits`.
        experts: how Hugging Face models compute their experts in the graph; None leaves that as it is. "conditional":
            one `If` for each expert of every gate, of any model or program whose experts are stacked weights, so that
            those alone are computed that an id names; time follows the active experts. "onnxruntime_moe": so does
            that of `com.microsoft.MoE`, for which the experts are gated by SiLU; onnxruntime alone has it.
            "onnxruntime_qmoe8" and "onnxruntime_qmoe4": likewise, weights of experts in 8 or 4 bits.
        allow_no_gates: write the model unchanged where nothing can be re-routed.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        ConfigError: `opset` is too low.
        LoweringError: torch.export cannot trace the model, the traced program does what ONNX cannot say, `opset` is
            too high for the installed torch and onnx, or experts are to be conditional and are no stacked layers.
        GateNotFoundError: nothing can be re-routed.
        ProfileError: the profile lacks a gate of the model; the message names the first.
        OutputError: the file cannot be written; an earlier one of the name is as it was, as after every error.
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
    # QMoE is given weights of slots as they are, and leaves out experts of which one is negative (onnxruntime 1.32).
    of_onnxruntime = experts == ONNXRUNTIME_MOE or experts in QUANTISED
    if of_onnxruntime and any(name.startswith("sere_projection") for name in program.state_dict):
        raise LoweringError(
            f'projection may make weights negative, which experts="{experts}" cannot say: use "conditional"'
        )
    gates = rerouted_gates(program)
    _check_translatable(program)
    functions = Functions(opset)
    table = functions.table() if as_function else dict(REFERENCES)
    program = decompose(program, {**table, torch.ops.sere.expert_mlp.default: _experts_node(experts)})
    _check_translatable(program)
    own = getattr(model, "names", lambda: (None, None))()
    translated = translate(program, opset, input_names or own[0], output_names or own[1] or _output_names(program))
    build_conditions(translated.model, opset)
    quantise_experts(translated.model)
    name_axes(translated.model.graph)
    _name_what_was_added(translated.model.graph)
    functions.add_to(translated.model)
    with whole_file(path) as beside:
        translated.save(str(beside))
        operators, inside = _checked_operators(beside)
    return OnnxExport(Path(path), opset, gates, operators, inside)


def _experts_node(experts: str | None) -> Callable[..., Any]:
    """What `sere::expert_mlp` becomes; such an operator is there only where `experts` says so."""
    if experts in QUANTISED:
        return functools.partial(qmoe_node, experts)
    return moe_node if experts == ONNXRUNTIME_MOE else as_one_node


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
            root = written
            # A cast may be a copy.
            while nodes.kind(root) not in ("to", "contiguous") and (base := nodes.viewed(root)) is not None:
                root = base
            if root.op == "placeholder":
                return signature.inputs_to_buffers.get(root.name, root.name)
    return None


def _output_names(program: ExportedProgram) -> list[str]:
    """The field of what the model returns that each output is; `output` where it returns a tensor."""
    structure = program.module_call_graph[0].signature.out_spec
    leaves, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(structure.num_leaves), structure))
    parts = [
        [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path] for path, _ in leaves
    ]
    return [".".join(("output", *path) if not path or path[0].isdigit() else path) for path in parts]


def _name_what_was_added(graph: Any) -> None:
    """Name every node that re-routing adds after its gate's module and `sere`, which viewers and engines show."""
    for node in graph:
        *scopes, _ = scopes_of(node)
        if SCOPE in scopes:
            module = next((scope for scope in reversed(scopes[: scopes.index(SCOPE)]) if scope), "")
            node.name = "/".join(filter(None, (module, SCOPE, node.name)))


def _checked_operators(path: Path) -> tuple[collections.Counter[str], int]:
    """Check a written file; how often each operator occurs in it, and how many of them in functions of ours."""
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise LoweringError(f"what torch.onnx made of the model does not pass onnx.checker: {error}") from error
    proto = onnx.load(str(path), load_external_data=False)
    bodies = {(f.domain, f.name): collections.Counter(node.op_type for node in f.node) for f in proto.functions}
    for body in bodies.values():
        body.pop("Constant", None)
    operators: collections.Counter[str] = collections.Counter()
    inside = 0
    for node in _nodes(proto.graph):
        if node.op_type == "Constant":
            continue
        body = bodies.get((node.domain, node.op_type), collections.Counter([node.op_type]))
        operators += body
        inside += body.total() if node.domain == DOMAIN else 0
    return operators, inside


def _nodes(graph: Any) -> Iterator[Any]:
    """Of a graph and of the branches of its conditions."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g)
