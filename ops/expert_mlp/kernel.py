"""The Triton kernels of `sere::expert_mlp` and their launcher.

Imported only when a CUDA tensor arrives, and by the interpreter tests.

Decoding streams the weights of the active experts; everything else is small beside them. So a program owns a few
output columns of one expert and reads their weights from end to end, for all slots of that expert at once:

1. `gate_up_kernel`: first projection and activation, one row for each slot, in the order of experts. Each program finds
   out by itself which experts are active and which slots are its expert's, and leaves that behind for
2. `down_kernel`: second projection, bias and router weight, fp32, one row for each slot, in the caller's order.
3. The sum over a token's K rows is ATen, in slot order, so that Inductor fuses it with what follows the layer.

The projections' programs stay on the GPU and walk over (active expert, columns): how many there are is known on the
device alone, and a program for each possible one would spend more time on starting than on S = 1's weights. No float
atomics: the result is deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ..launching import launchable
from .mxfp4 import MX_BLOCK, MX_WORD
from .projection import MX, WORD, project, project_pair, row_ptrs, scale_rows, scales_of, stored_column
from .reference import SCALE_BLOCK, gate_width, round_to_fp8
from .tiles import FEW_TILES, MANY_SLOTS, MANY_SLOTS_PER_EXPERT, TILE_COLUMNS, LaunchConfig, launch_config

# A kernel loads ids itself: torch's analysis of what a kernel writes takes every pointer that a function is given for
# the origin of its result, and ids that "are written" through an address made of them would be copied before each call.


@triton.jit
def place_of(slot, stride_t, stride_k, K: tl.constexpr):
    """Offsets of slots in [T, K]."""
    return (slot // K).to(tl.int64) * stride_t + (slot % K) * stride_k


@triton.jit
def group_of(ids, inside, E: tl.constexpr):
    """The expert that each slot names; E where it names none, E + 1 where inside is false."""
    group = tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)
    return tl.where(inside, group, E + 1)


@triton.jit
def used_words(group, E: tl.constexpr, WORDS: tl.constexpr):
    """[WORDS, slots]: the word that holds the bit of each slot's expert has that bit."""
    bit = tl.where(group < E, 1 << (group & 31), 0)
    return tl.where((group >> 5)[None, :] == tl.arange(0, WORDS)[:, None], bit[None, :], 0)


