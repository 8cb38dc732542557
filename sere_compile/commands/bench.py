"""`sere bench`: what re-routing and the expert kernels give on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import torch

from ..benchmark.geometries import GEOMETRIES
from ..errors import SereError
from ..extras import require
from .options import MODEL_HELP, Numbers, positive
from .output_file import OutputFile, Picture

if TYPE_CHECKING:
    from ..benchmark.result import Results

# Layers of a geometry unless --layers is given.
LAYERS = 12
CPU_LAYERS = 2
_LAYERS = f"Layers of a geometry; {LAYERS} on a GPU, {CPU_LAYERS} on a CPU."


def _size(text: str) -> int:
    """A whole number of at least 1: digits only, and no more of them than any size has."""
    if not text.isdecimal() or len(text) > 9:
        raise ValueError(f"{text} is no size")
    return positive(text)


def _size_or_k(text: str) -> int:
    """K stands for a number that no model's K exceeds."""
    return 1_000_000 if text == "K" else _size(text)


_STOCK = "grouped_mm,batched_mm"
_SIZES = "positive whole numbers such as 8,32"


@click.command("bench")
@click.option("--geometry", type=click.Choice(list(GEOMETRIES)), help="A published model's shape with random weights.")
@click.option("--model", "name", help=MODEL_HELP)
@click.option("--profile", type=click.Path(exists=True, dir_okay=False), help="Similarity profile; random without.")
@click.option("--layers", type=click.IntRange(min=2), help=_LAYERS)
@click.option("--what", default="gating,layer,decode", show_default=True, help="What to time.")
@click.option("--batch", type=Numbers(_size, _SIZES), default="8,32,64", show_default=True, help="Batch sizes.")
@click.option(
    "--select-top-k", type=Numbers(_size_or_k, _SIZES), default="K,2,1", show_default=True, help="S; K: no re-routing."
)
@click.option("--stock", help=f"Experts of transformers; {_STOCK}, and vllm where that is installed beside a GPU.")
@click.option("--json", "json_path", type=OutputFile(), help="File for the results.")
@click.option("--plot", "plot_path", type=Picture(), help="File for a plot: .png, .svg, .pdf.")
def bench_command(
    geometry: str | None,
    name: str | None,
    profile: str | None,
    layers: int | None,
    what: str,
    batch: list[int],
    select_top_k: list[int],
    stock: str | None,
    json_path: str | None,
    plot_path: str | None,
) -> None:
    """Time gating, Mixture-of-Experts layer and decode step of a model, stock against ours, on this machine.

    All variants take turns in one process, so that their ratios hold; on a GPU each is a CUDA graph. Outputs are
    compared first: where one disagrees, no speed-up is printed and the exit status is 1, as it is where something could
    not be measured.

    \b
    sere bench --geometry qwen3-30b-a3b --what decode --batch 16,32 --json bench.json
    sere bench --model qwen3 --what layer,decode --batch 16
    """  # noqa: D301
    from ..benchmark import vllm_experts
    from ..benchmark.run import KINDS, begin, run_bench
    from ..benchmark.subject import loaded_model, random_model
    from ..similarity.profile import SimilarityProfile

    kinds = list(dict.fromkeys(what.split(",")))
    if (geometry is None) == (name is None):
        raise click.UsageError("give either --geometry or --model")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise click.UsageError(f"--what: {unknown[0]!r} is none of {', '.join(KINDS)}")
    if profile is not None and name is None:
        raise click.UsageError("--profile is for --model")
    if layers is not None and geometry is None:
        raise click.UsageError("--layers is for --geometry; a model has a fixed number of layers")
    implementations = _experts(stock)
    try:
        if geometry is not None:
            subject = random_model(geometry, layers or (LAYERS if torch.cuda.is_available() else CPU_LAYERS))
        else:
            matrices = None if profile is None else SimilarityProfile.load(profile)
            subject = loaded_model(name, matrices)  # type: ignore[arg-type]
        results = begin(subject)
        if vllm_experts.NAME in implementations and (reason := vllm_experts.cannot_run(subject.model)):
            if stock is not None:
                raise SereError(f"--stock vllm: {reason}")
            implementations.remove(vllm_experts.NAME)
            results.notes.append(f"without vLLM's kernel: {reason}")
    except SereError as error:
        raise click.ClickException(str(error)) from error
    try:
        run_bench(results, subject, kinds, batch, select_top_k, implementations, lambda m: click.echo(m, err=True))
    finally:  # also if the run ended early: it may have taken hours
        _report(results, json_path, plot_path)
    if not results.is_sound:
        raise SystemExit(1)


def _experts(stock: str | None) -> list[str]:
    """Names of experts implementations, separated by commas, checked against those of transformers; or the default."""
    from ..benchmark import vllm_experts

    names = list(dict.fromkeys(name.strip() for name in (stock or _STOCK).split(",")))
    if stock is None and vllm_experts.is_at_hand():
        names.append(vllm_experts.NAME)
    try:
        (moe,) = require("hf", "transformers.integrations.moe", needed_for="sere bench needs")
        if vllm_experts.NAME in names:
            vllm_experts.register()
    except SereError as error:
        raise click.ClickException(str(error)) from error
    known = ["eager", *moe.ALL_EXPERTS_FUNCTIONS.valid_keys()]
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"--stock: {unknown[0]!r} is none of {', '.join(known)}")
    return names


def _report(results: Results, json_path: str | None, plot_path: str | None) -> None:
    from ..benchmark.plot import plot

    click.echo(results.table())  # first: a file can still fail, on a full disk
    try:
        if json_path is not None:
            results.save(json_path)
        if plot_path is not None and results.rows:
            plot(results, plot_path)
    except SereError as error:
        raise click.ClickException(str(error)) from error
