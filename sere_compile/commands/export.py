"""`sere export`: a checkpoint with re-routing inside, for AOTInductor, ONNX or another PyTorch process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from torch.export import ExportedProgram

from ..config import SereConfig
from ..errors import SereError
from ..integrations.transformers import KINDS, is_shipped, load_causal_lm
from ..lowering.archive_file import archive_file
from ..lowering.check import largest_difference
from ..lowering.decode_step import DecodeStep
from ..lowering.export import export_rewritten, holds_our_operators
from ..lowering.loading import TARGETS, imports_of, load, snippet
from ..lowering.prefill import Prefill
from ..lowering.standard_operators import FUSED, QUANTISED, rerouted_gates
from ..similarity.attach import attach
from ..similarity.profile import SimilarityProfile
from .options import MODEL_HELP, routing_options
from .output_file import OutputFile


@click.command("export")
@click.option("--to", "target", type=click.Choice(TARGETS), required=True, help="What to write.")
@click.option(
    "--model",
    "name",
    default=KINDS[0],
    show_default=True,
    help=MODEL_HELP,
)
@click.option("--out", required=True, type=OutputFile(), help="File to write.")
@click.option(
    "--profile", type=click.Path(exists=True, dir_okay=False), help="Similarity profile; without it experts are probed."
)
@routing_options
@click.option(
    "--decode",
    "cache_length",
    type=click.IntRange(min=1),
    help="One decoding step with a static cache of this many tokens.",
)
@click.option("--as-function", is_flag=True, help="ONNX: keep each re-routing as one node with a function.")
@click.option(
    "--experts",
    type=click.Choice(["grouped_mm", "batched_mm", *FUSED]),
    default="batched_mm",
    show_default=True,
    help="How the graph computes experts. For ONNX: conditional, only those that are active, one If for each; "
    "onnxruntime_moe, likewise by an operator that onnxruntime alone has, and onnxruntime_qmoe8 and onnxruntime_qmoe4 "
    "with their weights in 8 or 4 bits. What grouped_mm gives loads only where "
    "transformers is imported, on a CPU.",
)
@click.option("--check", is_flag=True, help="Run the file on random tokens against the model in PyTorch.")
@click.option("--allow-no-gates", is_flag=True, help="Write a model without gates unchanged.")
@click.option("--dtype", help="Dtype of the weights; the checkpoint's by default, float32 for models of the package.")
def export_command(
    target: str,
    name: str,
    out: str,
    profile: str | None,
    cache_length: int | None,
    as_function: bool,
    experts: str,
    check: bool,
    allow_no_gates: bool,
    dtype: str | None,
    **options: Any,
) -> None:
    """Write a model with its gates re-routed, and print how to load it.

    Without --decode the graph takes input_ids and attention_mask of any batch size and length and returns logits, for
    prefill and scoring; hidden tokens make no expert primary. With it, (input_ids, position, keys, values) to (logits,
    keys, values), for any batch size. Exits with 1 when there is no gate.

    \b
    sere export --to onnx --model P --profile p.safetensors --select-top-k 2 --out model.onnx --check
    sere export --to onnx --model P --experts conditional --decode 2048 --out step.onnx
    sere export --to aot --model P --out model.pt2
    """  # noqa: D301
    try:
        config = SereConfig(**options)
        if as_function and target != "onnx":
            raise click.UsageError("--as-function is for --to onnx")
        if experts in FUSED and target != "onnx":
            raise click.UsageError(f"--experts {experts} is for --to onnx")
        if experts == "grouped_mm" and target == "onnx":
            raise click.UsageError("--experts grouped_mm: ONNX has no operator for it; leave the option out")
        _check_suffix(target, out)
        matrices = None if profile is None else SimilarityProfile.load(profile)
        model, _ = load_causal_lm(name, dtype=dtype or ("float32" if is_shipped(name) else "auto"))
        if matrices is None:
            click.echo("no --profile: similarity is that of the experts on random hidden states", err=True)
        else:
            attach(model, matrices)
        module = Prefill(model).eval() if cache_length is None else DecodeStep(model, cache_length).eval()
        program = export_rewritten(
            module,
            module.example_inputs(),
            config=config,
            dynamic_shapes="auto",
            experts=experts,
            allow_no_gates=allow_no_gates,
        )
        written = _write(target, out, program, module.names(), as_function, experts, config)
        click.echo(f"{out}: {rerouted_gates(program)} gates re-routed, {written}")
        if check:
            bits = QUANTISED.get(experts)
            difference = largest_difference(program, load(target, out), module, is_exact=bits is None)
            told = "" if bits is None else f", weights of experts having {bits} bits"
            click.echo(f"checked against the model in PyTorch: logits within {difference:.1e}{told}")
    except SereError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"\n{snippet(target, out, module.example_inputs(), module.names()[0], imports_of(program))}")


def _check_suffix(target: str, out: str) -> None:
    """Refuse a name that promises another format, and for AOTInductor any but its own, which torch insists on."""
    wanted = ".onnx" if target == "onnx" else ".pt2"
    suffix = Path(out).suffix
    if suffix != wanted and (target == "aot" or suffix in (".onnx", ".pt2")):
        raise click.UsageError(f"--out {out}: --to {target} writes {'an' if target == 'onnx' else 'a'} {wanted} file")


def _write(
    target: str,
    out: str,
    program: ExportedProgram,
    names: tuple[list[str], list[str]],
    as_function: bool,
    experts: str,
    config: SereConfig,
) -> str:
    """Lower a program; a few words on what was written."""
    # The same options again where nothing was re-routed with them, so that nothing is by the defaults.
    same = None if holds_our_operators(program) else config
    if target == "onnx":
        from ..lowering import onnx

        done = onnx.export(
            program,
            None,
            out,
            config=same,
            as_function=as_function,
            input_names=names[0],
            output_names=names[1],
            experts=experts,
            allow_no_gates=True,
        )
        return f"opset {done.opset}, {done.operators.total()} operators"
    if target == "aot":
        from ..lowering import aot

        aot.package(program, out, config=same, allow_no_gates=True)
        return "AOTInductor package"
    with archive_file(out) as file:
        torch.export.save(program, file)
    return "program of torch.export"
