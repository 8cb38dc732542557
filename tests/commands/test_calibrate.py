"""`sere calibrate` on a model that is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import sere_compile
from sere_compile import SimilarityProfile
from sere_compile.cli import main

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

MODEL = Path(sere_compile.__file__).parent / "models" / "mixtral"


def sere(*arguments):
    return CliRunner().invoke(main, ["calibrate", "--model", str(MODEL), *map(str, arguments)])


def test_text_to_profile(tmp_path):
    """A profile of every gate, with projections; the resume file is written beside it, and goes on."""
    text, out, state = tmp_path / "t.txt", tmp_path / "p.safetensors", tmp_path / "state"
    text.write_text("It is a truth universally acknowledged, that a single man. " * 40)
    options = ["--data", text, "--length", 16, "--sequences", 4, "--batch", 2, "--out", out, "--resume", state]
    result = sere(*options)
    assert result.exit_code == 0, result.output
    profile = SimilarityProfile.load(out)
    assert len(profile) == len(profile.projections) == 4
    assert profile.metadata["tokens"] == "64"
    assert (profile.metadata["model"], profile.metadata["data"]) == ("mixtral", "t.txt, 4 x 16 tokens")
    assert "4 gates, 8 experts, frobenius, 64 tokens, with projections" in result.output
    again = sere(*options)
    assert again.exit_code == 0, again.output
    assert SimilarityProfile.load(out) == profile


def test_without_data(tmp_path):
    """Data-free, which needs no tokenizer and no text."""
    result = sere("--out", tmp_path / "p.safetensors", "--seed", 3)
    assert result.exit_code == 0, result.output
    assert SimilarityProfile.load(tmp_path / "p.safetensors").metadata["seed"] == "3"


def test_a_full_disk_is_one_line(tmp_path, no_room):
    """And an earlier profile is as it was."""
    out = tmp_path / "p.safetensors"
    out.write_bytes(b"old")
    with no_room():
        result = sere("--out", out)
    assert result.exit_code == 1
    assert f"Error: {out} could not be written: File too large" in result.output
    assert out.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "no/such/folder/p"], "Invalid value for '--out': there is no folder"),
        (["--out", "p.pt"], "'p.pt': profiles are .safetensors files"),
        (["--out", "p", "--resume", "state"], "--resume is for calibration on --data"),
        (["--out", "p", "--seed", "9" * 23], "Invalid value for '--seed'"),
        (["--out", "p", "--dtype", "float8_e4m3fn"], "of 16 bits or more such as bfloat16, got 'float8_e4m3fn'"),
        (["--out", "p", "--data", "none.txt"], "no such file: none.txt"),
        (["--out", "p", "--method", "cosine", "--kernel", "rbf"], "kernel='rbf' is for method=\"cka\""),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    """No traceback."""
    monkeypatch.chdir(tmp_path)
    result = sere(*arguments)
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output
