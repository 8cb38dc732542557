"""What settings cost on a text, as `sere sweep` measures it with transformers' model: a process of its own.

python -m sere_compile.benchmark.serving_quality CASE OUT

Started by `sere serve-bench` when all engines have ended and the device is free.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..calibration.calibrate import calibrate
from ..config import SereConfig
from ..evaluation.sweep import sweep
from ..evaluation.text import mixed_windows
from ..integrations.transformers import load_causal_lm
from ..integrations.vllm.matrices import find_profile
from ..integrations.vllm.options import checked
from ..similarity.attach import attach
from ..whole_file import write_whole

# Routing options that say nothing about which experts a token gets in a sweep.
_LEFT_OUT = ("strict", "collect_stats", "max_tokens")


def config_of(sere: Mapping[str, Any]) -> SereConfig:
    """The routing options among those of `additional_config["sere"]`."""
    return checked({name: value for name, value in sere.items() if name not in _LEFT_OUT}).config


def measure_quality(case: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of a sweep for each setting and batch, as plain numbers.

    Args:
        case: "model", "dtype" of its weights, "text" (files), "field", "length", "sequences", "batches", "profile" (a
            file, or None), and "settings": options of `additional_config["sere"]`.

    Returns:
        "rows", and "about": text, weights and similarity in words.

    Raises:
        ModelNotFoundError, ProfileError, EvaluationError: see what is called.
    """
    configs = [config_of(sere) for sere in case["settings"]]
    model, tokenizer = load_causal_lm(case["model"], dtype=case["dtype"])
    tokens = mixed_windows(tokenizer, case["text"], case["field"], case["length"], case["sequences"])
    profile, similarity = find_profile(case["profile"], case["model"]), "none, filled by the tokens' own scores"
    if not all(config.fills_everywhere for config in configs):
        similarity = case["profile"] or "the checkpoint's"
        if profile is None:
            profile = calibrate(model, None)
            similarity = "experts probed on random hidden states, in another draw than the engine's"
        attach(model, profile)  # raises if it does not fit the model
    rows = sweep(model, tokens, {} if profile is None else profile, configs, case["batches"])
    files = ", ".join(Path(path).name for path in case["text"])
    kind = str(model.dtype).removeprefix("torch.")
    about = (
        f"{files}, {case['sequences']} x {case['length']} tokens, transformers' model in {kind} decoding in step, over "
        f"the same without re-routing; similarity: {similarity}"
    )
    return {"about": about, "rows": [dataclasses.asdict(row) for row in rows]}


def main() -> None:
    """One model."""
    told, out = map(Path, sys.argv[1:])
    write_whole(out, json.dumps(measure_quality(json.loads(told.read_text(encoding="utf-8")))).encode())


if __name__ == "__main__":
    main()
