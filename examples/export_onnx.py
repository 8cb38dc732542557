"""Export a trained MoE model with re-routing inside to ONNX, run it in onnxruntime, and compare it with an oracle.

pip install 'sere-compile[hf,onnx]'
python examples/export_onnx.py                          # the small model of the package, half a minute on a CPU
python examples/export_onnx.py --model mixtral          # another of them, or a checkpoint: a folder or a hub name
python examples/export_onnx.py --out model.onnx --as-function   # keep the file; re-routing as one node each

Exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import sere_compile
from sere_compile.integrations.transformers import load_causal_lm
from sere_compile.lowering import onnx
from sere_compile.testing import oracle_routing

TOLERANCE = 1e-4
S = 1
PROMPTS = ("def __init__(self,", "She had been", "for name in", "Mr. Elliot was", "import os\nimport", "The captain")


def calibrated(model: Any, tokenizer: Any) -> sere_compile.SimilarityProfile:
    """How alike the experts of every gate are, on the text of this file; real calibrations take more."""
    ids = tokenizer(Path(__file__).read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    rows = ids[0, : ids.numel() // 128 * 128].view(-1, 128)  # [B, length]
    return sere_compile.calibrate(model, [{"input_ids": rows}], progress=False)


def compare(
    path: Path, model: Any, tokenizer: Any, profile: sere_compile.SimilarityProfile, prompts: tuple[str, ...]
) -> float:
    """Largest difference in logits between the file and the model with the oracle's routing."""
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    rows = torch.tensor([row[: min(map(len, ids))] for row in ids])  # [B, length], without padding
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input_ids": rows.numpy()})  # [B, length, vocabulary]
    active: dict[str, list[tuple[int, int]]] = {}
    with torch.no_grad():
        plain = model(rows, use_cache=False).logits.numpy()
        with oracle_routing(model, profile, S, min_active=0, active=active):
            expected = model(rows, use_cache=False).logits.numpy()
    error = float(np.abs(logits - expected).max())
    before, after = np.mean([counts for (counts,) in active.values()], axis=0)
    same = (logits.argmax(-1) == plain.argmax(-1)).mean()
    print(f"{rows.numel()} tokens: {before:.1f} -> {after:.1f} active experts per gate, logits within {error:.1e} of "
          f"the oracle's, best next token as without re-routing in {same:.0%}")  # fmt: skip
    return error


def main() -> None:
    """Export, run for two batch sizes that the graph was not traced with, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3", help="qwen3, mixtral or upcycled of the package, or a checkpoint")
    parser.add_argument("--out", type=Path, help="keep the ONNX file here")
    parser.add_argument("--as-function", action="store_true", help="keep each re-routing as one node")
    arguments = parser.parse_args()
    model, tokenizer = load_causal_lm(arguments.model, dtype=torch.float32, device="cpu")
    profile = calibrated(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        done = onnx.export(
            model,
            (torch.zeros(2, 8, dtype=torch.int64),),
            arguments.out or Path(folder) / "model.onnx",
            kwargs={"use_cache": False},
            profile=profile,
            config=sere_compile.SereConfig(select_top_k=S, min_active=0),
            dynamic_shapes="auto",
            as_function=arguments.as_function,
        )
        print(f"{done.gates} gates re-routed, opset {done.opset}, {done.operators.total()} operators")
        worst = max(compare(done.path, model, tokenizer, profile, prompts) for prompts in (PROMPTS[:1], PROMPTS))
    if not worst <= TOLERANCE:
        sys.exit(f"the ONNX file differs from the oracle by {worst}")
    print("equal")


if __name__ == "__main__":
    main()
