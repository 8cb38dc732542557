"""`sere plot`."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from click.testing import CliRunner

from sere_compile import SimilarityProfile
from sere_compile.cli import main
from sere_compile.evaluation.sweep import SweepRow, read_csv

from .checkpoint import sere


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
    assert result.output == f"{heat}: {len(SimilarityProfile.load(checkpoint / 'profile.safetensors'))} gates\n"


def test_another_kind_of_file_is_named(tmp_path):
    """By its own name, not as a profile that cannot be read."""
    source = tmp_path / "empty.txt"
    source.touch()
    result = CliRunner().invoke(main, ["plot", str(source), "-o", str(tmp_path / "p.png")])
    assert result.exit_code == 2
    assert "empty.txt is neither a .safetensors file of `sere calibrate` nor" in result.output


def test_tables_and_profiles_say_of_what_they_are(checkpoint, tmp_path):
    """Model and text reach the title, of a sweep through its table."""
    pytest.importorskip("matplotlib")
    table, out = tmp_path / "sweep.csv", tmp_path / "p.svg"
    result = sere(checkpoint, "sweep", "--batch", 4, "--select-top-k", 1, "--csv", table)
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(main, ["plot", str(table), "-o", str(out)])
    assert result.exit_code == 0, result.output
    [row] = read_csv(table)
    assert (row.model, row.data) == ("model", "text.jsonl, 8 x 6 tokens")
    assert "quality against active experts  |  model  |  text.jsonl, 8 x 6 tokens" in out.read_text()


@pytest.mark.slow
def test_pages_of_many_gates_are_named(tmp_path):
    pytest.importorskip("matplotlib")
    many = SimilarityProfile({f"layers.{number}.gate": torch.eye(2) for number in range(13)})
    many.save(tmp_path / "p.safetensors")
    result = CliRunner().invoke(main, ["plot", str(tmp_path / "p.safetensors"), "-o", str(tmp_path / "p.png")])
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}/p.png: all gates; {tmp_path}/p-1.png .. p-2.png: their maps" in result.output
