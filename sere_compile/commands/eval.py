"""`sere eval`: what re-routing costs in quality when decoding."""

from __future__ import annotations

from typing import Any

import click

from ..config import SereConfig
from ..errors import SereError
from ..evaluation import evaluate
from ..similarity.attach import attach
from ..similarity.profile import SimilarityProfile
from .options import data_options, load_subject, routing_options


@click.command("eval")
@data_options
@click.option("--profile", required=True, type=click.Path(dir_okay=False), help="Similarity profile.")
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Sequences decoded together.")
@routing_options
def eval_command(
    name: str, data: tuple[str, ...], field: str, length: int, sequences: int, dtype: str,
    profile: str, batch: int, **options: Any,
) -> None:  # fmt: skip
    """Perplexity, divergence from the original and active experts; every position of a batch is routed on its own.

    \b
    sere eval --model qwen3 --data text.jsonl --profile profile.safetensors --select-top-k 1 --batch 16
    """  # noqa: D301
    try:
        SereConfig(**options)  # before a model is loaded
        matrices = SimilarityProfile.load(profile)
        model, _, tokens = load_subject(name, data, field, length, sequences, dtype)
        attach(model, matrices)  # raises if it does not fit the model
        result = evaluate(model, tokens, profile=matrices, decode_batch=batch, progress=True, **options)
    except SereError as error:
        raise click.ClickException(str(error)) from error
    click.echo(str(result))
    for line in result.beyond_perplexity():
        click.echo(f"  {line}")
    for gate, after in result.active_after.items():
        click.echo(f"  {gate}: active experts {result.active_before[gate]:.1f} -> {after:.1f}")
