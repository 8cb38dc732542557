"""`sere::fill`, and `sere::route` that fills or re-routes, in one launch (`cluster.cu`): what it takes, its launch.

On Hopper and later, where blocks of one cluster reach each other's shared memory. Triton's kernels take two launches,
and everything that this one does not take.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..native import FLOAT_NUMBERS, compiled_ahead
from ..route.reference import Rerouting
from . import nvrtc

logger = logging.getLogger(__name__)

INSTRUCTIONS, SOURCES = ("common.cuh",), ("cluster.cu",)
# A warp for each token: 8 blocks of 32 warps, of 16 to re-route, which takes more registers.
MOST_BLOCKS, MOST_TOKENS = 8, 256
# Up to which re-routing takes one launch. Not timed: filling in one, which does more, is as fast as re-routing in two
# launches at 128 tokens (docs/kernels.md).
MOST_REROUTED_TOKENS = 64
MOST_EXPERTS, MOST_TOP_K = 256, 16
SCORINGS = ("scores", "softmax", "sigmoid", "softmax_after", "none")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What the kernel is compiled for; floats by `FLOAT_NUMBERS`, where not said otherwise as in `sere_compile.ops`.

    Attributes:
        reroutes: by similarity; else it fills.
        given: ids, weights and scores are; else the kernel selects by logits.
        scoring: of `SCORINGS`; "scores" where they are given.
    """

    experts: int
    top_k: int
    select_top_k: int
    reroutes: bool
    given: bool
    scoring: str
    renormalize: bool
    has_bias: bool
    has_choice: bool
    has_mask: bool
    has_max: bool
    has_threshold: bool
    has_projection: bool
    has_real: bool
    has_rerouted: bool
    ids64: bool
    scores: int
    choices: int
    bias: int
    weights: int
    similarity: int

    def macros(self) -> list[tuple[str, int]]:
        """What `cluster.cu` is compiled with."""
        return [
            ("EXPERTS", self.experts), ("TOP_K", self.top_k), ("SELECT", self.select_top_k),
            ("REROUTES", int(self.reroutes)), ("GIVEN", int(self.given)), ("SCORING", SCORINGS.index(self.scoring)),
            ("RENORMALIZE", int(self.renormalize)), ("HAS_BIAS", int(self.has_bias)),
            ("HAS_CHOICE", int(self.has_choice)), ("HAS_MASK", int(self.has_mask)), ("HAS_MAX", int(self.has_max)),
            ("HAS_THRESHOLD", int(self.has_threshold)), ("HAS_PROJECTION", int(self.has_projection)),
            ("HAS_REAL", int(self.has_real)), ("HAS_REROUTED", int(self.has_rerouted)), ("IDS64", int(self.ids64)),
            ("SCORES", self.scores), ("CHOICES", self.choices), ("BIAS", self.bias), ("WEIGHTS", self.weights),
            ("SIMILARITY", self.similarity),
        ]  # fmt: skip

    @property
    def shared_bytes(self) -> int:
        """Of one block: `Board`."""
        span = -(-self.experts // 32) * 32
        return 8 + 8 * span * (32 + MOST_BLOCKS + 1) + 8 * span


@dataclasses.dataclass(frozen=True)
class Rows:
    """The tensors of a call, flat: T tokens, the last stride 1.

    Attributes:
        scores: [T, E], or logits.
        choice: [T, E] or None.
        bias: [E] or None.
        ids: [T, K], contiguous; None where they are to be selected. So are weights.
        weights: likewise.
        mask: bool [T] or None.
    """

    scores: Tensor
    choice: Tensor | None = None
    bias: Tensor | None = None
    ids: Tensor | None = None
    weights: Tensor | None = None
    mask: Tensor | None = None


def takes(shape: Sequence[int], top_k: int, scores: Tensor, *floats: Tensor | None, most: int = MOST_TOKENS) -> bool:
    """Whether a call is one for this kernel.

    Args:
        shape: of scores or logits [..., E].
        top_k: K.
        scores: or logits.
        *floats: whatever other floating-point tensors there are.
        most: how many tokens.
    """
    sizes = [*shape]
    return (
        nvrtc.serves(scores.device)
        and not compiled_ahead()
        and all(isinstance(size, int) for size in sizes)
        and 0 < math.prod(sizes[:-1]) <= most
        and sizes[-1] <= MOST_EXPERTS
        and top_k <= MOST_TOP_K
        and all(x is None or x.dtype in FLOAT_NUMBERS for x in (scores, *floats))
    )


def cut(num_tokens: int, num_experts: int) -> tuple[int, int]:
    """Blocks, and threads of each, as measured (docs/kernels.md): few warps of a multiprocessor wait for each other.

    A thread for each expert at least. Up to 8 tokens name few experts in their first slots, so that experts are ranked
    more often than not, which more threads do faster.
    """
    if num_tokens <= 8:
        blocks, warps = (1, 4) if num_tokens <= 4 else (2, 8)
    else:
        blocks, warps = MOST_BLOCKS, max(4, 1 << (-(-num_tokens // MOST_BLOCKS) - 1).bit_length())
    return blocks, 32 * max(warps, -(-num_experts // 32))


def source() -> str:
    """The kernel, with what comes before it."""
    return nvrtc.read(Path(__file__).parent, (*INSTRUCTIONS, *SOURCES))


@functools.cache
def function(cluster: Cluster, device: int):
    """The kernel on a device, compiled; None, after a warning, where that fails."""
    try:
        code = nvrtc.compile_source(source(), cluster.macros(), torch.cuda.get_device_capability(device))
        return nvrtc.load_functions(code, ("route_cluster",), cluster.shared_bytes)[0]
    except RuntimeError as error:
        logger.warning("cluster.cu cannot be used, Triton's kernels are instead: %s", error)
        return None


@dataclasses.dataclass(frozen=True)
class Selection:
    """How logits become weights, as in `sere_compile.ops.route`; "scores" where ids and weights are given."""

    scoring: str = "scores"
    renormalize: bool = False
    epsilon: float = 0.0
    scale: float = 1.0


def cluster_of(rows: Rows, rerouting: Rerouting, selection: Selection, ids: Tensor, weights: Tensor) -> Cluster:
    """What a call needs, whose results are ids and weights."""

    def number(tensor: Tensor | None) -> int:
        return 0 if tensor is None else FLOAT_NUMBERS[tensor.dtype]

    return Cluster(
        experts=rows.scores.shape[1], top_k=ids.shape[1], select_top_k=rerouting.select_top_k,
        reroutes=not rerouting.fill, given=rows.ids is not None, scoring=selection.scoring,
        renormalize=selection.renormalize, has_bias=rows.bias is not None, has_choice=rows.choice is not None,
        has_mask=rows.mask is not None, has_max=rerouting.max_active > 0, has_threshold=rerouting.threshold > 0,
        has_projection=rerouting.projection is not None, has_real=rerouting.real_tokens is not None,
        has_rerouted=rerouting.rerouted_tokens is not None, ids64=ids.dtype == torch.int64,
        scores=number(rows.scores), choices=number(rows.choice), bias=number(rows.bias), weights=number(weights),
        similarity=number(rerouting.similarity),
    )  # fmt: skip


def arguments(
    rows: Rows, rerouting: Rerouting, selection: Selection, ids: Tensor, weights: Tensor, blocks: int
) -> tuple:
    """What the kernel takes, in order; matrices are contiguous."""
    least, budget = rerouting.min_active, rerouting.max_active
    if rerouting.fill:
        least = max(least, ids.shape[1])
        budget = max(budget, least)
    return (
        rows.scores, rows.choice, rows.bias, rows.ids, rows.weights, rows.mask, rerouting.similarity,
        rerouting.projection, rerouting.real_tokens, rerouting.rerouted_tokens, ids, weights,
        rows.scores.shape[0], rows.scores.stride(0), 0 if rows.choice is None else rows.choice.stride(0),
        0 if rows.mask is None else rows.mask.stride(0), selection.epsilon, selection.scale, rerouting.threshold,
        least, budget, blocks,
    )  # fmt: skip


def launch_cluster(rows: Rows, rerouting: Rerouting, selection: Selection, ids: Tensor, weights: Tensor) -> bool:
    """Fill or re-route in one launch, into ids and weights [T, K]; False where the kernel cannot be had after all.

    All tensors but scores, choice and mask are contiguous.
    """
    kernel_of = cluster_of(rows, rerouting, selection, ids, weights)
    kernel = function(kernel_of, rows.scores.device.index)
    if kernel is None:
        return False
    blocks, threads = cut(*rows.scores.shape)
    values = arguments(rows, rerouting, selection, ids, weights, blocks)
    nvrtc.launch(kernel, (blocks, 1), threads, kernel_of.shared_bytes, values, early=True, cluster=blocks)
    return True
