"""The `sere` command."""

from __future__ import annotations

import click

from .commands import LazyGroup
from .commands.foreign_warnings import silenced


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sere-compile")
@click.pass_context
def main(context: click.Context) -> None:
    """Similarity-based expert re-routing for Mixture-of-Experts models.

    \b
    sere demo                           # a small model that comes with the package
    sere explain --model qwen3          # what would be done to a model
    sere report --model qwen3 --data text.txt -o report.html
    """  # noqa: D301
    context.with_resource(silenced())
