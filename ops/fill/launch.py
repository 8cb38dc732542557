"""The launcher of `sere::fill`: statistics in one launch, filling in the next."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ..launching import launchable
from .kernel import fill_kernel
from .reference import CLOSED, RESTORE, WORTH, Keeping
from .statistics import statistics_kernel

# Rows of statistics that every program of the second launch adds up: few bytes, yet not many tokens behind each.
ROWS = 16


@dataclass(frozen=True)
class Tile:
    """Tokens and warps of a program of the second launch."""

    tokens: int
    num_warps: int


@dataclass(frozen=True)
class Ranking:
    """What ranks and weighs a token's experts: scores as they are, or logits with a scoring, bias and groups.

    Attributes:
        rows: [T, E], the last stride 1.
        scoring: "scores" where rows are scores, else as in `sere_compile.ops.route`. What is no sigmoid is worth its
            softmax.
        choice: [T, E] with the last stride 1, selection scores that are given; None: made from rows.
        bias: [E] or None.
        num_groups: as in `sere_compile.ops.route`, as are the others.
    """

    rows: Tensor
    scoring: str = "scores"
    choice: Tensor | None = None
    bias: Tensor | None = None
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "max"


def default_tile(e_block: int) -> Tile:
    """A token and a warp up to 256 experts: no search leaves its warp, which has instructions for that."""
    return Tile(1, 1 if e_block <= 256 else 4)


def launch_fill(
    ids: Tensor, weights: Tensor, ranking: Ranking, keeping: Keeping, mask: Tensor | None, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """`sere::fill` for 0 < S < K on checked arguments: ids and weights [T, K], mask [T]; new contiguous tensors."""
    if guard_or_false(ids.shape[0] == 0):
        return torch.empty(ids.shape, dtype=ids.dtype, device=ids.device), torch.empty(
            weights.shape, dtype=weights.dtype, device=ids.device
        )
    statistics = launch_statistics(ids, weights, int(ranking.rows.shape[1]), mask)
    return launch_filling(ids, weights, ranking, keeping, statistics, tile)


def launch_statistics(ids: Tensor, weights: Tensor, num_experts: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masses fp32 and sets of slots int32, [ROWS, E]; with few tokens some rows are of none."""
    num_tokens, rows = ids.shape[0], ROWS
    e_block = triton.next_power_of_2(num_experts)
    mass = torch.empty((rows, num_experts), dtype=torch.float32, device=ids.device)
    slots = torch.empty((rows, num_experts), dtype=torch.int32, device=ids.device)
    launchable(statistics_kernel)[(rows,)](
        ids, weights, ids if mask is None else mask, mass, slots, num_tokens, triton.cdiv(num_tokens, rows),
        ids.stride(0), ids.stride(1), weights.stride(0), weights.stride(1), 0 if mask is None else mask.stride(0),
        K=int(ids.shape[1]), E=num_experts, HAS_MASK=mask is not None, TOKENS=max(1, min(8, 1024 // e_block)),
        E_BLOCK=e_block, num_warps=4,
    )  # fmt: skip
    return mass, slots


def launch_filling(
    ids: Tensor,
    weights: Tensor,
    ranking: Ranking,
    keeping: Keeping,
    statistics: tuple[Tensor, Tensor],
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """The second launch, from statistics [rows, E]; T >= 1."""
    mass, slots = statistics
    num_tokens, top_k = ids.shape[0], int(ids.shape[1])
    rows, num_experts = ranking.rows, int(ranking.rows.shape[1])
    e_block = triton.next_power_of_2(num_experts)
    tile = tile or default_tile(e_block)
    out_ids = torch.empty(ids.shape, dtype=ids.dtype, device=ids.device)
    out_weights = torch.empty(weights.shape, dtype=weights.dtype, device=ids.device)
    least = max(keeping.min_active, top_k)
    choice, bias = ranking.choice, ranking.bias
    launchable(fill_kernel)[(triton.cdiv(num_tokens, tile.tokens),)](
        # Pointers that a flag says are not read: any tensor will do.
        ids, weights, rows, rows if choice is None else choice, rows if bias is None else bias.contiguous(), mass,
        slots, out_ids, out_weights, num_tokens, ids.stride(0), ids.stride(1), weights.stride(0),
        weights.stride(1), rows.stride(0), 0 if choice is None else choice.stride(0), keeping.threshold, least,
        max(keeping.max_active, least), K=top_k, SELECT=keeping.select_top_k, E=num_experts, SCORING=ranking.scoring,
        HAS_CHOICE=choice is not None, HAS_BIAS=bias is not None, GROUPS=ranking.num_groups,
        TOP_GROUPS=ranking.top_groups, TOP2=ranking.group_score == "top2",
        G_BLOCK=triton.next_power_of_2(ranking.num_groups), HAS_MAX=keeping.max_active > 0,
        HAS_THRESHOLD=keeping.threshold > 0, TOKENS=tile.tokens, ROWS=ROWS, STEP=max(1, min(ROWS, 2048 // e_block)),
        K_BLOCK=triton.next_power_of_2(top_k), E_BLOCK=e_block, WORTH=WORTH, RESTORE=RESTORE, CLOSED=CLOSED,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return out_ids, out_weights