@triton.jit
def ranks(words, WORDS: tl.constexpr):
    """[WORDS * 32]: the place of every used expert in the ascending list of them, -1 for others; and their number."""
    bits = (tl.reduce(words, 1, _or)[:, None] >> tl.arange(0, 32)[None, :]) & 1
    used = tl.reshape(bits, (WORDS * 32,))
    return tl.where(used != 0, tl.cumsum(used, axis=0) - 1, -1), tl.sum(used)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def cut(num_active, num_programs, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr):
    """(tiles, width): into how many tiles of how many columns, BLOCK_N at most, each expert's COLUMNS are cut.

    As narrow as they can be without one more round of the programs, so that the last round is as full as the others.
    """
    LEAST: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    experts = tl.maximum(num_active, 1)
    # One item of all rounds is for the slots of no expert.
    rounds = tl.cdiv(experts * LEAST + 1, num_programs)
    tiles = tl.maximum((rounds * num_programs - 1) // experts, LEAST)
    width = tl.minimum(tl.cdiv(tl.cdiv(COLUMNS, tiles), ALIGN) * ALIGN, BLOCK_N)
    return tl.cdiv(COLUMNS, width), tl.multiple_of(width, ALIGN)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1 / (1 + tl.exp(-x))


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The plain activations, in fp32."""
    if NAME == "silu":
        return x * sigmoid(x)
    elif NAME == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "relu":
        return tl.maximum(x, 0.0)
    else:
        tl.static_assert(NAME == "relu2")
        x = tl.maximum(x, 0.0)
        return x * x


@triton.jit
def combine(gate, up, NAME: tl.constexpr):
    """The gated activations, in fp32."""
    if NAME == "gpt_oss":
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0)
        return (up + 1) * gate * sigmoid(1.702 * gate)
    else:
        return activate(gate, NAME) * up


@triton.jit
def gate_up_tile(
    x_ptr, w_ptr, b_ptr, s_ptr, act_ptr, order_ptr, first, last, column, width, stride_n, stride_d,
    K: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, SCALE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Write act[first : first + M, column : column + width] of one expert, whose weights begin at w_ptr, and so on.

    width is N, or less and a multiple of ALIGN.
    """
    MASK_N: tl.constexpr = ALIGN < N or INNER % N != 0
    row = first + tl.arange(0, M)
    inside = row < last
    token = tl.load(order_ptr + row, mask=inside, other=0) // K
    STEP: tl.constexpr = BLOCK_K // WORD if SCALE == MX else BLOCK_K
    d = tl.arange(0, STEP)
    x_ptrs = x_ptr + token[:, None] * HIDDEN + d[None, :]
    n = column + tl.arange(0, N)
    is_mine = (n < column + width) & (n < INNER)
    # A row outside has some row's scale: what it gives is not stored.
    safe = tl.minimum(n, INNER - 1)
    s_ptrs = scale_rows(s_ptr, safe, HIDDEN, SCALE) if SCALE else s_ptr
    if not GATED:
        w_ptrs = row_ptrs(w_ptr, n, d, stride_n, stride_d, SCALE)
        x = project(x_ptrs, w_ptrs, s_ptrs, inside[:, None], is_mine[:, None], STEP, STEP * stride_d,
                    HIDDEN, M, N, BLOCK_K, MASK_N, SWAP, SCALE)  # fmt: skip
        if HAS_BIAS:
            x += tl.load(b_ptr + n, mask=is_mine, other=0.0).to(tl.float32)[None, :]
        act = activate(x, ACTIVATION)
    else:
        if INTERLEAVED:
            # One tile of 2 N rows, so that a transposed layout is read in runs; the pairs are taken apart after.
            p = 2 * column + tl.arange(0, 2 * N)
            both_mine = (p < 2 * (column + width)) & (p < 2 * INNER)
            w_ptrs = row_ptrs(w_ptr, p, d, stride_n, stride_d, SCALE)
            s_both = scale_rows(s_ptr, tl.minimum(p, 2 * INNER - 1), HIDDEN, SCALE) if SCALE else s_ptr
            both = project(x_ptrs, w_ptrs, s_both, inside[:, None], both_mine[:, None], STEP, STEP * stride_d,
                           HIDDEN, M, 2 * N, BLOCK_K, MASK_N, SWAP, SCALE)  # fmt: skip
            if HAS_BIAS:
                both += tl.load(b_ptr + p, mask=both_mine, other=0.0).to(tl.float32)[None, :]
            gate, up = tl.split(tl.reshape(both, (M, N, 2)))
        else:
            w_ptrs = row_ptrs(w_ptr, n, d, stride_n, stride_d, SCALE)
            s_up_ptrs = scale_rows(s_ptr, INNER + safe, HIDDEN, SCALE) if SCALE else s_ptr
            gate, up = project_pair(x_ptrs, w_ptrs, s_ptrs, s_up_ptrs, inside[:, None], is_mine[:, None], STEP,
                                    STEP * stride_d, INNER * stride_n, HIDDEN, M, N, BLOCK_K, MASK_N,
                                    SWAP, SCALE)  # fmt: skip
            if HAS_BIAS:
                gate += tl.load(b_ptr + n, mask=is_mine, other=0.0).to(tl.float32)[None, :]
                up += tl.load(b_ptr + INNER + n, mask=is_mine, other=0.0).to(tl.float32)[None, :]
        act = combine(gate, up, ACTIVATION)
    out_ptrs = act_ptr + row[:, None] * INNER + stored_column(n, INNER, SCALE)[None, :]
    tl.store(out_ptrs, act.to(act_ptr.dtype.element_ty), mask=inside[:, None] & is_mine[None, :])


@triton.jit(do_not_specialize=["num_slots"])
def plan_kernel(
    ids_ptr, order_ptr, active_ptr, first_ptr, num_slots, stride_t, stride_k,
    K: tl.constexpr, E: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write what rows are, as `gate_up_kernel` says it: a program per expert, and one for slots that name none."""
    lane = tl.arange(0, CHUNK)
    expert = tl.program_id(0)
    words = tl.zeros([WORDS, CHUNK], tl.int32)
    before = tl.zeros([CHUNK], tl.int32)
    for start in range(0, num_slots, CHUNK):
        inside = start + lane < num_slots
        ids = tl.load(ids_ptr + place_of(start + lane, stride_t, stride_k, K), mask=inside, other=-1)
        group = group_of(ids, inside, E)
        words |= used_words(group, E, WORDS)
        before += (group < expert).to(tl.int32)
    rank, num_active = ranks(words, WORDS)
    first = tl.sum(before)
    last = first
    for start in range(0, num_slots, CHUNK):
        inside = start + lane < num_slots
        ids = tl.load(ids_ptr + place_of(start + lane, stride_t, stride_k, K), mask=inside, other=-1)
        mine = (group_of(ids, inside, E) == expert).to(tl.int32)
        tl.store(order_ptr + last + tl.cumsum(mine, axis=0) - 1, start + lane, mask=mine != 0)
        last += tl.sum(mine)
    which = tl.sum(tl.where(tl.arange(0, WORDS * 32) == expert, rank, 0))
    if expert == E:
        tl.store(active_ptr + E, num_active)
        tl.store(first_ptr + num_active, first)
    elif last > first:
        tl.store(active_ptr + which, expert)
        tl.store(first_ptr + which, first)


@triton.jit(do_not_specialize=["num_slots"])
def gate_up_kernel(
    x_ptr, w_ptr, b_ptr, s_ptr, ids_ptr, act_ptr, order_ptr, active_ptr, first_ptr, num_slots, stride_t, stride_k,
    stride_e, stride_n, stride_d,
    K: tl.constexpr, E: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr,
    SMALL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    SCALE: tl.constexpr, ALIGN: tl.constexpr, PLANNED: tl.constexpr,
):  # fmt: skip
    """Write act [T * K, INNER], rows grouped by expert: some columns of one expert at a time. And, unless they are
    PLANNED, what rows are:

    order [T * K]: the slots grouped by expert, then those that name none. active [E + 1]: the active experts,
    ascending; their number A is at [E]. first [E + 1]: where the group of each active expert begins in order; at [A]
    where the last one ends.
    """
    COLUMNS: tl.constexpr = 2 * INNER if GATED else INNER
    lane = tl.arange(0, CHUNK)
    if PLANNED:
        num_active = tl.load(active_ptr + E)
    else:
        words = tl.zeros([WORDS, CHUNK], tl.int32)
        for start in range(0, num_slots, CHUNK):
            inside = start + lane < num_slots
            ids = tl.load(ids_ptr + place_of(start + lane, stride_t, stride_k, K), mask=inside, other=-1)
            words |= used_words(group_of(ids, inside, E), E, WORDS)
        rank, num_active = ranks(words, WORDS)
        tl.store(active_ptr + E, num_active)  # all programs write the same
    tiles, width = cut(num_active, tl.num_programs(0), INNER, BLOCK_N, ALIGN)
    # Without a plan the last item is the group of slots that name no expert.
    for item in range(tl.program_id(0), num_active * tiles + (0 if PLANNED else 1), tl.num_programs(0)):
        which = item // tiles
        column = item % tiles * width
        if PLANNED:
            expert = tl.load(active_ptr + which)
            first = tl.load(first_ptr + which)
            last = tl.load(first_ptr + which + 1)
        else:
            expert = tl.sum(tl.where(rank == which, tl.arange(0, WORDS * 32), 0))
            expert = tl.where(which < num_active, expert, E)
            before = tl.zeros([CHUNK], tl.int32)
            for start in range(0, num_slots, CHUNK):
                inside = start + lane < num_slots
                ids = tl.load(ids_ptr + place_of(start + lane, stride_t, stride_k, K), mask=inside, other=-1)
                before += (group_of(ids, inside, E) < expert).to(tl.int32)
            first = tl.sum(before)
            last = first
            for start in range(0, num_slots, CHUNK):
                inside = start + lane < num_slots
                ids = tl.load(ids_ptr + place_of(start + lane, stride_t, stride_k, K), mask=inside, other=-1)
                mine = (group_of(ids, inside, E) == expert).to(tl.int32)
                # All programs of an expert write the same; each waits for its own.
                tl.store(order_ptr + last + tl.cumsum(mine, axis=0) - 1, start + lane, mask=mine != 0)
                last += tl.sum(mine)
            tl.debug_barrier()
            if column == 0:
                tl.store(active_ptr + which, expert)
                tl.store(first_ptr + which, first)
        w, b = w_ptr + expert.to(tl.int64) * stride_e, b_ptr + expert * COLUMNS
        s = scales_of(s_ptr, expert, COLUMNS, HIDDEN, SCALE)
        if which < num_active:
            if last - first <= SMALL:
                gate_up_tile(x_ptr, w, b, s, act_ptr, order_ptr, first, last, column, width, stride_n, stride_d, K,
                             HIDDEN, INNER, ACTIVATION, GATED, INTERLEAVED, HAS_BIAS, SMALL, BLOCK_N, BLOCK_K, SWAP,
                             SCALE, ALIGN)  # fmt: skip
            else:
                for m in range(first, last, BLOCK_M):
                    gate_up_tile(x_ptr, w, b, s, act_ptr, order_ptr, m, last, column, width, stride_n, stride_d, K,
                                 HIDDEN, INNER, ACTIVATION, GATED, INTERLEAVED, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K,
                                 SWAP, SCALE, ALIGN)  # fmt: skip


@triton.jit
def down_tile(
    act_ptr, w_ptr, b_ptr, s_ptr, weights_ptr, out_ptr, order_ptr, first, last, column, stride_n, stride_d, stride_t,
    stride_k,
    K: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr, HAS_BIAS: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Write the rows order[first : first + M] of out, columns column : column + N, for one expert."""
    MASK_N: tl.constexpr = HIDDEN % N != 0
    row = first + tl.arange(0, M)
    inside = row < last
    slot = tl.load(order_ptr + row, mask=inside, other=0)
    STEP: tl.constexpr = BLOCK_K // WORD if SCALE == MX else BLOCK_K
    d = tl.arange(0, STEP)
    n = column + tl.arange(0, N)
    x_ptrs = act_ptr + row[:, None] * INNER + d[None, :]
    w_ptrs = row_ptrs(w_ptr, n, d, stride_n, stride_d, SCALE)
    s_ptrs = scale_rows(s_ptr, tl.minimum(n, HIDDEN - 1), INNER, SCALE) if SCALE else s_ptr
    x = project(x_ptrs, w_ptrs, s_ptrs, inside[:, None], (n < HIDDEN)[:, None], STEP, STEP * stride_d,
                INNER, M, N, BLOCK_K, MASK_N, SWAP, SCALE)  # fmt: skip
    if HAS_BIAS:
        x += tl.load(b_ptr + n, mask=n < HIDDEN, other=0.0).to(tl.float32)[None, :]
    weight = tl.load(weights_ptr + (slot // K) * stride_t + (slot % K) * stride_k, mask=inside, other=0.0)
    x *= weight.to(tl.float32)[:, None]
    out_ptrs = out_ptr + slot.to(tl.int64)[:, None] * HIDDEN + n[None, :]
    tl.store(out_ptrs, x, mask=inside[:, None] & (n < HIDDEN)[None, :])


@triton.jit(do_not_specialize=["num_slots"])
def down_kernel(
    act_ptr, w_ptr, b_ptr, s_ptr, weights_ptr, out_ptr, order_ptr, active_ptr, first_ptr, num_slots, stride_e, stride_n,
    stride_d, stride_t, stride_k,
    K: tl.constexpr, E: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr, HAS_BIAS: tl.constexpr,
    SMALL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """Write out [T * K, HIDDEN] in fp32, 0 for slots of no expert: BLOCK_N columns of one expert at a time."""
    TILES: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    num_active = tl.load(active_ptr + E)
    for item in range(tl.program_id(0), num_active * TILES, tl.num_programs(0)):
        column = item % TILES * BLOCK_N
        expert = tl.load(active_ptr + item // TILES)
        first = tl.load(first_ptr + item // TILES)
        last = tl.load(first_ptr + item // TILES + 1)
        w = w_ptr + expert.to(tl.int64) * stride_e
        b = b_ptr + expert * HIDDEN
        s = scales_of(s_ptr, expert, HIDDEN, INNER, SCALE)
        if last - first <= SMALL:
            down_tile(act_ptr, w, b, s, weights_ptr, out_ptr, order_ptr, first, last, column, stride_n, stride_d,
                      stride_t, stride_k, K, HIDDEN, INNER, HAS_BIAS, SMALL, BLOCK_N, BLOCK_K, SWAP, SCALE)  # fmt: skip
        else:
            for m in range(first, last, BLOCK_M):
                down_tile(act_ptr, w, b, s, weights_ptr, out_ptr, order_ptr, m, last, column, stride_n, stride_d,
                          stride_t, stride_k, K, HIDDEN, INNER, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K, SWAP,
                          SCALE)  # fmt: skip
    n = tl.arange(0, BLOCK_N)
    for m in range(tl.load(first_ptr + num_active) + tl.program_id(0), num_slots, tl.num_programs(0)):
        row = out_ptr + tl.load(order_ptr + m).to(tl.int64) * HIDDEN
        for column in range(0, HIDDEN, BLOCK_N):
            tl.store(row + column + n, tl.zeros([BLOCK_N], tl.float32), mask=column + n < HIDDEN)


@triton.jit
def sum_slots_kernel(rows_ptr, out_ptr, K: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """Write out [T, HIDDEN]: the sums of K rows each of rows [T * K, HIDDEN] in fp32, BLOCK columns a program."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        total += tl.load(rows_ptr + (token * K + k) * HIDDEN + column, mask=column < HIDDEN, other=0.0)
    tl.store(out_ptr + token * HIDDEN + column, total.to(out_ptr.dtype.element_ty), mask=column < HIDDEN)


# Columns of a program of `sum_slots_kernel`: one warp, 8 numbers a thread.
SUM_BLOCK = 256


def multiplies_fp8(device: torch.device) -> bool:
    """Whether Triton can widen FP8 numbers on a GPU."""
    return not torch.cuda.is_initialized() or torch.cuda.get_device_capability(device) >= (8, 9)


def chunk_of(num_slots: int | torch.SymInt, num_experts: int, most: int) -> dict[str, int]:
    """How the slots are looked at: `WORDS` of 32 experts, `CHUNK` slots at a time, at most `most` words in all."""
    words = triton.next_power_of_2(triton.cdiv(num_experts, 32))
    chunk = triton.next_power_of_2(num_slots) if isinstance(num_slots, int) else 512
    return {"WORDS": words, "CHUNK": max(16, min(chunk, most // words))}


def scale_columns(scale: Tensor | None) -> int:
    """How many columns of a weight row share one of these scales, 0 without any: `SCALE` of the kernels."""
    if scale is None:
        return 0
    return MX_BLOCK if scale.dtype == torch.uint8 else SCALE_BLOCK


def launch_gate_up(
    hidden: Tensor,
    topk_ids: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    transposed: bool,
    config: LaunchConfig,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(act [T * K, I], order, active, first) of `gate_up_kernel`; T * K >= 1."""
    num_slots, top_k = topk_ids.shape[0] * topk_ids.shape[1], int(topk_ids.shape[1])
    num_experts, width = int(gate_up.shape[0]), int(hidden.shape[1])
    block = scale_columns(scale)
    if block == MX_BLOCK:  # see `stored_column`
        hidden = hidden.unflatten(1, (-1, MX_WORD)).transpose(1, 2)
    inner = int(gate_up.shape[2 if transposed else 1]) // gate_width(activation)
    act = torch.empty((num_slots, inner), dtype=hidden.dtype, device=hidden.device)
    order = torch.empty(num_slots, dtype=torch.int32, device=hidden.device)
    active, first = (torch.empty(num_experts + 1, dtype=torch.int32, device=hidden.device) for _ in range(2))
    chunks = chunk_of(num_slots, num_experts, config.chunk)
    if config.planned:
        launchable(plan_kernel)[(num_experts + 1,)](
            topk_ids, order, active, first, num_slots, topk_ids.stride(0), topk_ids.stride(1),
            K=top_k, E=num_experts, **chunks, num_warps=4,
        )  # fmt: skip
    # Where a bias is missing its pointer is not read; any tensor will do.
    launchable(gate_up_kernel)[(config.gate_up.programs(hidden.device),)](
        hidden.contiguous(), gate_up, hidden if gate_up_bias is None else gate_up_bias.contiguous(),
        hidden if scale is None else scale.contiguous(), topk_ids, act, order, active, first, num_slots,
        topk_ids.stride(0), topk_ids.stride(1), *_strides(gate_up, transposed),
        K=top_k, E=num_experts, HIDDEN=width, INNER=inner, ACTIVATION=activation.removesuffix("_glu"),
        GATED=gate_width(activation) == 2, INTERLEAVED=interleaved, HAS_BIAS=gate_up_bias is not None,
        SCALE=block, ALIGN=config.gate_up.step,
        PLANNED=config.planned, **chunks, **config.gate_up.arguments(),
    )  # fmt: skip
    return act, order, active, first


def launch_expert_mlp(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    transposed: bool,
    config: LaunchConfig | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    fp8_activations: bool = False,
    into: Tensor | None = None,
) -> Tensor:
    """`sere::expert_mlp` on checked arguments; `config` replaces the heuristics.

    `into`: contiguous [T, H] in the dtype of hidden, where the result is wanted; outside of a compiler, which
    makes the sum part of what follows, it saves a launch.

    `fp8_activations` rounds them to what their FP8 numbers stand for, which the kernels then have in the dtype of
    hidden: rounded once more, by 2^-9 of a number at most, where the FP8 number's own error is 2^-4.
    """
    num_tokens, num_slots = topk_ids.shape[0], int(topk_ids.shape[1])
    num_experts, width = int(down.shape[0]), int(hidden.shape[1])
    block = scale_columns(down_scale)
    inner = int(down.shape[1 if transposed else 2]) * (2 if block == MX_BLOCK else 1)
    if guard_or_false(num_tokens == 0) or num_slots == 0:
        zeros = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        return zeros if into is None else into.zero_()
    many = guard_or_false(num_tokens * num_slots > MANY_SLOTS_PER_EXPERT * num_experts)
    # No guard for it: it would halve the sizes that a graph of any size is for.
    planned = isinstance(num_tokens, int) and num_tokens * num_slots >= MANY_SLOTS
    few = num_experts * triton.cdiv(width, TILE_COLUMNS) < FEW_TILES
    config = config or launch_config(hidden.dtype, transposed, many, planned, block == MX_BLOCK, few)
    rounded = round_to_fp8(hidden).to(hidden.dtype) if fp8_activations else hidden
    act, *plan = launch_gate_up(
        rounded, topk_ids, gate_up, gate_up_bias, activation, interleaved, transposed, config, gate_up_scale
    )  # fmt: skip
    act = round_to_fp8(act).to(act.dtype) if fp8_activations else act
    out = torch.empty((num_tokens * num_slots, width), dtype=torch.float32, device=hidden.device)
    launchable(down_kernel)[(config.down.programs(hidden.device),)](
        act, down, act if down_bias is None else down_bias.contiguous(),
        act if down_scale is None else down_scale.contiguous(), topk_weights, out, *plan,
        num_tokens * num_slots, *_strides(down, transposed), topk_weights.stride(0), topk_weights.stride(1),
        K=num_slots, E=num_experts, HIDDEN=width, INNER=inner, HAS_BIAS=down_bias is not None,
        SCALE=block, **config.down.arguments(),
    )  # fmt: skip
    if into is None:
        return out.view(num_tokens, num_slots, width).sum(1).to(hidden.dtype)
    launchable(sum_slots_kernel)[(num_tokens, triton.cdiv(width, SUM_BLOCK))](
        out, into, K=num_slots, HIDDEN=width, BLOCK=SUM_BLOCK, num_warps=1
    )
    return into


def _strides(weight: Tensor, transposed: bool) -> tuple[int, int, int]:
    """Of expert, output column and depth."""
    expert, row, column = weight.stride()
    return (expert, column, row) if transposed else (expert, row, column)
