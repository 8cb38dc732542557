"""The `sere` command: one file per sub-command, imported when that sub-command is asked for."""

from __future__ import annotations

import difflib
import importlib

import click

# Name, and the line that `sere --help` prints: known without importing the file.
COMMANDS = {
    "bench": "Time gating, Mixture-of-Experts layer and decode step, stock against ours, on this machine.",
    "calibrate": "Measure how alike the experts of every gate are, on text or without data.",
    "compare": "Compare quality and active experts of re-routing and every other rule, on your model and text.",
    "demo": "Decode with a small trained model that comes with the package, unchanged and re-routed.",
    "eval": "Perplexity, divergence from the original and active experts under re-routing, as in decoding.",
    "explain": "Print every gate of a model, what re-routing would do to it, and why not.",
    "export": "Write a model with its gates re-routed.",
    "plot": "Draw a similarity profile, or the table of a sweep.",
    "report": "Gates, similarity, loss and expected speed of a model, and the recommended setting, as one page.",
    "serve-bench": "Time per output token in vLLM with and without re-routing, and what it costs on your text.",
    "sweep": "S x threshold x substitution x batch as a table, and the setting that a quality budget allows.",
}


class LazyGroup(click.Group):
    """A group that imports `commands/NAME.py` for its `NAME_command` when NAME is used; - is _ there."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The sub-command, imported now."""
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        return getattr(importlib.import_module(f"{__name__}.{name}"), f"{name}_command")

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, but an error names the nearest command."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if not near or "Did you mean" in error.message:
                raise
            raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Names with their lines; imports nothing."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))
