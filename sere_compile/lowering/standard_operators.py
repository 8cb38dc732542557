"""A re-routed program in operators that other compilers know: what the ONNX and TensorRT lowerings start from."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..errors import LoweringError
from ..ops.fill.reference import fill_reference
from ..ops.reroute.reference import named_by_comparison, reroute_reference
from ..ops.reroute_merged.reference import reroute_merged_reference

# What each operator is in plain ATen, with the operator's own signature. Without the references' scatter, which is
# cheaper where tokens are many: TensorRT's parser takes no more indices than places, and there are T x S for E + 1.
REFERENCES: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    torch.ops.sere.fill.default: fill_reference,
    torch.ops.sere.reroute.default: functools.partial(reroute_reference, named=named_by_comparison),
    torch.ops.sere.reroute_merged.default: functools.partial(reroute_merged_reference, named=named_by_comparison),
}

# The scope of the nodes that re-routing adds, in graphs of standard operators.
SCOPE = "sere"
# What `experts=` says for one `If` per expert, and for operators of onnxruntime, with the bits of a weight where these
# are fewer; how a Hugging Face model is traced for all of them, which does not matter then.
CONDITIONAL, ONNXRUNTIME_MOE = "conditional", "onnxruntime_moe"
QUANTISED = {"onnxruntime_qmoe8": 8, "onnxruntime_qmoe4": 4}
FUSED = (CONDITIONAL, ONNXRUNTIME_MOE, *QUANTISED)
_TRACED_TO_FUSE = "batched_mm"
_EXPERTS = torch.ops.sere.expert_mlp.default


@contextlib.contextmanager
def experts_computed_by(implementation: str | None, model: nn.Module | ExportedProgram) -> Iterator[None]:
    """Let every Hugging Face model inside `model` compute its experts in one way, and restore that afterwards.

    "grouped_mm" is traced to a grouped matrix product, on a CPU to an operator of transformers' own, and neither
    ONNX nor TensorRT has either. "eager" loops over the experts that were hit and cannot be traced. "batched_mm" is
    plain indexing and matrix products.

    Args:
        implementation: as `PreTrainedModel.set_experts_implementation` takes it; None changes nothing. One of `FUSED`:
            what fusing the experts starts from.
        model: any module; with a traced program, or without a Hugging Face model inside, nothing happens.
    """
    implementation = _TRACED_TO_FUSE if implementation in FUSED else implementation
    modules = model.modules() if isinstance(model, nn.Module) and implementation is not None else ()
    changed: list[tuple[Any, str]] = []
    try:
        for module in modules:
            setter = getattr(module, "set_experts_implementation", None)
            current = getattr(getattr(module, "config", None), "_experts_implementation", None)
            if setter is not None and current is not None and current != implementation:
                setter(implementation)
                changed.append((setter, current))
        yield
    finally:
        for setter, previous in changed:
            setter(previous)


def weights_by_expert(topk_ids: Tensor, topk_weights: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """What a token's slots (ids, weights [T, K]) give each expert, float32 [T, E], and whether one names it, bool."""
    naming = topk_ids[..., None] == torch.arange(experts, dtype=topk_ids.dtype, device=topk_ids.device)
    return torch.where(naming, topk_weights[..., None].float(), 0.0).sum(1), naming.any(1)


def refuse_onnx_only(experts: str | None) -> None:
    """Raise for experts that only an ONNX file has."""
    if experts in FUSED:
        raise LoweringError(
            f'experts="{experts}" is for ONNX files: use sere_compile.lowering.onnx.export, and for TensorRT '
            f'sere_compile.lowering.tensorrt.build_onnx on its file, which takes "{CONDITIONAL}"'
        )


def sere_nodes(program: ExportedProgram) -> list[torch.fx.Node]:
    """The operators of a traced program that re-route."""
    return [node for node in _operators_of_ours(program) if node.target is not _EXPERTS]


def _operators_of_ours(program: ExportedProgram) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if getattr(node.target, "namespace", None) == "sere"]


def rerouted_gates(program: ExportedProgram) -> int:
    """How many gates of a traced program are re-routed: merging after a projection takes two operators for one."""
    return len({node.args[0] for node in sere_nodes(program)})


def decompose(
    program: ExportedProgram, table: Mapping[torch._ops.OpOverload, Callable[..., Any]] | None = None
) -> ExportedProgram:
    """Replace the `sere::` operators by plain ATen, or by what `table` says; everything else stays.

    Raises:
        LoweringError: an operator is left, because nothing says what it is.
    """
    if table is None and not _operators_of_ours(program):
        return program
    with torch.no_grad():
        program = program.run_decompositions(dict(REFERENCES if table is None else table))
    left = {str(node.target) for node in _operators_of_ours(program)}
    if left:
        raise LoweringError(f"no decomposition is known for {', '.join(sorted(left))}")
    for node in program.graph.nodes:
        _mark(node)
    return program


def _mark(node: torch.fx.Node) -> None:
    """Put a node that came of a `sere::` operator into a scope of that name, which later translations keep."""
    origin = next(
        (source.target for source in node.meta.get("from_node", ()) if str(source.target).startswith("sere.")), None
    )
    if origin is not None and origin != str(_EXPERTS):
        # From the outermost module to the innermost: (path, class).
        scopes = node.meta.get("nn_module_stack", {})
        node.meta["nn_module_stack"] = scopes | {SCOPE: (SCOPE, origin.removesuffix(".default"))}
