"""The Triton kernels of `sere::route`. Imported when a CUDA tensor arrives, and by interpreter tests.

Scores are compared as integers that sort like the floats, with the expert's number in the low bits, so that one
maximum gives score and number and equal scores have an order. 16-bit logits leave room for the number in 32 bits, for
which a warp has an instruction.

Re-routing in the same launch needs the best S experts of all tokens. Programs cannot wait for each other without memory
that something has to clear, which would be a launch more; so each program finds them for all tokens by itself, from
logits in L2. That is faster than two launches for few experts only, see `one_launch` in launch.py.
"""

import triton
import triton.language as tl

from ..fill.statistics import count_slot, store_statistics
from ..reroute.kernel import leading_tokens, most_similar, similarity_rows


@triton.jit
def sortable(scores):
    """int32 that sort like the fp32 scores; 0.0 and -0.0 are equal, NaN is above everything, as in torch.topk."""
    key = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    key = key ^ ((key >> 31) & 0x7FFFFFFF)
    return tl.where(scores != scores, 0x7FFFFFFF, key)


@triton.jit
def softmax_rows(x):
    """Softmax over the last of two dimensions; columns outside hold -inf."""
    numerator = tl.exp(x - tl.max(x, axis=1)[:, None])
    return numerator / tl.sum(numerator, axis=1)[:, None]


@triton.jit
def scores_of(logits, SCORING: tl.constexpr):
    """fp32 [N, E_BLOCK] of logits with -inf outside."""
    if SCORING == "softmax":
        return softmax_rows(logits)
    elif SCORING == "sigmoid":
        return 1 / (1 + tl.exp(-logits))
    else:
        return logits


@triton.jit
def selection_keys(choice, E: tl.constexpr, E_BLOCK: tl.constexpr, NARROW: tl.constexpr):
    """Integers [N, E_BLOCK] that sort like scores, among equals the lowest expert first; the least number outside.

    int64, or with NARROW int32: of an fp32 that a 16-bit float became the low 13 bits say nothing.
    """
    column = tl.arange(0, E_BLOCK)[None, :]
    if NARROW:
        keys = (sortable(choice) & -8192) | (E_BLOCK - 1 - column)
        return tl.where(column < E, keys, -0x80000000)
    else:
        keys = (sortable(choice).to(tl.int64) << 32) | (E_BLOCK - 1 - column)
        # Below every real candidate: -inf is -0x7F800001 as a key.
        return tl.where(column < E, keys, -0x8000000000000000)


@triton.jit
def without(keys, winner, NARROW: tl.constexpr):
    """Keys [N, E_BLOCK] with the least number for each row's winner [N, 1]."""
    if NARROW:
        return tl.where(keys == winner, -0x80000000, keys)
    else:
        return tl.where(keys == winner, -0x8000000000000000, keys)


