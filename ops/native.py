"""What operators share whose kernels are in C++ or CUDA C++, compiled at first use."""

import sys

import torch

# By these numbers C++ knows the floating-point types: `WEIGHTS` of stream.cu, `dtype` of cpu.cpp.
FLOAT_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def compiled_ahead() -> bool:
    """Whether AOTInductor traces: its packages run without Python, where only ATen and Triton's kernels can be."""
    module = sys.modules.get("torch._inductor.virtualized")
    return module is not None and module.V.aot_compilation is True
