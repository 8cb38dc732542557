"""The launcher of `sere::route`: one kernel, or the selection and `sere::reroute` or filling one after the other."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ..fill.launch import ROWS, Ranking, launch_fill, launch_filling
from ..fill.reference import Keeping
from ..launching import launchable
from ..reroute.kernel import launch_reroute
from .kernel import route_kernel, route_reroute_kernel
from .reference import Rerouting, Scoring, first_tokens, of_these, projected


@dataclass(frozen=True)
class Tile:
    """Tokens that a program routes, tokens that it looks at in one step for the primary experts, and its warps."""

    tokens: int
    chunk: int
    num_warps: int

    def rows(self, e_block: int) -> int:
        """Rows of scores that the warps hold one or more of each; at least the tokens."""
        return max(self.tokens, self.num_warps * max(1, 128 // e_block))


def is_narrow(logits: Tensor, bias: Tensor | None, scoring: Scoring) -> bool:
    """Whether the logits alone decide and have 16 bits."""
    return logits.element_size() == 2 and bias is None and not scoring.is_grouped


# Where one launch was measured faster than two (docs/kernels.md): 16-bit logits, few experts, not many tokens. With 128
# experts two launches take 3.6 us and one 4.7 (32 tokens): each program looks at all scores, and its code is longer.
ONE_LAUNCH_EXPERTS = 8
ONE_LAUNCH_TOKENS = 64
# Tokens of a program that selects and sums statistics.
FILL_TOKENS = (4, 16)


def one_launch(num_tokens: int, num_experts: int, narrow: bool, rerouting: Rerouting) -> bool:
    """Whether re-routing in the same launch is faster than in one of its own. A budget would try several widths."""
    few = narrow and num_experts <= ONE_LAUNCH_EXPERTS and not rerouting.max_active
    return few and guard_or_false(num_tokens <= ONE_LAUNCH_TOKENS)


def tile_for(num_tokens: int, e_block: int, narrow: bool) -> Tile:
    """16 slots of 128 experts at K = 8, and 8 scores a thread and step (16 above 64 tokens): little code.

    Two classes only: with a symbolic T each is one more compiled graph.
    """
    num_warps, scores = (8, 8) if guard_or_false(num_tokens <= 64) else (16, 16)
    scores = scores if narrow else scores // 2
    return Tile(max(1, 256 // e_block), max(1, num_warps * 32 * scores // e_block), num_warps)


def launch_route(
    logits: Tensor, bias: Tensor | None, scoring: Scoring, rerouting: Rerouting, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """`sere::route` on checked arguments; `tile` replaces the heuristics and asks for one launch."""
    num_experts = int(logits.shape[-1])
    rows = logits.reshape(-1, num_experts)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    shape = (*logits.shape[:-1], scoring.top_k)
    weights = torch.empty(shape, dtype=scoring.dtype, device=logits.device)
    ids = torch.empty(shape, dtype=rerouting.ids_dtype, device=logits.device)
    if guard_or_false(rows.shape[0] == 0):
        return weights, ids
    narrow, e_block = is_narrow(logits, bias, scoring), triton.next_power_of_2(num_experts)
    arguments = _arguments(rows, bias, weights, ids, scoring, narrow, e_block)
    real = rerouting.real_tokens
    if not rerouting.acts_on(scoring.top_k):
        _launch_selection(arguments, rows.shape[0], e_block, tile.tokens if tile else 1, real=real)
        return weights, ids
    if rerouting.fill:
        return _launch_filled(arguments, rows, bias, scoring, rerouting)
    everything = real is None and rerouting.rerouted_tokens is None
    if everything and (tile is not None or one_launch(rows.shape[0], num_experts, narrow, rerouting)):
        tile = tile or tile_for(rows.shape[0], e_block, narrow)
        launchable(route_reroute_kernel)[(triton.cdiv(rows.shape[0], tile.tokens),)](
            **arguments, **_rerouting_arguments(rerouting, rows), TOKENS=tile.tokens, ROWS=tile.rows(e_block),
            CHUNK=tile.chunk, num_warps=tile.num_warps,
        )  # fmt: skip
        return weights, ids
    _launch_selection(arguments, rows.shape[0], e_block, 1, real=real)
    assert rerouting.similarity is not None
    numbers = (rerouting.select_top_k, rerouting.threshold, rerouting.min_active, None, None, rerouting.max_active)
    new_ids = launch_reroute(ids, rerouting.similarity, *numbers, rerouting.rerouted_tokens)
    return projected(weights, ids, new_ids, rerouting.projection), new_ids


def _launch_selection(
    arguments: dict,
    num_tokens: int,
    e_block: int,
    tokens: int,
    statistics: tuple[Tensor, Tensor] | None = None,
    real: Tensor | None = None,
) -> None:
    # One token in one warp at 128 experts: four scores a lane, K short reductions without a barrier.
    num_warps = tokens * (1 if e_block <= 256 else 4) if statistics else 1 if e_block <= 256 else 4
    mass, slots = statistics or (arguments["weights_ptr"], arguments["ids_ptr"])
    # Every row of statistics is written, also those of no token.
    launchable(route_kernel)[(ROWS if statistics else triton.cdiv(num_tokens, tokens),)](
        **arguments, mass_ptr=mass, slots_ptr=slots, HAS_STATISTICS=statistics is not None, TOKENS=tokens,
        # Without a number of tokens the pointer is not read; any tensor will do.
        real_ptr=arguments["logits_ptr"] if real is None else real, HAS_REAL=real is not None,
        num_warps=min(num_warps, 16),
    )  # fmt: skip


def _launch_filled(
    arguments: dict, rows: Tensor, bias: Tensor | None, scoring: Scoring, rerouting: Rerouting
) -> tuple[Tensor, Tensor]:
    """Selection and filling; the first launch sums the statistics as well where few tokens a row are enough."""
    weights, ids, e_block = arguments["weights_ptr"], arguments["ids_ptr"], arguments["E_BLOCK"]
    flat_ids, flat_weights = ids.view(-1, scoring.top_k), weights.view(-1, scoring.top_k)
    groups = scoring.num_groups, scoring.top_groups, scoring.group_score
    ranking = Ranking(rows, scoring.scoring, None, bias, *groups)
    keeping = Keeping(rerouting.select_top_k, rerouting.threshold, rerouting.min_active, rerouting.max_active)
    real, rerouted = rerouting.real_tokens, rerouting.rerouted_tokens
    # Few classes: with a symbolic T each is one more compiled graph. Statistics of the first launch are of all tokens.
    fits = (n for n in FILL_TOKENS if guard_or_false(rows.shape[0] <= n * ROWS))
    tokens = next(fits, None) if real is None and rerouted is None else None
    if tokens is None:
        _launch_selection(arguments, rows.shape[0], e_block, 1, real=real)
        taking_part = None if rerouted is None else first_tokens(flat_ids, rerouted)
        new_ids, new_weights = launch_fill(flat_ids, flat_weights, ranking, keeping, taking_part)
        new_weights, new_ids = of_these(taking_part, (new_weights, new_ids), (flat_weights, flat_ids))
    else:
        shape = (ROWS, int(rows.shape[1]))
        mass = torch.empty(shape, dtype=torch.float32, device=rows.device)
        slots = torch.empty(shape, dtype=torch.int32, device=rows.device)
        _launch_selection(arguments, rows.shape[0], e_block, tokens, (mass, slots))
        new_ids, new_weights = launch_filling(flat_ids, flat_weights, ranking, keeping, (mass, slots))
    return new_weights.view(weights.shape), new_ids.view(ids.shape)


def _arguments(
    rows: Tensor, bias: Tensor | None, weights: Tensor, ids: Tensor, scoring: Scoring, narrow: bool, e_block: int
) -> dict:
    """What both kernels take."""
    return {
        "logits_ptr": rows,
        # Without a bias the pointer is not read; any tensor will do.
        "bias_ptr": rows if bias is None else bias.contiguous(),
        "weights_ptr": weights,
        "ids_ptr": ids,
        "num_tokens": rows.shape[0],
        "stride_t": rows.stride(0),
        "epsilon": scoring.epsilon,
        "scale": scoring.scale,
        "K": scoring.top_k,
        "E": int(rows.shape[1]),
        "SCORING": scoring.scoring,
        "RENORMALIZE": scoring.renormalize,
        "HAS_BIAS": bias is not None,
        "GROUPS": scoring.num_groups,
        "TOP_GROUPS": scoring.top_groups,
        "TOP2": scoring.group_score == "top2",
        "OUTSIDE_ZERO": scoring.outside_zero,
        "G_BLOCK": triton.next_power_of_2(scoring.num_groups),
        "NARROW": narrow,
        "K_BLOCK": triton.next_power_of_2(scoring.top_k),
        "E_BLOCK": e_block,
    }


def _rerouting_arguments(rerouting: Rerouting, rows: Tensor) -> dict:
    """What re-routing takes beside."""
    assert rerouting.similarity is not None
    projection = rerouting.projection
    return {
        "sim_ptr": rerouting.similarity.contiguous(),
        "projection_ptr": rows if projection is None else projection.contiguous(),
        "threshold": rerouting.threshold,
        "min_active": rerouting.min_active,
        "max_active": rerouting.max_active,
        "SELECT": rerouting.select_top_k,
        "HAS_MIN": rerouting.min_active > 0,
        "HAS_MAX": rerouting.max_active > 0,
        "HAS_PROJECTION": projection is not None,
    }
