"""Registering an operator with `torch.library.triton_op` without importing Triton.

Everything else about the operators is plain `triton_op`; this file only replaces its scan for kernels.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._library.triton


class SourceFingerprint:
    """Stands in AOTAutograd's cache key for the source of every operator of this package.

    AOTAutograd looks its cache up before it decomposes an operator, with the source of the kernels that
    `triton_op` found in the operator's body as part of the key. Our kernels are imported late, and the
    launcher and the ATen reference are decomposed into the cached code just as the kernels are, so a key of
    kernel sources alone would bring back code compiled from an older version of this package. This object
    has the attributes of a kernel that the key is made of (`src`, `fn`, `__name__`); its `src` is a digest
    of all files under `ops/`.
    """

    __name__ = "sere_compile_ops_source"

    @functools.cached_property
    def src(self) -> str:
        """A comment line with the digest of all source files of this package."""
        digest = hashlib.sha256()
        folder = Path(__file__).parent
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".cpp", ".cu", ".cuh")):
            digest.update(str(path.relative_to(folder)).encode())
            digest.update(path.read_bytes())
        return f"# {digest.hexdigest()}"

    @staticmethod
    def fn() -> None:
        """Has no globals for the key to follow."""


FINGERPRINT = SourceFingerprint()


def register_triton_op(name: str, body: Callable):
    """`torch.library.triton_op(name, body, mutates_args=())`, except that Triton is not imported.

    `triton_op` scans the body's source for kernels, which imports Triton for every user of the package, on
    machines without a GPU too. The scan is replaced by `FINGERPRINT` for the time of the registration. On a
    torch release that lacks the scanning function the registration still works; only the import is eager
    then (tests/ops/test_registration.py watches both).

    Returns:
        The `torch.library.CustomOpDef`, for `register_fake` and `register_autograd`.
    """
    module: Any = torch._library.triton
    if not hasattr(module, "get_inner_triton_kernels"):
        return torch.library.triton_op(name, body, mutates_args=())
    scan = module.get_inner_triton_kernels
    module.get_inner_triton_kernels = lambda _: [FINGERPRINT]
    try:
        return torch.library.triton_op(name, body, mutates_args=())
    finally:
        module.get_inner_triton_kernels = scan
