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
# Up to which re-routing takes one launch, and up to which that launch multiplies by the router's weight as well: above,
# Triton's two launches, or cuBLAS and what follows it, are as fast (docs/kernels.md).
MOST_REROUTED_TOKENS, MOST_HIDDEN_TOKENS = 64, 32
# Of a block of Hopper's.
MOST_SHARED_BYTES = 227 * 1024
MOST_EXPERTS, MOST_TOP_K = 256, 16
SCORINGS = ("scores", "softmax", "sigmoid", "softmax_after", "none")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What the kernel is compiled for; floats by `FLOAT_NUMBERS`, where not said otherwise as in `sere_compile.ops`.

    Attributes:
        reroutes: by similarity; else it fills.
        given: ids, weights and scores are; else the kernel selects by logits.
        scoring: of `SCORINGS`; "scores" where they are given.
        hidden: H, where logits are made of hidden states; 0 where they are given.
        half: whether hidden states are fp16, not bf16.
        tiles: of 8 tokens, where there are hidden states.
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
    hidden: int = 0
    half: bool = False
    tiles: int = 1

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
            ("SIMILARITY", self.similarity), ("HIDDEN", self.hidden), ("HALF", int(self.half)), ("TILES", self.tiles),
        ]  # fmt: skip

    @property
    def shared_bytes(self) -> int:
        """Of one block: `Board`."""
        if self.hidden:
            return _bytes_with_hidden(self.experts, self.hidden, self.tiles)
        return _board_bytes(_span(self.experts)) + 8 * _span(self.experts) * 32


@dataclasses.dataclass(frozen=True)
class Rows:
    """The tensors of a call, flat: T tokens, the last stride 1.

    Attributes:
        scores: [T, E], or logits; or hidden states [T, H].
        choice: [T, E] or None.
        bias: [E] or None.
        ids: [T, K], contiguous; None where they are to be selected. So are weights.
        weights: likewise.
        mask: bool [T] or None.
        router: [E, H], contiguous, where logits are to be made of hidden states by it; else None.
    """

    scores: Tensor
    choice: Tensor | None = None
    bias: Tensor | None = None
    ids: Tensor | None = None
    weights: Tensor | None = None
    mask: Tensor | None = None
    router: Tensor | None = None

    @property
    def experts(self) -> int:
        """E."""
        return int((self.scores.T if self.router is None else self.router).shape[0])


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


def takes_hidden(hidden: Tensor, router: Tensor, top_k: int, *floats: Tensor | None) -> bool:
    """Whether the kernel makes the logits of a call too: hidden states [..., H] and the router's weight [E, H]."""
    width = hidden.shape[-1]
    return (
        hidden.dtype in (torch.bfloat16, torch.float16)
        and router.dtype is hidden.dtype
        and hidden.is_contiguous()
        and router.is_contiguous()
        and isinstance(width, int)
        and width % (32 * MOST_BLOCKS) == 0
        and all(t.data_ptr() % 16 == 0 for t in (hidden, router))
        and takes((*hidden.shape[:-1], router.shape[0]), top_k, hidden, *floats, most=MOST_HIDDEN_TOKENS)
        and _bytes_with_hidden(router.shape[0], width, _tiles(hidden.numel() // width)) <= MOST_SHARED_BYTES
    )


def _tiles(num_tokens: int) -> int:
    """Tiles of 8 tokens: 1, 2 or 4, each a kernel of its own."""
    return 1 << (-(-num_tokens // 8) - 1).bit_length()


def _warps_with_hidden(num_experts: int) -> int:
    """Of a block: one for each 16 experts, and at least one for each of 8 tokens."""
    return max(8, _span(num_experts) // 16)


def _span(num_experts: int) -> int:
    """Experts, to whole lanes of a warp."""
    return -(-num_experts // 32) * 32


def _bytes_with_hidden(num_experts: int, width: int, tiles: int) -> int:
    """`Board` with hidden states."""
    span, warps = _span(num_experts), _warps_with_hidden(num_experts)
    columns = width // MOST_BLOCKS + 8
    return _board_bytes(span) + 16 + 4 * span * MOST_BLOCKS * warps + max(2 * tiles * 8 * columns, 8 * span * warps)


def _board_bytes(span: int) -> int:
    """`Board` but for what tokens say, and hidden states."""
    return 16 + 8 * span * (MOST_BLOCKS + 1) + 8 * span


def cut(num_tokens: int, num_experts: int, has_hidden: bool = False) -> tuple[int, int]:
    """Blocks, and threads of each, as measured (docs/kernels.md): few warps of a multiprocessor wait for each other.

    A thread for each expert at least. Up to 8 tokens name few experts in their first slots, so that experts are ranked
    more often than not, which more threads do faster. With hidden states a warp has 16 experts of the router.
    """
    if has_hidden:
        return MOST_BLOCKS, 32 * _warps_with_hidden(num_experts)
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

    has_hidden = rows.router is not None
    return Cluster(
        experts=rows.experts, top_k=ids.shape[1], select_top_k=rerouting.select_top_k,
        reroutes=not rerouting.fill, given=rows.ids is not None, scoring=selection.scoring,
        renormalize=selection.renormalize, has_bias=rows.bias is not None, has_choice=rows.choice is not None,
        has_mask=rows.mask is not None, has_max=rerouting.max_active > 0, has_threshold=rerouting.threshold > 0,
        has_projection=rerouting.projection is not None, has_real=rerouting.real_tokens is not None,
        has_rerouted=rerouting.rerouted_tokens is not None, ids64=ids.dtype == torch.int64,
        scores=number(rows.scores), choices=number(rows.choice), bias=number(rows.bias), weights=number(weights),
        similarity=number(rerouting.similarity), hidden=rows.scores.shape[1] if has_hidden else 0,
        half=has_hidden and rows.scores.dtype == torch.float16,
        tiles=_tiles(rows.scores.shape[0]) if has_hidden else 1,
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
        rows.scores, rows.router, rows.choice, rows.bias, rows.ids, rows.weights, rows.mask, rerouting.similarity,
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
    blocks, threads = cut(rows.scores.shape[0], rows.experts, rows.router is not None)
    values = arguments(rows, rerouting, selection, ids, weights, blocks)
    nvrtc.launch(kernel, (blocks, 1), threads, kernel_of.shared_bytes, values, early=True, cluster=blocks)
    return True
