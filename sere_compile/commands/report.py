"""`sere report`: everything about a model under re-routing on one page."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from ..benchmark.subject import dense_bytes, find_blocks
from ..calibration.calibrate import calibrate
from ..config import SUBSTITUTIONS, SereConfig
from ..errors import SereError
from ..evaluation.charts import plotly_javascript
from ..evaluation.html_report import Contents, write_report
from ..evaluation.sweep import SweepRow, settings, sweep
from ..explain import explain
from ..similarity.attach import attach
from ..similarity.profile import SimilarityProfile
from .options import Numbers, counts, data_options, load_subject, names_of
from .output_file import OutputFile


@click.command("report")
@data_options
@click.option("-o", "--out", required=True, type=OutputFile(), help="Page to write, .html.")
@click.option("--profile", type=click.Path(dir_okay=False), help="Similarity profile; without one, made without data.")
@click.option("--select-top-k", type=Numbers(int), default="1,2,3", show_default=True, help="Values of S.")
@click.option("--batch", type=counts, default="4,16", show_default=True, help="Sequences decoded together.")
@click.option("--budget", type=float, default=1.0, show_default=True, help="Allowed growth of perplexity, in percent.")
def report_command(
    name: str, data: tuple[str, ...], field: str, length: int, sequences: int, dtype: str,
    out: str, profile: str | None, select_top_k: list[int], batch: list[int], budget: float,
) -> None:  # fmt: skip
    """Gates, similarity, loss and expected speed of every rule and S, and the recommended setting, as one page.

    The page opens without a network.

    \b
    sere report --model qwen3 --data text.jsonl -o report.html
    """  # noqa: D301
    try:
        plotly_javascript()  # raises before hours of work
        given = None if profile is None else SimilarityProfile.load(profile)
        model, _, tokens = load_subject(name, data, field, length, sequences, dtype)
        names = names_of(name, data, sequences, length)
        matrices = calibrate(model, None) if given is None else given
        attach(model, matrices)  # raises if it does not fit the model
        gates = explain(model, input_ids=tokens[:2].to(model.device), use_cache=False)
        configs = settings(select_top_k, substitutions=SUBSTITUTIONS, config=SereConfig())
        rows = sweep(model, tokens, matrices, configs, batch, progress=True)
        contents = Contents(
            gates=gates, profile=matrices, rows=rows, budget=budget / 100,
            profile_file="" if profile is None else Path(profile).name, speedup=expected_speedup(model),
            made_by=f"sere-compile {importlib.metadata.version('sere-compile')}, torch {torch.__version__}", **names,
        )  # fmt: skip
        write_report(contents, out)
    except SereError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {len(contents.rows)} settings of {contents.model}")


def expected_speedup(model: Any) -> Callable[[SweepRow], float] | None:
    """What a decode step gains whose time follows the bytes of weights that it reads; None if experts are not found."""
    blocks = tuple(find_blocks(model))
    if not blocks:
        return None
    rest, expert = dense_bytes(model, blocks), sum(block.expert_bytes for block in blocks)
    return lambda row: (rest + row.active_before * expert) / (rest + row.active_after * expert)
