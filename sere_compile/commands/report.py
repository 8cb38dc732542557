"""`sere report`: everything about a model under re-routing on one page."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import click
import torch

from ..benchmark.expected_speed import StepTimes, speedup_by_bytes
from ..calibration.calibrate import calibrate
from ..config import SUBSTITUTIONS, SereConfig
from ..errors import SereError
from ..evaluation.charts import plotly_javascript
from ..evaluation.html_report import Contents, write_report
from ..evaluation.sweep import settings, sweep
from ..explain import explain
from ..similarity.attach import attach
from ..similarity.profile import SimilarityProfile
from .options import Numbers, counts, data_options, load_subject, names_of, speed_option
from .output_file import Page


@click.command("report")
@data_options
@click.option("-o", "--out", required=True, type=Page(), help="Page to write, .html.")
@click.option("--profile", type=click.Path(dir_okay=False), help="Similarity profile; without one, made without data.")
@click.option("--select-top-k", type=Numbers(int), default="1,2,3", show_default=True, help="Values of S.")
@click.option("--batch", type=counts, default="4,16", show_default=True, help="Sequences decoded together.")
@click.option("--budget", type=float, default=1.0, show_default=True, help="Allowed growth of perplexity, in percent.")
@speed_option
def report_command(
    name: str, data: tuple[str, ...], field: str, length: int, sequences: int, dtype: str,
    out: str, profile: str | None, select_top_k: list[int], batch: list[int], budget: float,
    speed: str | None,
) -> None:  # fmt: skip
    """Gates, similarity, loss and expected speed of every rule and S, and the recommended setting, as one page.

    The page opens without a network.

    \b
    sere report --model qwen3 --data text.jsonl -o report.html
    """  # noqa: D301
    try:
        plotly_javascript()  # raises before hours of work
        times = None if speed is None else StepTimes.read(speed, batch)
        given = None if profile is None else SimilarityProfile.load(profile)
        model, _, tokens = load_subject(name, data, field, length, sequences, dtype)
        names = names_of(name, data, sequences, length)
        matrices = calibrate(model, None) if given is None else given
        attach(model, matrices)  # raises if it does not fit the model
        if times is not None:
            times.check(model)
        gates = explain(model, input_ids=tokens[:2].to(model.device), use_cache=False)
        configs = settings(select_top_k, substitutions=SUBSTITUTIONS, config=SereConfig())
        rows = sweep(model, tokens, matrices, configs, batch, progress=True)
        rows = rows if times is None else [times.of(row) for row in rows]
        contents = Contents(
            gates=gates, profile=matrices, rows=rows, budget=budget / 100,
            profile_file="" if profile is None else Path(profile).name,
            speedup=speedup_by_bytes(model) if times is None else lambda row: row.speedup or 1.0,
            speed_source=() if times is None else times.said(name, rows),
            made_by=f"sere-compile {importlib.metadata.version('sere-compile')}, torch {torch.__version__}", **names,
        )  # fmt: skip
        write_report(contents, out)
    except SereError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {len(contents.rows)} settings of {contents.model}")
