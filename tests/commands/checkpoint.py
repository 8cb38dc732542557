"""A checkpoint with tokenizer, text and profile, and commands run on it."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from sere_compile import SimilarityProfile
from sere_compile.benchmark.timing import Timing
from sere_compile.cli import main

from ..benchmark.made import results_of, results_row
from ..tiny_models import build, random_profile, word_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = build("qwen3_moe")
    model.save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    profile = random_profile(model)
    coefficients = {name: matrix / 2 for name, matrix in profile.items()}
    SimilarityProfile(profile, {"method": "chance"}, coefficients).save(folder / "profile.safetensors")
    lines = [json.dumps({"text": " ".join("abcdefghij"[i % 7 :] * 3)}) for i in range(20)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def sere(checkpoint, command, *arguments):
    options = ["--model", checkpoint / "model", "--profile", checkpoint / "profile.safetensors"]
    options += ["--data", checkpoint / "text.jsonl", "--length", 6, "--sequences", 8]
    return CliRunner().invoke(main, [command, *map(str, [*options, *arguments])])


def measured(path, batches, layers=2):
    """A file as `sere bench` writes it of the checkpoint: 1 ms a step and 0.1 ms per active expert, stock 3 ms."""
    rows = [
        results_row(what="decode step", batch=batch, timing=Timing(1000 + 100 * active, 0.0, 0.0), active=active)
        for batch in batches
        for active in (4.0, 8.0)
    ]
    rows += [
        results_row(what="decode step", batch=batch, timing=Timing(3000.0, 0.0, 0.0), ours=False, variant="eager")
        for batch in batches
    ]
    results = results_of(rows)
    config = build("qwen3_moe").config
    results.gates = [[config.num_experts, config.num_experts_per_tok]] * layers
    results.save(path)
    return path
