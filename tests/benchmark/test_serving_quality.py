"""Losses of settings of an engine are those of `sere sweep`."""

from __future__ import annotations

import json
import sys

import pytest

from sere_compile import SimilarityProfile
from sere_compile.benchmark import serving_quality
from sere_compile.evaluation.sweep import settings, sweep
from sere_compile.evaluation.text import mixed_windows
from sere_compile.integrations.transformers import load_causal_lm

from ..commands.checkpoint import checkpoint

__all__ = ["checkpoint"]


def case(folder, **changes):
    given = {
        "model": str(folder / "model"), "dtype": "float32", "text": [str(folder / "text.jsonl")], "field": "text",
        "length": 6, "sequences": 8, "batches": [4], "profile": str(folder / "profile.safetensors"),
        "settings": [{"select_top_k": 1, "min_active": 0, "substitution": "reroute", "phase": "all"}],
    }  # fmt: skip
    return {**given, **changes}


@pytest.mark.slow
def test_losses_are_those_of_a_sweep(checkpoint, tmp_path, monkeypatch):
    """Through files, as the process that is started does it."""
    (tmp_path / "case.json").write_text(json.dumps(case(checkpoint)))
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "case.json"), str(tmp_path / "out.json")])
    serving_quality.main()
    found = json.loads((tmp_path / "out.json").read_text())
    model, tokenizer = load_causal_lm(str(checkpoint / "model"), dtype="float32")
    tokens = mixed_windows(tokenizer, [str(checkpoint / "text.jsonl")], "text", 6, 8)
    profile = SimilarityProfile.load(checkpoint / "profile.safetensors")
    configs = [config.replace(min_active=0) for config in settings([1])]
    (expected,) = sweep(model, tokens, profile, configs, [4])
    assert found["rows"][0]["perplexity_change"] == pytest.approx(expected.perplexity_change)
    assert expected.perplexity_change != 0
    assert found["about"].startswith("text.jsonl, 8 x 6 tokens, transformers' model in float32 decoding in step")
    assert found["about"].endswith(f"similarity: {checkpoint / 'profile.safetensors'}")


def test_filling_needs_no_profile(checkpoint):
    found = serving_quality.measure_quality(
        case(checkpoint, profile=None, settings=[{"select_top_k": 1, "min_active": 0, "substitution": "fill"}])
    )
    assert found["rows"][0]["rule"] == "fill"
    assert found["about"].endswith("similarity: none, filled by the tokens' own scores")


@pytest.mark.slow
def test_without_a_profile_experts_are_probed(checkpoint):
    found = serving_quality.measure_quality(case(checkpoint, profile=None))
    assert "experts probed on random hidden states" in found["about"]
