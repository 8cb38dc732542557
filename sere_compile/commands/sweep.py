"""`sere sweep`: choose the options by what they cost on your text at your batch size."""

from __future__ import annotations

import json
import math
from typing import Any

import click
import torch

from ..benchmark.expected_speed import StepTimes
from ..config import SUBSTITUTIONS, SereConfig
from ..errors import SereError
from ..evaluation.pareto_plot import plot_sweep
from ..evaluation.recommendation import least_losing, recommend, say_least_losing, undecided
from ..evaluation.sweep import (
    GateSettings,
    SweepRow,
    format_table,
    settings,
    spend_budget,
    sweep,
    write_csv,
)
from ..similarity.attach import attach
from ..similarity.profile import SimilarityProfile
from .options import (
    Numbers,
    counts,
    data_options,
    load_subject,
    min_active_option,
    names_of,
    number_or_share,
    per_gate_option,
    speed_option,
)
from .output_file import OutputFile, Picture


@click.command("sweep")
@data_options
@click.option("--profile", required=True, type=click.Path(dir_okay=False), help="Similarity profile.")
@click.option("--select-top-k", type=Numbers(int, none=True), default="1,2,3", show_default=True, help="Values of S.")
@click.option(
    "--max-active", type=Numbers(int, none=True), default="", help="Budgets of primary experts (S = auto), besides S."
)
@click.option("--threshold", type=Numbers(number_or_share), default="0", show_default=True, help="rho: 0,0.3,q0.2.")
@click.option(
    "--substitution",
    type=click.Choice([*SUBSTITUTIONS, "both", "all"]),
    default="reroute",
    show_default=True,
    help="What becomes of a lost slot and its weight; both: reroute and projection. fill mostly loses least.",
)
@min_active_option
@per_gate_option
@click.option("--batch", type=counts, default="4,16,64", show_default=True, help="Sequences decoded together.")
@click.option("--budget", type=float, default=1.0, show_default=True, help="Allowed growth of perplexity, in percent.")
@click.option("--csv", "csv_path", type=OutputFile(), help="File for the table.")
@click.option("--plot", "plot_path", type=Picture(), help="File for the Pareto plot.")
@speed_option
@click.option("--per-layer", is_flag=True, help="Spend the budget gate by gate, at the first batch size.")
def sweep_command(
    name: str, data: tuple[str, ...], field: str, length: int, sequences: int, dtype: str, profile: str,
    select_top_k: list[int], max_active: list[int], threshold: list[float | str], substitution: str,
    min_active: int | None, per_gate: Any, batch: list[int], budget: float,
    csv_path: str | None, plot_path: str | None, speed: str | None, per_layer: bool,
) -> None:  # fmt: skip
    """S x threshold x substitution x batch as a table, and the setting that a quality budget allows.

    A setting is recommended if its perplexity is within the budget with 95 % confidence: the one with the fewest active
    experts, which is the fastest, and of those with about as few the one that loses least. With --speed, each has the
    time of a decode step that the measurements of sere bench let expect. With --per-layer, options are printed as JSON
    on standard output, and all else on standard error.

    \b
    sere sweep --model qwen3 --data text.jsonl --profile profile.safetensors --select-top-k 1,2,3 --budget 1
    sere bench --model qwen3 --what decode --batch 16 --select-top-k K,2,1 --json bench.json
    sere sweep --model qwen3 --data text.jsonl --profile profile.safetensors --batch 16 --substitution all \\
        --speed bench.json
    """  # noqa: D301
    several = {"both": ("reroute", "projection"), "all": SUBSTITUTIONS}
    substitutions = several.get(substitution, (substitution,))
    if per_layer and (len(threshold) > 1 or len(substitutions) > 1 or max_active or csv_path or plot_path or speed):
        raise click.UsageError(
            "--per-layer takes one --threshold and one --substitution, and neither --max-active, --csv, --plot nor "
            "--speed"
        )
    if not select_top_k and (per_layer or not max_active):
        raise click.UsageError("--select-top-k is empty" + ("" if per_layer else ", and so is --max-active"))
    if math.isnan(budget):
        raise click.UsageError("--budget is nan; give a percentage")
    try:
        config = SereConfig(min_active=min_active, per_gate=per_gate)
        configs = settings(select_top_k, max_active, threshold, substitutions, config)
        times = None if speed is None else StepTimes.read(speed, batch)
        matrices = SimilarityProfile.load(profile)
        model, _, tokens = load_subject(name, data, field, length, sequences, dtype)
        attach(model, matrices)  # raises if it does not fit the model
        if times is not None:
            times.check(model)
        if per_layer:
            config = config.replace(threshold=threshold[0], substitution=substitution)
            _per_layer(model, matrices, tokens, select_top_k, batch[0], budget, config)
            return
        names = names_of(name, data, sequences, length)
        rows = [row.named(**names) for row in sweep(model, tokens, matrices, configs, batch, progress=True)]
        rows = rows if times is None else [times.of(row) for row in rows]
        click.echo(format_table(rows))
        for line in [] if times is None else times.said(name, rows):
            click.echo(line)
        _recommend(rows, budget)
        if csv_path is not None:
            write_csv(rows, csv_path)
        if plot_path is not None:
            plot_sweep(rows, plot_path)
    except SereError as error:
        raise click.ClickException(str(error)) from error


def _recommend(rows: list[SweepRow], budget: float) -> None:
    open_ones = undecided(rows, budget / 100)
    for size, row in recommend(rows, budget / 100).items():
        if row is None:
            click.echo(f"decode batch {size}: no setting is shown to stay within {budget:g} % perplexity")
        else:
            speed = f", expected {row.speed}" if row.speed else ""
            click.echo(
                f"decode batch {size}: options={row.options} for at most {budget:g} % perplexity "
                f"({row.perplexity_change:+.2%}, with 95 % confidence below {row.upper_bound:+.2%}, active experts "
                f"{row.active_before:.1f} -> {row.active_after:.1f}{speed})"
            )
        if size in open_ones:
            better, needed = open_ones[size]
            noise = "" if math.isnan(better.standard_error) else f" ± {better.standard_error:.2%}"
            click.echo(
                f"decode batch {size}: too few data for options={better.options}, {better.perplexity_change:+.2%}"
                f"{noise} on {better.decode_batches} decoding batches, active experts {better.active_after:.1f}: about "
                f"--sequences {needed} would decide"
            )
    for size, pairs in least_losing(rows).items():
        if pairs:
            click.echo(f"decode batch {size}, least lost by {say_least_losing(pairs)}")


def _per_layer(
    model: Any,
    profile: SimilarityProfile,
    tokens: torch.Tensor,
    select_top_k: list[int],
    batch: int,
    budget: float,
    config: SereConfig,
) -> None:
    def say(settings: GateSettings) -> None:
        click.echo(
            f"{settings.result.perplexity_change:+.2%}  {settings.result.mean_active_after:.1f} active", err=True
        )

    done = spend_budget(
        model, tokens, profile,
        budget=budget / 100, select_top_k=select_top_k, decode_batch=batch, config=config, on_step=say,
        progress=True,
    )  # fmt: skip
    click.echo(f"{done.result}; with 95 % confidence below {done.result.upper_bound:+.2%}", err=True)
    given = {"threshold": config.threshold, "substitution": config.substitution}
    others = {name: value for name, value in given.items() if value != getattr(SereConfig(), name)}
    click.echo(json.dumps({**done.options(), **others}, indent=1))
    untouched = [name for name in profile if name not in done.select_top_k]
    if untouched:
        click.echo(f"left as they are: {', '.join(untouched)}", err=True)
