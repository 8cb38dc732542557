"""Small calls of `sere::expert_mlp` for compute-sanitizer.

    compute-sanitizer python -m benchmarks.ops.sanitize_expert_mlp

The caching allocator hides reads past a tensor's end, so it is switched off.
"""

import argparse
import dataclasses
import os

if __name__ == "__main__":  # before torch reads it
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from sere_compile.ops import expert_mlp
from tests.ops.test_expert_mlp import Layer, assert_close_to_oracle
from tests.ops.test_expert_mlp_mxfp4 import LAYERS as MXFP4_LAYERS
from tests.ops.test_expert_mlp_stream import with_fp8

LAYERS = [
    Layer(dtype=torch.bfloat16),
    Layer(tokens=19, slots=3, experts=5, hidden=128, inner=64, bias=True, dtype=torch.bfloat16),
    Layer(
        activation="gpt_oss", interleaved=True, transposed=True, bias=True, dtype=torch.bfloat16, hidden=72, inner=88
    ),
    Layer(tokens=70, slots=3, experts=3),
    # Few slots per expert: CUDA C++ where the GPU can.
    Layer(tokens=1, slots=8, experts=16, hidden=192, inner=64, bias=True, dtype=torch.bfloat16),
    Layer(tokens=16, slots=4, experts=16, hidden=128, inner=128, dtype=torch.bfloat16),
]
PACKED = [dataclasses.replace(layer, dtype=torch.bfloat16) for layer in MXFP4_LAYERS]


def main() -> None:
    """Run each layer once and compare it with the oracle."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for layer in LAYERS:
        arguments = layer.draw(device="cuda")
        assert_close_to_oracle(expert_mlp(*arguments), arguments)
        print("ran", dataclasses.astuple(layer), flush=True)
    scaled, exact = with_fp8(LAYERS[-1].draw(device="cuda"))
    assert_close_to_oracle(expert_mlp(*scaled), exact)
    print("ran the last with FP8 weights", flush=True)
    for layer in PACKED:
        packed, exact = layer.draw_both("cuda")
        assert_close_to_oracle(expert_mlp(*packed), exact)
        print("ran", dataclasses.astuple(layer), "with MXFP4 weights", flush=True)


if __name__ == "__main__":
    main()
