"""`sere explain`: the gates of a model."""

from __future__ import annotations

from typing import Any

import click

from ..config import SereConfig
from ..errors import SereError
from ..evaluation.text import require_tokens
from ..explain import explain
from ..integrations.transformers import load_causal_lm
from ..report import SKIPPED
from ..similarity.attach import attach
from ..similarity.profile import SimilarityProfile
from .options import MODEL_HELP, routing_options


@click.command("explain")
@click.option("--model", "name", required=True, help=MODEL_HELP)
@click.option("--prompt", default="The capital of France is", show_default=True, help="Text to trace the model with.")
@routing_options
@click.option(
    "--strict", is_flag=True, help="Exit with 1 where a gate is not re-routed, too: what strict=True raises for."
)
@click.option("--profile", type=click.Path(exists=True, dir_okay=False), help="Similarity profile to attach.")
def explain_command(name: str, prompt: str, profile: str | None, **options: Any) -> None:
    """Print every gate of a model, what re-routing would do to it, and why not. Exits with 1 if none is found.

    \b
    sere explain --model qwen3 --select-top-k 1
    """  # noqa: D301
    if not prompt:
        raise click.UsageError("--prompt is empty; give a text of a word or more")
    try:
        config = SereConfig(**options)
        model, tokenizer = load_causal_lm(name)
        if profile is not None:
            attach(model, SimilarityProfile.load(profile))
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        require_tokens(tokenizer, inputs["input_ids"].tolist())
        report = explain(model, **inputs, use_cache=False, config=config)
    except SereError as error:
        raise click.ClickException(str(error)) from error
    click.echo(str(report))
    if not report.gates or (config.strict and any(gate.status == SKIPPED for gate in report.gates)):
        raise SystemExit(1)
