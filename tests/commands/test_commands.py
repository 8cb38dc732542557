"""The `sere` command itself: what every help page has, and what a misspelt sub-command is told."""

import pytest
from click.testing import CliRunner

from sere_compile.cli import main
from sere_compile.commands import COMMANDS
from sere_compile.integrations.transformers import KINDS

from ..thinned import thinned
from .checkpoint import sere


def test_a_misspelt_command_names_the_nearest():
    result = CliRunner().invoke(main, ["calibrat"])
    assert result.exit_code == 2
    assert result.output.count("'calibrat'") == 1
    assert "Did you mean" in result.output
    assert "calibrate" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    """And names the package's models, where a model can be given."""
    text = CliRunner().invoke(main, [command, "--help"]).output
    assert f"\n  sere {command} " in text
    if "--model" in text:
        assert all(kind in text for kind in KINDS)


@pytest.mark.parametrize("command", thinned(["eval", "compare", "sweep", "report"], (0, 1)))
def test_progress_is_shown(checkpoint, command, tmp_path):
    """On standard error, as by `sere calibrate`; what a command prints stays as it is."""
    more = ["-o", tmp_path / "report.html"] if command == "report" else []
    result = sere(checkpoint, command, "--batch", 4, "--select-top-k", 1, *more)
    assert result.exit_code == 0, result.output
    assert "evaluating, decode batch 4: 100%" in result.stderr
    assert "evaluating" not in result.stdout
