"""The trunk of every lowering: a model or an exported program becomes an exported program that is re-routed.

model -> torch.export -> sere_compile.rewrite -> AOTInductor, ONNX, TensorRT
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..config import SereConfig
from ..errors import GateNotFoundError, LoweringError, ProfileError
from ..rewrite import rewrite, rewrite_with_one_operator_for_experts
from ..rewrite_mark import marks
from ..similarity import binding
from ..similarity.profile import SimilarityProfile
from .free_sizes import free_sizes
from .standard_operators import FUSED, experts_computed_by
from .token_mask import mask_tokens

log = logging.getLogger(__name__)


def export_rewritten(
    model_or_program: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    profile: SimilarityProfile | None = None,
    config: SereConfig | None = None,
    dynamic_shapes: Any = None,
    experts: str | None = None,
    allow_no_gates: bool = False,
) -> ExportedProgram:
    """Export a model and re-route its gates, or re-route an exported program.

    Where the program has an input `attention_mask` [B, L], the tokens that it hides make no expert primary.

    Args:
        model_or_program: a model, or what `torch.export.export` made of it. A program that `sere_compile.rewrite` made
            is returned as it is, also where it had nothing to re-route (S = K): then `profile` or `config` re-route it.
        args: example inputs of a model, positional.
        kwargs: example inputs of a model, by keyword.
        profile: similarity matrices by router weight. None: those attached to the model, else the experts are probed.
        config: the options of re-routing, as `rewrite` takes them; the backend's defaults otherwise.
        dynamic_shapes: which sizes of a model's inputs may vary, as in `torch.export.export`; "auto" lets batch and
            sequence vary (`free_sizes`). None fixes all and says so in a warning: re-routing depends on the batch, so
            one that is filled up to a fixed size is re-routed as another, unless an `attention_mask` hides what fills.
        experts: how Hugging Face models inside a model compute their experts in the program; None leaves that alone.
            One of `standard_operators.FUSED`: the experts of every gate, of any model or program, are one
            `sere::expert_mlp`.
        allow_no_gates: return the program unchanged, with a warning, where `GateNotFoundError` would be raised.
            `strict=True` in the config still raises.

    Raises:
        LoweringError: torch.export cannot trace the model (its error is the cause), or arguments that do not belong
            together.
        GateNotFoundError: nothing to re-route was found, or, without a profile, its experts could not be run.
        ConfigError: max_tokens lies inside the range of batch sizes.
        ProfileError: the profile is for another model; the message names the first gate that differs.
    """
    if isinstance(model_or_program, ExportedProgram):
        _check_program_only(args, kwargs, dynamic_shapes)
        program = model_or_program
        if holds_our_operators(program) or True in marks(program.graph_module):
            _check_not_configured(profile, config)
        if is_rewritten(program) and profile is None and config is None:
            _check_fused(program, experts)
            if not holds_our_operators(program):
                log.warning(
                    "the program comes from sere_compile.rewrite and stays as it is, though no operator of re-routing "
                    "is in it: S was K, or they are decomposed"
                )
            return program
    else:
        if dynamic_shapes == "auto":
            dynamic_shapes = free_sizes(model_or_program, args or (), kwargs or {})
        elif dynamic_shapes is None:
            log.warning(
                "every size is fixed to that of the example inputs, and re-routing depends on the batch: a smaller one "
                'has to be filled up, and what fills it is re-routed with it. dynamic_shapes="auto" leaves batch and '
                "sequence free"
            )
        with experts_computed_by(experts, model_or_program):
            program = _export(model_or_program, args or (), kwargs, dynamic_shapes)
        profile = profile if profile is not None else _attached_profile(model_or_program)
    if profile is not None:
        _check_profile(profile, program)
    try:
        if experts in FUSED:
            rerouted = rewrite_with_one_operator_for_experts(program, profile, config)
        else:
            rerouted = rewrite(program, profile=profile, config=config)
    except GateNotFoundError as error:
        if not allow_no_gates or (config is not None and config.strict):
            raise
        log.warning("the exported program runs unchanged: %s", error)
        return program
    mask_tokens(rerouted)
    return rerouted


def is_rewritten(program: ExportedProgram) -> bool:
    """Whether `sere_compile.rewrite` made the program, or it holds an operator of `sere::`."""
    return bool(marks(program.graph_module)) or holds_our_operators(program)


def holds_our_operators(program: ExportedProgram) -> bool:
    """Whether an operator of `sere::` is in the program: neither where S = K nor after decompositions."""
    return any(operator.namespace == "sere" for operator in operators(program))


def operators(program: ExportedProgram) -> set[torch._ops.OpOverload]:
    """Every operator that the program calls."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    targets = {node.target for graph in graphs for node in graph.nodes}
    return {target for target in targets if isinstance(target, torch._ops.OpOverload)}


