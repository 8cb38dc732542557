"""The Triton kernels of `sere::fill`. Imported only when a CUDA tensor arrives, and by the interpreter tests.

The programs cannot wait for each other without memory that something has to clear. So a first launch sums what its
tokens say about each expert into a row for each program (`sere::route` does that in the launch that selects), and in
the second each program adds these few rows up, finds the kept experts by itself and fills its own tokens' slots.
"""

import triton
import triton.language as tl

from ..route.kernel import limited_to_groups, load_rows, scores_of, sortable
from .statistics import load_statistics


@triton.jit
def count(flags):
    """How many of [1, N] are true."""
    return tl.sum(tl.sum(flags.to(tl.int32), axis=1), axis=0)


@triton.jit
def first_keys(keys, number, E_BLOCK: tl.constexpr):
    """Bool [1, E_BLOCK]: the `number` greatest of int32 keys, the lowest of equals."""
    # Two bits of the least of them at a time. A search takes few instructions: there is no cache for many here.
    cut = tl.full([], -0x80000000, tl.int32)
    bit = tl.full([], 1 << 30, tl.int32)
    for _ in range(16):
        taken = (count(keys >= cut + bit) >= number).to(tl.int32)
        taken += (count(keys >= cut + 2 * bit) >= number).to(tl.int32)
        taken += (count(keys >= cut + 3 * bit) >= number).to(tl.int32)
        cut += taken * bit
        bit = bit >> 2
    column = tl.arange(0, E_BLOCK)[None, :]
    equal = keys == cut
    room = number - count(keys > cut)
    least, most = room - room, room - room + E_BLOCK
    # Of equals as many as there is room for: the first column that leaves enough of them on its left.
    while (least < most) & (count(equal) > room):
        middle = (least + most) // 2
        enough = count(equal & (column < middle)) >= room
        least = tl.where(enough, least, middle + 1)
        most = tl.where(enough, middle, most)
    is_before = (column < most) | (count(equal) <= room)
    return (keys > cut) | (equal & is_before)


@triton.jit
def kept_experts(
    mass_ptr, slots_ptr, threshold, least, budget, K: tl.constexpr, SELECT: tl.constexpr, E: tl.constexpr,
    HAS_MAX: tl.constexpr, HAS_THRESHOLD: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, E_BLOCK: tl.constexpr,
):  # fmt: skip
    """Bool [1, E_BLOCK], as `kept_experts` of the reference."""
    mass, slots = load_statistics(mass_ptr, slots_ptr, E, ROWS, STEP, E_BLOCK)
    if HAS_MAX:
        number = budget
    else:
        width = tl.full([], SELECT, tl.int32)
        number = count((slots & ((1 << width) - 1)) != 0)
        while (number < least) & (width < K):
            width += 1
            number = count((slots & ((1 << width) - 1)) != 0)
    # First choices are 0 and above, by the bits of their masses; other experts in use below; the rest the least number.
    bits = mass.to(tl.int32, bitcast=True)
    keys = tl.where((slots & 1) != 0, bits, (bits ^ -0x80000000) + 1)
    keys = tl.where(slots != 0, keys, -0x80000000)
    used = slots != 0
    kept = used & first_keys(keys, number, E_BLOCK)
    if HAS_THRESHOLD:
        kept = kept | (used & (mass > threshold * tl.sum(mass, axis=1)[:, None]))
    return kept | (count(used & (kept == 0)) == 0)


