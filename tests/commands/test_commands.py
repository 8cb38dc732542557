"""The `sere` command itself: what every help page has, and what a misspelt sub-command is told."""

import pytest
from click.testing import CliRunner

from sere_compile.cli import main
from sere_compile.commands import COMMANDS
from sere_compile.integrations.transformers import KINDS


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
