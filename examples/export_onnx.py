"""Export a Qwen3-MoE with re-routing inside to ONNX, run it in onnxruntime, and compare it with an eager oracle.

pip install 'sere-compile[hf,onnx]'
python examples/export_onnx.py                          # small random weights, half a minute on a CPU
python examples/export_onnx.py --out model.onnx --as-function   # keep the file; re-routing as one node each

Exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from qwen_moe import small_qwen3_moe

import sere_compile
from sere_compile.lowering import onnx
from sere_compile.testing import oracle_routing

TOLERANCE = 1e-4
S = 1


def random_profile(model: torch.nn.Module) -> sere_compile.SimilarityProfile:
    """A symmetric [E, E] matrix for every gate; `sere_compile.calibrate` measures real ones."""
    gates = [name for name, _ in model.named_parameters() if name.endswith("mlp.gate.weight")]
    halves = {gate: torch.rand(2 * [len(model.get_parameter(gate))]) for gate in gates}
    return sere_compile.SimilarityProfile({gate: (half + half.T) / 2 for gate, half in halves.items()})


def difference(path: Path, model: torch.nn.Module, profile: sere_compile.SimilarityProfile, batch: int) -> float:
    """Largest difference in logits between the file and the model with the oracle's routing."""
    ids = torch.randint(0, 256, (batch, 5), generator=torch.Generator().manual_seed(batch))  # [B, length]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input_ids": ids.numpy()})  # [B, length, vocabulary]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits.numpy()
        with oracle_routing(model, profile, S, min_active=0):
            expected = model(ids, use_cache=False).logits.numpy()
    error = float(np.abs(logits - expected).max())
    print(f"batch {batch}: logits differ from the oracle's by {error:.1e}, from the plain model's by "
          f"{np.abs(logits - plain).max():.1e}")  # fmt: skip
    return error


def main() -> None:
    """Export, run for two batch sizes that the graph was not traced with, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep the ONNX file here")
    parser.add_argument("--as-function", action="store_true", help="keep each re-routing as one node")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = small_qwen3_moe().eval()
    profile = random_profile(model)
    free = torch.export.Dim.DYNAMIC
    with tempfile.TemporaryDirectory() as folder:
        done = onnx.export(
            model,
            (torch.zeros(2, 8, dtype=torch.int64),),
            arguments.out or Path(folder) / "qwen3_moe.onnx",
            kwargs={"use_cache": False},
            profile=profile,
            config=sere_compile.SereConfig(select_top_k=S, min_active=0),
            dynamic_shapes={"input_ids": {0: free, 1: free}, "use_cache": None},
            as_function=arguments.as_function,
            input_names=["input_ids"],
            output_names=["logits"],
        )
        print(f"{done.gates} gates re-routed, opset {done.opset}, {done.operators.total()} operators")
        worst = max(difference(done.path, model, profile, batch) for batch in (1, 6))
    if not worst <= TOLERANCE:
        sys.exit(f"the ONNX file differs from the oracle by {worst}")
    print("equal")


if __name__ == "__main__":
    main()