def _export(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> ExportedProgram:
    if not isinstance(model, torch.nn.Module):
        raise LoweringError(f"expected a torch.nn.Module or an ExportedProgram, got {type(model).__name__}")
    try:
        # Without gradients: torch.export puts what runs under a model's own `@torch.no_grad()` into a nested graph
        # otherwise, where no gate is looked for.
        with torch.no_grad():
            return torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    except Exception as error:
        raise LoweringError(f"{_export_hint(model)}\n{type(error).__name__}: {error}") from error


def _export_hint(model: torch.nn.Module) -> str:
    """One line on why torch.export may have failed."""
    failed = f"torch.export cannot trace {type(model).__name__}"
    configs = (getattr(module, "config", None) for module in model.modules())
    used = next(filter(None, (getattr(config, "_experts_implementation", None) for config in configs)), None)
    if used is None:
        return f"{failed}. Experts that index stacked weights export, a Python loop over those that were hit does not."
    return (
        f'{failed}. Of transformers\' experts implementations "grouped_mm" and "batched_mm" export, "eager" does not; '
        f'this model uses "{used}" (model.set_experts_implementation changes it).'
    )


def _attached_profile(model: torch.nn.Module) -> SimilarityProfile | None:
    """What `sere_compile.attach` gave the model, under the names the parameters have in `model`."""
    entries = {name: binding.lookup(parameter) for name, parameter in model.named_parameters()}
    attached = {name: e for name, e in entries.items() if e is not None and e.from_profile and e.matrix is not None}
    matrices = {name: entry.matrix for name, entry in attached.items() if entry.matrix is not None}
    projections = {name: entry.projection for name, entry in attached.items() if entry.projection is not None}
    return SimilarityProfile(matrices, None, projections or None) if matrices else None


def _check_profile(profile: SimilarityProfile, program: ExportedProgram) -> None:
    """Every gate of the profile must be a weight of the program; `rewrite` checks the other way round and the sizes."""
    unknown = [gate for gate in profile if gate not in program.state_dict]
    if unknown:
        raise ProfileError(
            f"the profile is for another model: its gate {unknown[0]} is not a weight of the exported program "
            f"({len(unknown)} of {len(profile)} are not). A wrapper around the model prefixes every name; "
            "sere_compile.attach(model, profile) before the export takes care of that"
        )


def _check_program_only(*export_arguments: Any) -> None:
    if any(argument is not None for argument in export_arguments):
        raise LoweringError(
            "args, kwargs and dynamic_shapes are for exporting a model; an ExportedProgram has its own already"
        )


def _check_not_configured(profile: SimilarityProfile | None, config: SereConfig | None) -> None:
    if profile is not None or config is not None:
        raise LoweringError(
            "the program is re-routed already, so profile and config would have no effect: leave them out, or give "
            "the program from before sere_compile.rewrite"
        )


def _check_fused(program: ExportedProgram, experts: str | None) -> None:
    if experts in FUSED and torch.ops.sere.expert_mlp.default not in operators(program):
        raise LoweringError(
            f'experts="{experts}" is decided while the program is re-routed, which it is already: give the program '
            "from before sere_compile.rewrite"
        )
