"""Warnings about other libraries' own code are silent in the command, all others are not."""

from __future__ import annotations

import logging
import sys
import warnings

import click
import pytest
from click.testing import CliRunner

from sere_compile import cli
from sere_compile.commands.foreign_warnings import LOGGED, silenced

CACHE = "Dynamo detected a call to a `functools.lru_cache`-wrapped function at 'moe.py:325'. Dynamo ignores ..."
LEAF = "`isinstance(treespec, LeafSpec)` is deprecated, use ..."


@pytest.fixture(autouse=True)
def no_options(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", [])


def warned():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with silenced():
            for message in (CACHE, LEAF, "something else"):
                warnings.warn(message, UserWarning, stacklevel=1)
    return [str(warning.message) for warning in found]


def test_what_says_nothing_to_the_user_is_silent():
    assert warned() == ["something else"]


def test_whoever_asks_for_warnings_gets_them(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    assert warned() == [CACHE, LEAF, "something else"]


def test_lines_of_logs(caplog):
    """Within the block only."""
    [name] = LOGGED
    log = logging.getLogger(name)
    with silenced():
        log.warning("torchvision is not installed. Skipping %s", "torchvision::nms")
        log.warning("another line")
    log.warning("torchvision is not installed. Skipping %s", "torchvision::roi_pool")
    assert [record.getMessage() for record in caplog.records] == [
        "another line",
        "torchvision is not installed. Skipping torchvision::roi_pool",
    ]


def test_every_command_runs_so(monkeypatch):
    """And what follows it does not."""

    @click.command("plot")
    def command():
        warnings.warn(CACHE, UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)

    monkeypatch.setattr("sere_compile.commands.plot.plot_command", command)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert CliRunner().invoke(cli.main, ["plot"]).exit_code == 0
        warnings.warn(LEAF, UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in found] == ["something else", LEAF]