@triton.jit
def expert_of(winner, E_BLOCK: tl.constexpr, NARROW: tl.constexpr):
    """The expert that a key stands for."""
    if NARROW:
        return E_BLOCK - 1 - (winner & 8191)
    else:
        return E_BLOCK - 1 - (winner & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def limited_to_groups(
    choice, E: tl.constexpr, E_BLOCK: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    TOP2: tl.constexpr, OUTSIDE_ZERO: tl.constexpr, G_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Scores [ROWS, E_BLOCK] with 0 or -inf outside the best groups."""
    column = tl.arange(0, E_BLOCK)[None, :]
    group = column // (E // GROUPS)
    place = tl.arange(0, G_BLOCK)[None, :]
    best = tl.full([ROWS, G_BLOCK], float("-inf"), tl.float32)
    for g in range(GROUPS):
        mine = tl.where((group == g) & (column < E), choice, float("-inf"))
        score = tl.max(mine, axis=1)[:, None]
        if TOP2:
            first = tl.min(tl.where(mine == score, column, E_BLOCK), axis=1)[:, None]
            score += tl.max(tl.where(column == first, float("-inf"), mine), axis=1)[:, None]
        best = tl.where(place == g, score, best)
    keys = selection_keys(best, GROUPS, G_BLOCK, False)
    is_kept = tl.zeros([ROWS, E_BLOCK], tl.int1)
    for _ in range(TOP_GROUPS):
        winner = tl.max(keys, axis=1)[:, None]
        is_kept = is_kept | (group == expert_of(winner, G_BLOCK, False))
        keys = without(keys, winner, False)
    return tl.where(is_kept, choice, 0.0 if OUTSIDE_ZERO else float("-inf"))


@triton.jit
def choice_keys(
    logits, scores, bias_ptr, HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, OUTSIDE_ZERO: tl.constexpr, G_BLOCK: tl.constexpr,
    E: tl.constexpr, E_BLOCK: tl.constexpr, NARROW: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`selection_keys` of what decides: the logits where scoring keeps their order, else scores, bias and groups."""
    if HAS_BIAS:
        column = tl.arange(0, E_BLOCK)[None, :]
        choice = scores + tl.load(bias_ptr + column, mask=column < E, other=0.0).to(tl.float32)
    elif TOP_GROUPS < GROUPS:
        choice = scores
    else:
        choice = logits
    if TOP_GROUPS < GROUPS:
        choice = limited_to_groups(choice, E, E_BLOCK, GROUPS, TOP_GROUPS, TOP2, OUTSIDE_ZERO, G_BLOCK, ROWS)
    return selection_keys(choice, E, E_BLOCK, NARROW)


@triton.jit
def score_of(winner, NARROW: tl.constexpr):
    """The fp32 that a key was made of."""
    key = tl.where(winner < 0, winner | 8191, winner & -8192) if NARROW else (winner >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def select(
    logits, bias_ptr, epsilon, SCORING: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, OUTSIDE_ZERO: tl.constexpr,
    G_BLOCK: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr, E: tl.constexpr, E_BLOCK: tl.constexpr,
    NARROW: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Weights in fp32, before the scale, and ids [ROWS, K_BLOCK] of logits [ROWS, E_BLOCK]."""
    LOGITS_DECIDE: tl.constexpr = not HAS_BIAS and TOP_GROUPS == GROUPS
    column = tl.arange(0, E_BLOCK)[None, :]
    slot = tl.arange(0, K_BLOCK)[None, :]
    scores = logits if LOGITS_DECIDE else scores_of(logits, SCORING)
    keys = choice_keys(logits, scores, bias_ptr, HAS_BIAS, GROUPS, TOP_GROUPS, TOP2, OUTSIDE_ZERO, G_BLOCK,
                       E, E_BLOCK, NARROW, ROWS)  # fmt: skip
    winners = tl.zeros([ROWS, K_BLOCK], tl.int32 if NARROW else tl.int64)
    weights = tl.zeros([ROWS, K_BLOCK], tl.float32)
    # Not unrolled: code that is not in a cache costs more than the loop.
    for k in range(K):
        winner = tl.max(keys, axis=1)[:, None]
        winners = tl.where(slot == k, winner, winners)
        if not LOGITS_DECIDE:
            expert = expert_of(winner, E_BLOCK, NARROW)
            weights = tl.where(slot == k, tl.sum(tl.where(column == expert, scores, 0.0), axis=1)[:, None], weights)
        keys = without(keys, winner, NARROW)
    ids = expert_of(winners, E_BLOCK, NARROW)
    if LOGITS_DECIDE:
        weights = score_of(winners, NARROW)
    weights = tl.where(slot < K, weights, float("-inf"))
    if LOGITS_DECIDE:
        if SCORING == "softmax":
            greatest = tl.max(logits, axis=1)[:, None]
            weights = tl.exp(weights - greatest) / tl.sum(tl.exp(logits - greatest), axis=1)[:, None]
        elif SCORING == "sigmoid":
            weights = scores_of(weights, SCORING)
    if SCORING == "softmax_after":
        weights = softmax_rows(weights)
    if RENORMALIZE:
        weights = weights / (tl.sum(tl.where(slot < K, weights, 0.0), axis=1)[:, None] + epsilon)
    return weights, ids


@triton.jit
def load_rows(logits_ptr, token, num_tokens, stride_t, E: tl.constexpr, E_BLOCK: tl.constexpr):
    """Logits of some tokens as they are stored, -inf outside."""
    column = tl.arange(0, E_BLOCK)[None, :]
    inside = (token < num_tokens)[:, None] & (column < E)
    return tl.load(logits_ptr + token.to(tl.int64)[:, None] * stride_t + column, mask=inside, other=float("-inf"))


@triton.jit(do_not_specialize=["num_tokens", "epsilon", "scale"])
def route_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, mass_ptr, slots_ptr, real_ptr, num_tokens, stride_t, epsilon, scale,
    K: tl.constexpr, E: tl.constexpr, SCORING: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, OUTSIDE_ZERO: tl.constexpr,
    G_BLOCK: tl.constexpr, NARROW: tl.constexpr, HAS_STATISTICS: tl.constexpr, HAS_REAL: tl.constexpr,
    TOKENS: tl.constexpr, K_BLOCK: tl.constexpr, E_BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights and ids [T, K] of TOKENS consecutive rows of logits [T, E] per program, and a row of their statistics."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    logits = load_rows(logits_ptr, token, num_tokens, stride_t, E, E_BLOCK).to(tl.float32)
    weights, ids = select(logits, bias_ptr, epsilon, SCORING, RENORMALIZE, HAS_BIAS, GROUPS, TOP_GROUPS, TOP2,
                          OUTSIDE_ZERO, G_BLOCK, K, K_BLOCK, E, E_BLOCK, NARROW, TOKENS)  # fmt: skip
    slot = tl.arange(0, K_BLOCK)[None, :]
    offset = token.to(tl.int64)[:, None] * K + slot
    stored = (token < num_tokens)[:, None] & (slot < K)
    weights = (weights * scale).to(weights_ptr.dtype.element_ty)
    if HAS_REAL:
        real = (token < leading_tokens(real_ptr, num_tokens, HAS_REAL))[:, None]
        weights = tl.where(real, weights, 0.0).to(weights.dtype)
        ids = tl.where(real, ids, -1)
    tl.store(weights_ptr + offset, weights, mask=stored)
    tl.store(ids_ptr + offset, ids.to(ids_ptr.dtype.element_ty), mask=stored)
    if HAS_STATISTICS:
        mass = tl.zeros([TOKENS, E_BLOCK], tl.float32)
        slots = tl.zeros([TOKENS, E_BLOCK], tl.int32)
        for k in range(K):
            expert = tl.max(tl.where(slot == k, ids, -1), axis=1)
            weight = tl.sum(tl.where(slot == k, weights.to(tl.float32), 0.0), axis=1)
            mass, slots = count_slot(expert, weight, token < num_tokens, mass, slots, k, E_BLOCK)
        store_statistics(mass, slots, mass_ptr, slots_ptr, tl.program_id(0), E, E_BLOCK)


@triton.jit
def chosen_experts(
    logits_ptr, bias_ptr, num_tokens, stride_t, width, SCORING: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, OUTSIDE_ZERO: tl.constexpr,
    G_BLOCK: tl.constexpr, E: tl.constexpr, E_BLOCK: tl.constexpr, NARROW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """0 or 1 [E_BLOCK]: the experts that some token has among its `width` best."""
    column = tl.arange(0, E_BLOCK)[None, :]
    row = tl.arange(0, CHUNK)
    found = tl.zeros([CHUNK, E_BLOCK], tl.int32)
    coming = load_rows(logits_ptr, row, num_tokens, stride_t, E, E_BLOCK)
    for start in range(0, num_tokens, CHUNK):
        logits = coming.to(tl.float32)
        # Asked for before this chunk is worked on: L2 is hundreds of cycles away.
        coming = load_rows(logits_ptr, start + CHUNK + row, num_tokens, stride_t, E, E_BLOCK)
        scores = scores_of(logits, SCORING) if HAS_BIAS or TOP_GROUPS < GROUPS else logits
        keys = choice_keys(logits, scores, bias_ptr, HAS_BIAS, GROUPS, TOP_GROUPS, TOP2, OUTSIDE_ZERO,
                           G_BLOCK, E, E_BLOCK, NARROW, CHUNK)  # fmt: skip
        left = keys
        for _ in range(width):
            left = without(left, tl.max(left, axis=1)[:, None], NARROW)
        found = found | ((left != keys) & (start + row < num_tokens)[:, None] & (column < E)).to(tl.int32)
    return tl.max(found, axis=0)


@triton.jit
def primary_experts(
    logits_ptr, bias_ptr, num_tokens, stride_t, min_active, max_active, SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr,
    OUTSIDE_ZERO: tl.constexpr, G_BLOCK: tl.constexpr, K: tl.constexpr, SELECT: tl.constexpr, E: tl.constexpr,
    E_BLOCK: tl.constexpr, NARROW: tl.constexpr, HAS_MIN: tl.constexpr, HAS_MAX: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """0 or 1 [E_BLOCK]: the union of the best S', by the rules of `sere::reroute`; all 1 where S' is K."""
    start = tl.full([], SELECT, tl.int32)
    if HAS_MIN and not HAS_MAX:
        # T tokens name at most T * S' experts: no smaller width can be enough.
        start = tl.minimum(tl.maximum(start, (min_active + num_tokens - 1) // num_tokens), K)
    width, taken, active = start, start, start - start
    bits = tl.zeros([E_BLOCK], tl.int32)
    more = (start > 0).to(tl.int32)
    # One loop for all rules, so that its body is there once. Unions grow with the width.
    while more != 0:
        union = chosen_experts(logits_ptr, bias_ptr, num_tokens, stride_t, width, SCORING, HAS_BIAS, GROUPS,
                               TOP_GROUPS, TOP2, OUTSIDE_ZERO, G_BLOCK, E, E_BLOCK, NARROW, CHUNK)  # fmt: skip
        size = tl.sum(union)
        fits = (size <= max_active) if HAS_MAX else (size < 0)
        is_taken = (width == start) | fits
        if HAS_MIN:
            is_taken = is_taken | (active < min_active)
        bits = tl.where(is_taken, union, bits)
        taken = tl.where(is_taken, width, taken)
        active = tl.where(is_taken, size, active)
        wanted = (fits | (active < min_active)) if HAS_MIN else fits
        more = (is_taken & wanted & (width < K)).to(tl.int32)
        width += 1
    return tl.where(taken < K, bits, 1)


@triton.jit(do_not_specialize=["num_tokens", "epsilon", "scale", "threshold", "min_active", "max_active"])
def route_reroute_kernel(
    logits_ptr, bias_ptr, sim_ptr, projection_ptr, weights_ptr, ids_ptr, num_tokens, stride_t, epsilon, scale,
    threshold, min_active, max_active,
    K: tl.constexpr, SELECT: tl.constexpr, E: tl.constexpr, SCORING: tl.constexpr, RENORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr,
    OUTSIDE_ZERO: tl.constexpr, G_BLOCK: tl.constexpr, HAS_MIN: tl.constexpr, HAS_MAX: tl.constexpr,
    HAS_PROJECTION: tl.constexpr, NARROW: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, K_BLOCK: tl.constexpr, E_BLOCK: tl.constexpr,
):  # fmt: skip
    """`route_kernel`, with ids re-routed to the primary experts of all rows and weights projected.

    A row for each warp, so that no maximum leaves its warp. There are more of them than tokens: the rest are copies.
    """
    first = tl.program_id(0) * TOKENS
    rows = load_rows(logits_ptr, first + tl.arange(0, ROWS) % TOKENS, num_tokens, stride_t, E, E_BLOCK)
    weights, ids = select(rows.to(tl.float32), bias_ptr, epsilon, SCORING, RENORMALIZE, HAS_BIAS, GROUPS, TOP_GROUPS,
                          TOP2, OUTSIDE_ZERO, G_BLOCK, K, K_BLOCK, E, E_BLOCK, NARROW, ROWS)  # fmt: skip
    weights = tl.max(tl.reshape(weights, (ROWS // TOKENS, TOKENS, K_BLOCK)), axis=0)
    ids = tl.max(tl.reshape(ids, (ROWS // TOKENS, TOKENS, K_BLOCK)), axis=0)
    token = first + tl.arange(0, TOKENS)
    slot = tl.arange(0, K_BLOCK)[None, :]
    stored = (token < num_tokens)[:, None] & (slot < K)
    expert = tl.reshape(ids, (TOKENS * K_BLOCK,))
    # Asked for before the primary experts are known: the two waits for memory overlap.
    similarity = similarity_rows(expert, tl.reshape(stored, (TOKENS * K_BLOCK,)), sim_ptr, E, E_BLOCK)
    bits = primary_experts(logits_ptr, bias_ptr, num_tokens, stride_t, min_active, max_active, SCORING, HAS_BIAS,
                           GROUPS, TOP_GROUPS, TOP2, OUTSIDE_ZERO, G_BLOCK, K, SELECT, E, E_BLOCK, NARROW, HAS_MIN,
                           HAS_MAX, CHUNK)  # fmt: skip
    # With two dimensions: Triton 3.6 gives what a reshape makes of one a layout in which every warp does all the work.
    bits = bits[None, :]
    target = tl.reshape(most_similar(expert, similarity, bits, threshold, E_BLOCK), (TOKENS, K_BLOCK))
    weights = (weights * scale).to(weights_ptr.dtype.element_ty)
    if HAS_PROJECTION:
        moved = stored & (target != ids)
        factor = tl.load(projection_ptr + ids.to(tl.int64) * E + target, mask=moved, other=1.0)
        weights = tl.where(moved, (weights.to(tl.float32) * factor).to(weights.dtype), weights)
    offset = token.to(tl.int64)[:, None] * K + slot
    tl.store(weights_ptr + offset, weights, mask=stored)
    tl.store(ids_ptr + offset, target.to(ids_ptr.dtype.element_ty), mask=stored)
