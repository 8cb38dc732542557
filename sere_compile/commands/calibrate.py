"""`sere calibrate`: a similarity profile of a model, from text or without data."""

from __future__ import annotations

from typing import Any

import click

from ..calibration.calibrate import MAX_SEED, calibrate
from ..errors import SereError
from ..evaluation.text import mixed_windows
from ..experts.metrics import CkaAccumulator
from ..integrations.transformers import load_causal_lm
from ..similarity.profile import SimilarityProfile
from .options import MODEL_HELP, names_of
from .output_file import OutputFile, ProfileFile


@click.command("calibrate")
@click.option("--model", "name", required=True, help=MODEL_HELP)
@click.option(
    "--data",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="Text: .txt, .jsonl, .parquet; any number of files, in equal shares. Data-free without it.",
)
@click.option("--out", required=True, type=ProfileFile(), help="File to write, .safetensors.")
@click.option("--field", default="text", show_default=True, help="Field or column that holds the text.")
@click.option("--length", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens per sequence.")
@click.option("--sequences", type=click.IntRange(min=1), default=400, show_default=True, help="Number of sequences.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Sequences per forward.")
@click.option("--method", type=click.Choice(["frobenius", "cosine", "cka"]), default="frobenius", show_default=True)
@click.option(
    "--kernel", type=click.Choice(CkaAccumulator.KERNELS), default="linear", show_default=True, help="Kernel of CKA."
)
@click.option("--chunk", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens compared at once.")
@click.option(
    "--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True, help="Seed of data-free calibration."
)
@click.option("--resume", type=OutputFile(), help="File that keeps the progress; an interrupted run continues from it.")
@click.option("--dtype", default="auto", show_default=True, help="Dtype of the weights: float32, bfloat16, ...")
def calibrate_command(
    name: str,
    data: tuple[str, ...],
    out: str,
    field: str,
    length: int,
    sequences: int,
    batch: int,
    dtype: str,
    **options: Any,
) -> None:
    """Measure how alike the experts of every gate are, on the same tokens, in one pass.

    \b
    sere calibrate --model qwen3 --data text.jsonl --out profile.safetensors --resume state
    sere calibrate --model qwen3 --out profile.safetensors
    """  # noqa: D301
    if not data and options["resume"] is not None:
        raise click.UsageError("--resume is for calibration on --data")
    try:
        model, tokenizer = load_causal_lm(name, dtype=dtype)
        batches = None
        if data:
            rows = mixed_windows(tokenizer, data, field, length, sequences)
            batches = [{"input_ids": part} for part in rows.split(batch)]
        profile = calibrate(model, batches, max_tokens=length * sequences if data else None, **options)
        known = {**profile.metadata, **names_of(name, data, sequences, length)}
        profile = SimilarityProfile(dict(profile), known, profile.projections)
        profile.save(out)
    except SereError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {profile!r}")
