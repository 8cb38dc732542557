"""`sere eval`: what re-routing costs in quality, as decoding would see it."""

from __future__ import annotations

from typing import Any

import click

from ..errors import SereError
from ..evaluation import evaluate
from .options import data_options, load_subject


@click.command("eval")
@data_options
@click.option("--select-top-k", type=int, help="S; min(2, K-1) by default.")
@click.option("--threshold", type=float, default=0.0, show_default=True, help="rho.")
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Sequences decoded together.")
def eval_command(
    select_top_k: int | None, threshold: float, batch: int, min_active: int | None, **subject: Any
) -> None:
    """Perplexity, divergence from the original and active experts; every position of a batch is routed by itself."""
    try:
        model, profile, tokens = load_subject(**subject)
        result = evaluate(
            model, tokens, profile=profile, decode_batch=batch,
            select_top_k=select_top_k, threshold=threshold, min_active=min_active,
        )  # fmt: skip
    except SereError as error:
        raise click.ClickException(str(error)) from error
    click.echo(str(result))
    for gate, after in result.active_after.items():
        click.echo(f"  {gate}: active experts {result.active_before[gate]:.1f} -> {after:.1f}")
