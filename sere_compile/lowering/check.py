"""`sere export --check`: does a written file compute what the re-routed model computes in PyTorch?"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.export import ExportedProgram

from ..errors import LoweringError
from .decode_step import DecodeStep
from .loading import Run
from .prefill import Prefill

# Of a difference to the largest logit, in float32. Below float32 rounding turns some choices of experts into others.
TOLERANCE = 1e-3
_BATCHES = (1, 3)


def largest_difference(
    program: ExportedProgram, run: Run, module: Prefill | DecodeStep, is_exact: bool = True
) -> float:
    """The largest difference of a logit between a file and the program it was made of.

    Two batches of random tokens, of sizes that the program was not traced with; in the larger one padding, where the
    program takes a mask. Positions of padding are not compared: no runtime says what they hold. Where `is_exact` is
    False, because the file has other weights (of 8 bits, say), any difference will do.

    Raises:
        LoweringError: a logit is not finite, or in float32 the difference is above `TOLERANCE` of the largest logit.
    """
    compiled, worst = program.module(), 0.0
    for batch in _BATCHES:
        call, real = _call(module, batch)
        with torch.no_grad():
            wanted = pytree.tree_leaves(compiled(*call))[0].float().cpu()
        got = run(*call)[0].float().cpu()
        if not (got[real].isfinite().all() and got.shape == wanted.shape):
            raise LoweringError(f"the file does not compute what the model computes: {_told(got, wanted)}")
        difference = (got - wanted)[real].abs().max().item()
        limit = TOLERANCE * max(1.0, wanted[real].abs().max().item())
        if is_exact and module.model.dtype == torch.float32 and not difference <= limit:
            raise LoweringError(
                f"the file does not compute what the model computes: a logit of {batch} rows differs by "
                f"{difference:.1e}, where {limit:.1e} would be rounding"
            )
        worst = max(worst, difference)
    return worst


def _told(got: Tensor, wanted: Tensor) -> str:
    if got.shape != wanted.shape:
        return f"logits are {list(got.shape)} instead of {list(wanted.shape)}"
    return f"{math.prod(got.shape) - int(got.isfinite().sum())} logits are not finite"


def _call(module: Prefill | DecodeStep, batch: int) -> tuple[tuple[Any, ...], Any]:
    """Arguments of the lowered module, and where its logits are compared."""
    model = module.model
    generator = torch.Generator().manual_seed(batch)
    length = 1 if isinstance(module, DecodeStep) else 4 + batch
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(0, vocabulary, (batch, length), generator=generator).to(model.device)
    if isinstance(module, DecodeStep):
        return (tokens, torch.tensor(0, device=model.device), *module.empty_cache(batch)), slice(None)
    mask = torch.ones_like(tokens)
    mask[1:, :2] = 0
    return (tokens, mask), mask.bool().cpu()
