"""The `sere` command."""

from __future__ import annotations

import click

from .commands import LazyGroup


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sere-compile")
def main() -> None:
    """Similarity-based expert re-routing for Mixture-of-Experts models."""
