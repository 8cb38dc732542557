"""`sere compare`: re-routing and every other rule, on your model and text."""

from __future__ import annotations

from pathlib import Path

import click

from ..config import SereConfig
from ..errors import SereError
from ..evaluation import evaluate_rules
from ..evaluation.comparison import calibrated_profiles, comparison_rules, named_rule
from ..evaluation.sweep import SweepRow, format_table, whole_batches, write_csv
from ..evaluation.text import mixed_windows
from ..similarity.attach import attach
from ..similarity.profile import SimilarityProfile
from .options import Numbers, counts, data_options, load_subject, names_of, number_or_share, some_numbers
from .output_file import OutputFile


@click.command("compare")
@data_options
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="Similarity profile, any number of them; rows are named after the files, random matrices take the first.",
)
@click.option(
    "--calibrate-on",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="Text from which a profile of every metric is made, and one without data; instead of --profile.",
)
@click.option(
    "--calibration-sequences",
    type=click.IntRange(min=1),
    default=400,
    show_default=True,
    help="Sequences of --calibrate-on.",
)
@click.option("--select-top-k", type=counts, default="1,2", show_default=True, help="Values of S.")
@click.option("--threshold", type=Numbers(number_or_share), default="0", show_default=True, help="rho: 0,0.3,q0.2.")
@click.option("--batch", type=counts, default="16", show_default=True, help="Sequences decoded together.")
@click.option("--fill", type=some_numbers, default="0.75", show_default=True, help="Option of the rule `recombine`.")
@click.option("--restore", type=some_numbers, default="0.5", show_default=True, help="Option of the rule `recombine`.")
@click.option("--rule", "others", multiple=True, help="MODULE:FUNCTION that makes a rule from (profile, S).")
@click.option("--csv", "csv_path", type=OutputFile(), help="File for the table.")
def compare_command(
    name: str, data: tuple[str, ...], field: str, length: int, sequences: int, dtype: str, profiles: tuple[str, ...],
    calibrate_on: tuple[str, ...], calibration_sequences: int, select_top_k: list[int], threshold: list[float | str],
    batch: list[int], fill: list[float], restore: list[float], others: tuple[str, ...], csv_path: str | None,
) -> None:  # fmt: skip
    """Compare naive top-S, drop, fill, re-routing by profiles and by random matrices, and recombining.

    Printed are quality and active experts of each.

    \b
    sere compare --model qwen3 --data text.jsonl --calibrate-on other.jsonl --select-top-k 1,2 --csv rules.csv
    """  # noqa: D301
    if bool(profiles) == bool(calibrate_on):
        raise click.UsageError("give either --profile or --calibrate-on")
    try:
        for rho in threshold:
            SereConfig(threshold=rho)  # before a model is loaded
        own = {spec: named_rule(spec) for spec in others}
        loaded = {Path(path).stem: SimilarityProfile.load(path) for path in profiles}
        if len(loaded) < len(profiles):
            raise click.UsageError("--profile: rows are named by files, and two of these have the same name")
        model, tokenizer, tokens = load_subject(name, data, field, length, sequences, dtype)
        if calibrate_on:
            train = mixed_windows(tokenizer, calibrate_on, field, length, calibration_sequences)
            loaded = calibrated_profiles(model, train)
        for profile in loaded.values():
            attach(model, profile)  # raises if it does not fit the model
        rules = comparison_rules(
            loaded, reference=next(iter(loaded)), select_top_k=select_top_k, thresholds=threshold,
            fills=fill, restores=restore, others=own,
        )  # fmt: skip
        rows, names = [], names_of(name, data, sequences, length)
        for size in batch:
            some = whole_batches(tokens, size)
            for setting, result in evaluate_rules(model, some, rules, decode_batch=size, progress=True).items():
                config = SereConfig(select_top_k=setting.select_top_k, threshold=setting.threshold)
                row = SweepRow.of(config, result, setting.rule, setting.similarity_name)
                rows.append(row.named(**names))
        click.echo(format_table(rows))
        if csv_path is not None:
            write_csv(rows, csv_path)
    except SereError as error:
        raise click.ClickException(str(error)) from error
