"""`sere plot`."""

from __future__ import annotations

from dataclasses import fields

import pytest
from click.testing import CliRunner

from sere_compile.cli import main
from sere_compile.evaluation.sweep import SweepRow


@pytest.mark.parametrize("content", ["", ",".join(field.name for field in fields(SweepRow)) + "\n"])
def test_a_table_without_rows_is_no_picture(tmp_path, content):
    """And replaces none."""
    pytest.importorskip("matplotlib")
    table, out = tmp_path / "sweep.csv", tmp_path / "sweep.png"
    table.write_text(content)
    out.write_bytes(b"old")
    result = CliRunner().invoke(main, ["plot", str(table), "-o", str(out)])
    assert result.exit_code == 1
    assert f"{table} has no rows" in result.output
    assert out.read_bytes() == b"old"


def test_plots_are_written(checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    heat = tmp_path / "heat.png"
    arguments = ["plot", checkpoint / "profile.safetensors", "-o", heat, "--threshold", "q0.4"]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert heat.read_bytes().startswith(b"\x89PNG")


def test_another_kind_of_file_is_named(tmp_path):
    """By its own name, not as a profile that cannot be read."""
    source = tmp_path / "empty.txt"
    source.touch()
    result = CliRunner().invoke(main, ["plot", str(source), "-o", str(tmp_path / "p.png")])
    assert result.exit_code == 2
    assert "empty.txt is neither a .safetensors file of `sere calibrate` nor" in result.output