@triton.jit
def choice_of(
    rows, token, choice_ptr, bias_ptr, num_tokens, choice_stride_t, SCORING: tl.constexpr, HAS_CHOICE: tl.constexpr,
    HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, G_BLOCK: tl.constexpr,
    E: tl.constexpr, E_BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """What ranks the experts of a token [TOKENS, E_BLOCK]: given, or from logits, bias and groups (closed: -inf)."""
    column = tl.arange(0, E_BLOCK)[None, :]
    if HAS_CHOICE:
        choice = load_rows(choice_ptr, token, num_tokens, choice_stride_t, E, E_BLOCK).to(tl.float32)
    elif HAS_BIAS or TOP_GROUPS < GROUPS:
        choice = scores_of(rows, SCORING)
        if HAS_BIAS:
            choice += tl.load(bias_ptr + column, mask=column < E, other=0.0).to(tl.float32)
        if TOP_GROUPS < GROUPS:
            choice = limited_to_groups(choice, E, E_BLOCK, GROUPS, TOP_GROUPS, TOP2, False, G_BLOCK, TOKENS)
    else:
        choice = rows
    return choice


@triton.jit
def scores_at(scores_ptr, token, ids, mask, greatest, stride_t, SCORING: tl.constexpr):
    """Scores [N, K_BLOCK] of some experts, of a softmax up to a factor of the token's; 0 where masked."""
    x = tl.load(scores_ptr + token.to(tl.int64)[:, None] * stride_t + ids, mask=mask, other=0.0).to(tl.float32)
    if SCORING == "sigmoid":
        x = scores_of(x, SCORING)
    elif SCORING != "scores":
        x = tl.exp(x - greatest)
    return tl.where(mask, x, 0.0)


@triton.jit
def filled_weights(
    scores_ptr, token, rows, expert, new_expert, is_expert, lost, filled, stored, stride_t, SCORING: tl.constexpr,
    WORTH: tl.constexpr, RESTORE: tl.constexpr,
):  # fmt: skip
    """fp32 [N, K_BLOCK]: the weights of the new experts, where a token loses any."""
    greatest = tl.max(rows, axis=1)[:, None]
    chosen = scores_at(scores_ptr, token, expert, is_expert, greatest, stride_t, SCORING)
    chosen = tl.sum(chosen, axis=1)[:, None]
    scores = scores_at(scores_ptr, token, new_expert, filled, greatest, stride_t, SCORING)
    old = stored.to(tl.float32)
    total = tl.sum(tl.where(is_expert, old, 0.0), axis=1)[:, None]
    worth = WORTH * tl.where(chosen > 0, total / chosen, 0.0)
    new = tl.where(lost, tl.where(filled, worth * scores, 0.0), old)
    sums = tl.sum(tl.where(is_expert, new, 0.0), axis=1)[:, None]
    return new * tl.exp2(RESTORE * tl.log2(tl.where((total > 0) & (sums > 0), total / sums, 1.0)))


@triton.jit(do_not_specialize=["num_tokens", "threshold", "least", "budget"])
def fill_kernel(
    ids_ptr, weights_ptr, scores_ptr, choice_ptr, bias_ptr, mass_ptr, slots_ptr, out_ids_ptr, out_weights_ptr,
    num_tokens, stride_t, stride_k, weight_stride_t, weight_stride_k, score_stride_t, choice_stride_t,
    threshold, least, budget,
    K: tl.constexpr, SELECT: tl.constexpr, E: tl.constexpr, SCORING: tl.constexpr, HAS_CHOICE: tl.constexpr,
    HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, G_BLOCK: tl.constexpr,
    HAS_MAX: tl.constexpr, HAS_THRESHOLD: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    K_BLOCK: tl.constexpr, E_BLOCK: tl.constexpr, WORTH: tl.constexpr, RESTORE: tl.constexpr, CLOSED: tl.constexpr,
):  # fmt: skip
    """Fill the slots of TOKENS consecutive tokens per program from ROWS rows of statistics."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, E_BLOCK)[None, :]
    slot = tl.arange(0, K_BLOCK)[None, :]
    inside = (token < num_tokens)[:, None] & (slot < K)
    offset = token.to(tl.int64)[:, None]
    # Asked for before the kept experts are known: the waits for memory overlap.
    ids = tl.load(ids_ptr + offset * stride_t + slot * stride_k, mask=inside, other=-1)
    stored = tl.load(weights_ptr + offset * weight_stride_t + slot * weight_stride_k, mask=inside, other=0.0)
    rows = load_rows(scores_ptr, token, num_tokens, score_stride_t, E, E_BLOCK).to(tl.float32)
    kept = kept_experts(mass_ptr, slots_ptr, threshold, least, budget, K, SELECT, E, HAS_MAX, HAS_THRESHOLD, ROWS,
                        STEP, E_BLOCK)  # fmt: skip
    choice = choice_of(rows, token, choice_ptr, bias_ptr, num_tokens, choice_stride_t, SCORING, HAS_CHOICE, HAS_BIAS,
                       GROUPS, TOP_GROUPS, TOP2, G_BLOCK, E, E_BLOCK, TOKENS)  # fmt: skip
    # int32 that sort like the scores; the least number where an expert is no candidate.
    keys = sortable(tl.where(choice > CLOSED, choice, CLOSED))
    keys = tl.where((column < E) & kept, keys, -0x80000000)
    is_expert = inside & (ids >= 0) & (ids < E)
    expert = tl.where(is_expert, ids, -1).to(tl.int32)
    # The number of a lost slot among its token's, from 1; 0 for others.
    place = tl.zeros([TOKENS, K_BLOCK], tl.int32)
    losses = tl.zeros([TOKENS, 1], tl.int32)
    for k in range(K):
        mine = tl.max(tl.where(slot == k, expert, -1), axis=1)[:, None]
        named = column == mine
        is_lost = (mine >= 0) & (tl.max((named & kept).to(tl.int32), axis=1)[:, None] == 0)
        losses += is_lost.to(tl.int32)
        place = tl.where(is_lost & (slot == k), losses, place)
        keys = tl.where(named, -0x80000000, keys)
    lost = place > 0
    filled = lost & (slot < 0)
    new_expert = expert
    for turn in range(1, tl.max(tl.max(losses, axis=1), axis=0) + 1):
        best = tl.max(keys, axis=1)[:, None]
        # The lowest of equals.
        winner = tl.min(tl.where(keys == best, column, E_BLOCK), axis=1)[:, None]
        mine = (place == turn) & (best > -0x80000000)
        new_expert = tl.where(mine, winner, new_expert)
        is_open = (best ^ ((best >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True) > CLOSED
        filled = filled | (mine & is_open)
        keys = tl.where(column == winner, -0x80000000, keys)
    new = filled_weights(scores_ptr, token, rows, expert, new_expert, is_expert, lost, filled, stored, score_stride_t,
                         SCORING, WORTH, RESTORE)  # fmt: skip
    # What a token does not lose it keeps bit for bit.
    changed = is_expert & (losses > 0)
    out = offset * K + slot
    tl.store(out_ids_ptr + out, tl.where(lost, new_expert.to(ids.dtype), ids), mask=inside)
    tl.store(out_weights_ptr + out, tl.where(changed, new.to(stored.dtype), stored), mask=inside)
