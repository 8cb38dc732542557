"""What every launcher of a Triton kernel needs. Imports Triton, so import it late."""

import contextlib

import torch
from torch import Tensor
from torch.library import wrap_triton
from triton.runtime.jit import JITFunction


def device_guard(tensor: Tensor):
    """Makes the tensor's GPU current, where Triton launches; does nothing while CUDA is unused.

    (A fake CUDA tensor on a machine without CUDA gets here as well.)
    """
    return torch.cuda.device_of(tensor) if torch.cuda.is_initialized() else contextlib.nullcontext()


def launchable(kernel):
    """`kernel` for `[grid](...)`: visible to tracers, or as it is under Triton's interpreter.

    torch 2.11's `wrap_triton` refuses interpreted kernels; later ones hand them back.
    """
    return wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel
