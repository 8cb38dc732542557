"""`sere eval` on a checkpoint."""

from __future__ import annotations

import json

import torch

from sere_compile.evaluation.text import mixed_windows

from ..tiny_models import gate_names, word_tokenizer
from .checkpoint import sere


def test_eval_prints_quality_and_active_experts(checkpoint):
    result = sere(checkpoint, "eval", "--batch", 4, "--select-top-k", 1)
    assert result.exit_code == 0, result.output
    assert "at decode batch 4" in result.output
    assert all(f"{gate}: active experts" in result.output for gate in gate_names())


def test_eval_takes_every_option_of_re_routing(checkpoint):
    """A bad one is an error before anything is loaded."""
    first, second = gate_names()
    options = ["--select-top-k", "auto", "--max-active", 6, "--threshold", "q0.4", "--substitution", "projection"]
    options += ["--min-active", 0, "--per-gate", json.dumps({first: {"select_top_k": 4}})]
    result = sere(checkpoint, "eval", "--batch", 4, *options)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines[:3]] == ["next-token", "loss", "the"]
    changes = dict(line.strip().split(": active experts ") for line in lines[3:])
    before, after = changes[first].split(" -> ")
    assert before == after
    before, after = map(float, changes[second].split(" -> "))
    assert after < before
    for bad, message in ((["--threshold", "q2"], "q2"), (["--select-top-k", "auto"], "max_active go together")):
        refused = sere(checkpoint, "eval", *bad)
        assert refused.exit_code == 1
        assert message in refused.output


def test_decoding_batches_of_several_files_are_mixed(checkpoint):
    """Sequences of the files stand in turn; a share that does not come out is an error."""
    paths = [checkpoint / "text.jsonl", checkpoint / "text.jsonl"]
    both = mixed_windows(word_tokenizer(), paths, "text", 6, 8)
    assert torch.equal(both[::2], both[1::2])
    assert torch.equal(both[::2], mixed_windows(word_tokenizer(), paths[:1], "text", 6, 4))
    result = sere(checkpoint, "eval", "--data", paths[0], "--batch", 4, "--sequences", 7)
    assert "7 sequences cannot be shared evenly by 2 files" in result.output
