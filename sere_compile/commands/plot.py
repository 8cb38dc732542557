"""`sere plot`: a similarity profile, or the table of a sweep, as a picture."""

from __future__ import annotations

from pathlib import Path

import click

from ..config import SereConfig
from ..errors import SereError
from ..evaluation.heat_maps import plot_profile
from ..evaluation.pareto_plot import plot_sweep
from ..evaluation.sweep import read_csv
from ..similarity.profile import SimilarityProfile
from .options import number_or_share
from .output_file import Picture


@click.command("plot")
@click.argument("source", type=click.Path(exists=True, dir_okay=False))
@click.option("-o", "--out", required=True, type=Picture(), help="Picture to write: .png, .svg, .pdf.")
@click.option(
    "--threshold",
    type=number_or_share,
    default="q0.2",
    show_default=True,
    help="Mark experts that are always critical at this rho, a number or a share.",
)
def plot_command(source: str, out: str, threshold: float | str) -> None:
    """Draw SOURCE: heat maps of a profile (.safetensors), or quality against active experts (.csv of `sere sweep`).

    Of a profile with more than 12 gates: an overview, and pages of heat maps beside it.

    \b
    sere plot profile.safetensors -o heat.png
    sere plot sweep.csv -o pareto.svg
    """  # noqa: D301
    if Path(source).suffix not in (".csv", ".safetensors"):
        raise click.UsageError(
            f"{source} is neither a .safetensors file of `sere calibrate` nor a .csv file of `sere sweep` or "
            "`sere compare`"
        )
    try:
        SereConfig(threshold=threshold)  # raises if it is wrong
        if Path(source).suffix == ".csv":
            rows = read_csv(source)
            plot_sweep(rows, out)
            click.echo(f"{out}: {len(rows)} settings")
            return
        profile = SimilarityProfile.load(source)
        written = plot_profile(profile, out, threshold)
        if len(written) > 1:
            click.echo(f"{written[0]}: all gates; {written[1]} .. {written[-1].name}: their maps")
        else:
            click.echo(f"{out}: {len(profile)} gates")
    except SereError as error:
        raise click.ClickException(str(error)) from error
