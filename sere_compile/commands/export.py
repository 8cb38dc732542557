"""`sere export`: a checkpoint with re-routing inside, for AOTInductor, ONNX or another PyTorch process."""

from __future__ import annotations

from typing import Any

import click
import torch

from ..config import SereConfig
from ..errors import SereError
from ..integrations.transformers import KINDS, is_shipped, load_causal_lm
from ..similarity.attach import attach
from ..similarity.profile import SimilarityProfile
from .options import routing_options
from .output_file import OutputFile


@click.command("export")
@click.option("--to", "target", type=click.Choice(["aot", "onnx", "exported"]), required=True, help="What to write.")
@click.option(
    "--model",
    "name",
    default=KINDS[0],
    show_default=True,
    help=f"Folder or Hugging Face name of a causal language model, or {', '.join(KINDS)}, which come with the package.",
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
@click.option("--experts", type=click.Choice(["grouped_mm", "batched_mm"]), help="How the graph computes experts.")
@click.option("--allow-no-gates", is_flag=True, help="Write a model without gates unchanged.")
@click.option("--dtype", help="Dtype of the weights; the checkpoint's by default, float32 for models of the package.")
def export_command(
    target: str,
    name: str,
    out: str,
    profile: str | None,
    cache_length: int | None,
    as_function: bool,
    experts: str | None,
    allow_no_gates: bool,
    dtype: str | None,
    **options: Any,
) -> None:
    """Write a model with its gates re-routed.

    Without --decode the graph takes input_ids of any batch size and length and returns logits, for prefill and scoring.
    With it, (input_ids, position, keys, values) to (logits, keys, values), for any batch size. Exits with 1 if there
    is no gate. Unless --experts is given, ONNX files use batched_mm, other targets what the model is set to.
    """
    try:
        config = SereConfig(**options)
        if as_function and target != "onnx":
            raise click.UsageError("--as-function is for --to onnx")
        matrices = None if profile is None else SimilarityProfile.load(profile)
        model, _ = load_causal_lm(name, dtype=dtype or ("float32" if is_shipped(name) else "auto"))
        if matrices is None:
            click.echo("no --profile: similarity is that of the experts on random hidden states", err=True)
        else:
            attach(model, matrices)
        graph = _prefill(model) if cache_length is None else _decode(model, cache_length)
        graph |= {"config": config, "allow_no_gates": allow_no_gates} | (
            {} if experts is None else {"experts": experts}
        )
        written = _write(target, out, graph, as_function)
    except SereError as error:
        raise click.ClickException(str(error)) from error
    click.echo(written)


def _write(target: str, out: str, graph: dict[str, Any], as_function: bool) -> str:
    """Lower a module with its arguments; one line on what was written."""
    names = graph.pop("names")
    module, args = graph.pop("module"), graph.pop("args")
    if target == "onnx":
        from ..lowering import onnx

        done = onnx.export(
            module, args, out, as_function=as_function, input_names=names[0], output_names=names[1], **graph
        )
        return f"{out}: {done.gates} gates re-routed, opset {done.opset}, {done.operators.total()} operators"
    from ..lowering import aot
    from ..lowering.archive_file import archive_file
    from ..lowering.export import export_rewritten
    from ..lowering.standard_operators import rerouted_gates

    if target == "aot":
        return f"{aot.package(module, out, args, **graph)}: AOTInductor package"
    program = export_rewritten(module, args, **graph)
    with archive_file(out) as file:
        torch.export.save(program, file)
    return f"{out}: {rerouted_gates(program)} gates re-routed; `import sere_compile.ops` before torch.export.load"


def _prefill(model: Any) -> dict[str, Any]:
    """The model on tokens [batch, length], both free."""
    free = torch.export.Dim.DYNAMIC
    return {
        "module": model,
        "args": (torch.zeros(2, 8, dtype=torch.int64, device=model.device),),
        "kwargs": {"use_cache": False},
        "dynamic_shapes": {"input_ids": {0: free, 1: free}, "use_cache": None},
        "names": (["input_ids"], ["logits"]),
    }


def _decode(model: Any, cache_length: int) -> dict[str, Any]:
    """One step with a cache that comes in and goes out, for any number of rows."""
    from ..lowering.decode_step import DecodeStep

    step = DecodeStep(model, cache_length).eval()
    return {
        "module": step,
        "args": step.example_inputs(),
        "dynamic_shapes": step.dynamic_shapes(),
        "names": step.names(),
    }
