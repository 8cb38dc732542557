"""The Triton kernels of `sere::reroute` and their launcher.

Imported only when a CUDA tensor arrives, and by the interpreter tests. The functions without `_kernel` in
their name are device functions; `sere_compile.ops.reroute_merged` shares them.

Up to `SINGLE_LAUNCH_TOKENS` tokens there is one launch. The programs cannot wait for each other, so each of
them reads all primary ids (T * S of them, from L2) and builds the primary set in its own registers, then
serves its own block of slots with one masked arg-max over a row of the similarity matrix per slot. That
repeats work across programs, but at decode sizes a launch costs more than the repetition. Above that size a
first launch computes the map once per expert and a second one applies it.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ..launching import launchable

SINGLE_LAUNCH_TOKENS = 1024
GATHER_BLOCK = 1024


@triton.jit
def expert_words(experts, valid, NUM_WORDS: tl.constexpr):
    """Bit words [NUM_WORDS, N]: bit e % 32 of word e // 32 is set for the valid experts of [N]."""
    word = tl.arange(0, NUM_WORDS)[:, None]
    bit = tl.where(valid, 1 << (experts & 31), 0)
    return tl.where((experts >> 5)[None, :] == word, bit[None, :], 0)


@triton.jit
def word_bits(words):
    """0 or 1 [NUM_WORDS, 32] from bit words [NUM_WORDS]."""
    return (words[:, None] >> tl.arange(0, 32)[None, :]) & 1


@triton.jit
def slot_words(
    ids_ptr,
    mask_ptr,
    num_tokens,
    stride_t,
    stride_k,
    stride_m,
    first,
    width,
    E: tl.constexpr,
    HAS_MASK: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Bit words [NUM_WORDS] of the experts that real tokens name in slots first .. first + width - 1."""
    # OR is the cheapest way to a set: one select per word and id, one reduction after the loop. A histogram
    # needs shared-memory atomics, a comparison of every id with every expert 32 times the work.
    words = tl.zeros([NUM_WORDS, CHUNK], tl.int32)
    total = num_tokens * width
    for start in range(0, total, CHUNK):
        index = start + tl.arange(0, CHUNK)
        inside = index < total
        token = (index // width).to(tl.int64)
        slot = first + index % width
        ids = tl.load(ids_ptr + token * stride_t + slot * stride_k, mask=inside, other=-1)
        valid = (ids >= 0) & (ids < E)
        if HAS_MASK:
            valid = valid & tl.load(mask_ptr + token * stride_m, mask=inside, other=0).to(tl.int1)
        words = words | expert_words(ids.to(tl.int32), valid, NUM_WORDS)
    return tl.reduce_or(words, axis=1)


@triton.jit
def primary_bits(
    ids_ptr,
    mask_ptr,
    num_tokens,
    stride_t,
    stride_k,
    stride_m,
    min_active,
    max_active,
    K: tl.constexpr,
    SELECT: tl.constexpr,
    E: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_MIN: tl.constexpr,
    HAS_MAX: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The primary experts as 0 or 1 [NUM_WORDS, 32]; all 1 when `min_active` cannot be reached below K."""
    if HAS_MAX:
        width = tl.full([], SELECT, tl.int32)
    elif HAS_MIN:
        # T tokens name at most T * S' experts, so no smaller width can be enough: no need to try it. With
        # one token and min_active = K (what the compiler backend asks for) the search ends here.
        some = tl.maximum(num_tokens, 1)
        width = tl.minimum(tl.maximum(SELECT, (min_active + some - 1) // some), K)
    else:
        width: tl.constexpr = SELECT  # type: ignore[no-redef]
    words = slot_words(
        ids_ptr, mask_ptr, num_tokens, stride_t, stride_k, stride_m, 0, width, E, HAS_MASK, NUM_WORDS, CHUNK
    )
    bits = word_bits(words)
    if HAS_MAX:
        fits = 1
        while (fits != 0) & (width < K):
            wider = words | slot_words(
                ids_ptr, mask_ptr, num_tokens, stride_t, stride_k, stride_m, width, 1, E, HAS_MASK, NUM_WORDS,
                CHUNK,
            )  # fmt: skip
            fits = (tl.sum(word_bits(wider)) <= max_active).to(tl.int32)
            words = tl.where(fits != 0, wider, words)
            width += fits
        bits = word_bits(words)
    if HAS_MIN:
        active = tl.sum(bits)
        while (active < min_active) & (width < K - 1):
            words = words | slot_words(
                ids_ptr, mask_ptr, num_tokens, stride_t, stride_k, stride_m, width, 1, E, HAS_MASK, NUM_WORDS,
                CHUNK,
            )  # fmt: skip
            bits = word_bits(words)
            active = tl.sum(bits)
            width += 1
        bits = tl.where((active >= min_active) & (width < K), bits, 1)
    elif HAS_MAX:
        bits = tl.where(width < K, bits, 1)
    return bits


@triton.jit
def leading_tokens(real_ptr, num_tokens, HAS_REAL: tl.constexpr):
    """How many of the tokens take part, the first ones; all of them without a tensor that says so."""
    if HAS_REAL:
        return tl.minimum(tl.maximum(tl.load(real_ptr), 0), num_tokens).to(tl.int32)
    return num_tokens


@triton.jit
def similarity_rows(expert, inside, sim_ptr, E: tl.constexpr, E_BLOCK: tl.constexpr):
    """The similarity rows of the experts [N] as fp32 [N, E_BLOCK]; -inf outside."""
    column = tl.arange(0, E_BLOCK)[None, :]
    offset = expert.to(tl.int64)[:, None] * E + column
    return tl.load(sim_ptr + offset, mask=inside[:, None] & (column < E), other=float("-inf")).to(tl.float32)


@triton.jit
def most_similar(expert, sim, bits, threshold, E_BLOCK: tl.constexpr):
    """Where the experts [N] go (int32 [N], themselves if they stay): similarity rows, `primary_bits`."""
    primary = tl.reshape(bits, (1, E_BLOCK)) != 0
    column = tl.arange(0, E_BLOCK)[None, :]
    # The search runs over integers that sort like the floats, which leaves room for two more values: below
    # -inf "never chosen" (not primary, NaN, -inf), above +inf "the expert itself is primary, it stays".
    sim = tl.where(sim == 0, 0.0, sim)  # -0.0 and 0.0 are a tie
    key = sim.to(tl.int32, bitcast=True)
    key = key ^ ((key >> 31) & 0x7FFFFFFF)
    key = tl.where(primary & (sim > float("-inf")), key, -0x80000000)
    key = tl.where(primary & (column == expert[:, None]), 0x7FFFFFFF, key)
    # Ties: the column, counted from the right, is the low half of what is compared, so the lowest wins. A
    # 64-bit maximum takes fewer instructions than an arg-max, and Triton's interpreter takes the first of
    # equal maxima even where a GPU would not, so that tests without a GPU could not see a wrong tie.
    ranked = (key.to(tl.int64) << 32) | (E_BLOCK - 1 - column)
    winner = tl.max(ranked, axis=1)
    best = (winner >> 32).to(tl.int32)
    target = E_BLOCK - 1 - (winner & 0xFFFFFFFF).to(tl.int32)
    # The largest key is a NaN as a float, so an expert that is primary never compares as critical.
    best_sim = (best ^ ((best >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    critical = (threshold > 0) & (best_sim < threshold)
    return tl.where((best == -0x80000000) | critical, expert, target)


@triton.jit(do_not_specialize=["num_tokens", "threshold", "min_active", "max_active"])
def reroute_kernel(
    ids_ptr,
    sim_ptr,
    mask_ptr,
    real_ptr,
    out_ptr,
    num_tokens,
    stride_t,
    stride_k,
    stride_m,
    threshold,
    min_active,
    max_active,
    K: tl.constexpr,
    SELECT: tl.constexpr,
    E: tl.constexpr,
    E_BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_REAL: tl.constexpr,
    HAS_MIN: tl.constexpr,
    HAS_MAX: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Re-route SLOTS consecutive slots of ids [T, K] per program; the one-launch path."""
    index = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    inside = index < num_tokens * K
    ids = tl.load(ids_ptr + (index // K) * stride_t + (index % K) * stride_k, mask=inside, other=-1)
    real = leading_tokens(real_ptr, num_tokens, HAS_REAL)
    is_expert = (ids >= 0) & (ids < E) & (index < real.to(tl.int64) * K)
    expert = ids.to(tl.int32)
    # Asked for before the set is built: the two waits for memory overlap.
    sim = similarity_rows(expert, is_expert, sim_ptr, E, E_BLOCK)
    bits = primary_bits(
        ids_ptr, mask_ptr, real, stride_t, stride_k, stride_m, min_active, max_active,
        K, SELECT, E, HAS_MASK, HAS_MIN, HAS_MAX, E_BLOCK // 32, CHUNK,
    )  # fmt: skip
    target = most_similar(expert, sim, bits, threshold, E_BLOCK)
    tl.store(out_ptr + index, tl.where(is_expert, target.to(ids.dtype), ids), mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "threshold", "min_active", "max_active"])
def expert_map_kernel(
    ids_ptr,
    sim_ptr,
    mask_ptr,
    real_ptr,
    map_ptr,
    num_tokens,
    stride_t,
    stride_k,
    stride_m,
    threshold,
    min_active,
    max_active,
    K: tl.constexpr,
    SELECT: tl.constexpr,
    E: tl.constexpr,
    E_BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_REAL: tl.constexpr,
    HAS_MIN: tl.constexpr,
    HAS_MAX: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The map of SLOTS consecutive experts per program, into int32 [E]."""
    expert = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    sim = similarity_rows(expert, expert < E, sim_ptr, E, E_BLOCK)
    real = leading_tokens(real_ptr, num_tokens, HAS_REAL)
    bits = primary_bits(
        ids_ptr, mask_ptr, real, stride_t, stride_k, stride_m, min_active, max_active,
        K, SELECT, E, HAS_MASK, HAS_MIN, HAS_MAX, E_BLOCK // 32, CHUNK,
    )  # fmt: skip
    target = most_similar(expert, sim, bits, threshold, E_BLOCK)
    tl.store(map_ptr + expert, target, mask=expert < E)


@triton.jit(do_not_specialize=["num_slots"])
def apply_map_kernel(
    ids_ptr,
    map_ptr,
    real_ptr,
    out_ptr,
    num_slots,
    stride_t,
    stride_k,
    K: tl.constexpr,
    E: tl.constexpr,
    HAS_REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store map[ids] for BLOCK consecutive slots per program; ids that name no expert pass through."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_slots
    ids = tl.load(ids_ptr + (index // K) * stride_t + (index % K) * stride_k, mask=inside, other=-1)
    real = leading_tokens(real_ptr, num_slots // K, HAS_REAL)
    is_expert = (ids >= 0) & (ids < E) & (index < real.to(tl.int64) * K)
    target = tl.load(map_ptr + ids, mask=is_expert, other=0)
    tl.store(out_ptr + index, tl.where(is_expert, target.to(ids.dtype), ids), mask=inside)


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Meta-parameters of one launch: slots (or experts) per program, ids per step of the set's loop, warps."""

    slots: int
    chunk: int
    num_warps: int


def launch_config(num_tokens: int, e_block: int) -> LaunchConfig:
    """The cut for `num_tokens` tokens and rows of `e_block` columns.

    As long as latency counts and the GPU is not full (128 experts: up to 256 tokens): small programs, one token each
    at K = 8 and 128 experts, so that all similarity rows are fetched at once. Up to 1024 tokens every program repeats
    the reading of the primary ids: four times larger ones, which still makes two programs per SM at 1024 tokens.
    Above, only the map is computed like this: few programs that each read very many ids, hence long steps
    and more warps.

    The two element budgets keep the row tile [slots, e_block] and the set's accumulator [e_block / 32, chunk]
    in registers: no spills on sm_90 for 128, 256 and 1024 experts. There are only three classes because with a
    symbolic T each is one more compiled graph. guard_or_false: a size without a value while tracing
    (unbacked) takes the last class, which serves any size.
    """
    if guard_or_false(num_tokens * e_block <= 32768) and guard_or_false(num_tokens <= SINGLE_LAUNCH_TOKENS):
        row_budget, set_budget, num_warps = 1024, 1024, 4
    elif guard_or_false(num_tokens <= SINGLE_LAUNCH_TOKENS):
        row_budget, set_budget, num_warps = 4096, 4096, 4
    else:
        row_budget, set_budget, num_warps = 1024, 16384, 8
    return LaunchConfig(max(4, row_budget // e_block), max(64, set_budget // (e_block // 32)), num_warps)


def expert_block(num_experts: int) -> int:
    """The number of columns of an expert row tile: a power of two of at least one bit word."""
    return max(32, triton.next_power_of_2(num_experts))


def launch_expert_map(
    ids: Tensor,
    similarity: Tensor,
    select_top_k: int,
    threshold: float,
    min_active: int,
    token_mask: Tensor | None,
    config: LaunchConfig | None = None,
    max_active: int = 0,
    real_tokens: Tensor | None = None,
) -> Tensor:
    """Where each expert's slots go: int32 [E]. ids [T, K], similarity [E, E], both checked; T >= 1."""
    num_experts = int(similarity.shape[0])
    config = config or launch_config(ids.shape[0], expert_block(num_experts))
    mapping = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
    grid = (triton.cdiv(num_experts, config.slots),)
    options = (select_top_k, threshold, min_active, token_mask, config, max_active, real_tokens)
    launchable(expert_map_kernel)[grid](**_set_arguments(ids, similarity, *options), map_ptr=mapping)
    return mapping


def launch_reroute(
    topk_ids: Tensor,
    similarity: Tensor,
    select_top_k: int,
    threshold: float,
    min_active: int,
    token_mask: Tensor | None,
    config: LaunchConfig | None = None,
    max_active: int = 0,
    real_tokens: Tensor | None = None,
) -> Tensor:
    """`sere::reroute` for 0 < select_top_k < K on checked arguments; `config` replaces the heuristics."""
    num_slots, num_experts = int(topk_ids.shape[-1]), int(similarity.shape[0])
    ids = topk_ids.reshape(-1, num_slots)
    num_tokens = ids.shape[0]
    out = torch.empty(topk_ids.shape, dtype=topk_ids.dtype, device=topk_ids.device)
    if guard_or_false(num_tokens == 0):
        return out
    options = (select_top_k, threshold, min_active, token_mask)
    if guard_or_false(num_tokens <= SINGLE_LAUNCH_TOKENS):
        config = config or launch_config(num_tokens, expert_block(num_experts))
        grid = (triton.cdiv(num_tokens * num_slots, config.slots),)
        arguments = _set_arguments(ids, similarity, *options, config, max_active, real_tokens)
        launchable(reroute_kernel)[grid](**arguments, out_ptr=out)
        return out
    mapping = launch_expert_map(ids, similarity, *options, config, max_active, real_tokens)
    grid = (triton.cdiv(num_tokens * num_slots, GATHER_BLOCK),)
    launchable(apply_map_kernel)[grid](
        ids, mapping, ids if real_tokens is None else real_tokens, out, num_tokens * num_slots, ids.stride(0),
        ids.stride(1), K=num_slots, E=num_experts, HAS_REAL=real_tokens is not None, BLOCK=GATHER_BLOCK,
    )  # fmt: skip
    return out


def _set_arguments(
    ids: Tensor,
    similarity: Tensor,
    select_top_k: int,
    threshold: float,
    min_active: int,
    token_mask: Tensor | None,
    config: LaunchConfig,
    max_active: int,
    real_tokens: Tensor | None,
) -> dict:
    """The arguments that `reroute_kernel` and `expert_map_kernel` share."""
    mask = None if token_mask is None else token_mask.reshape(-1)
    num_experts = int(similarity.shape[0])
    return {
        "ids_ptr": ids,
        "sim_ptr": similarity.contiguous(),
        # Without a mask, or a number of tokens, the pointer is not read; any tensor will do.
        "mask_ptr": ids if mask is None else mask,
        "real_ptr": ids if real_tokens is None else real_tokens,
        "num_tokens": ids.shape[0],
        "stride_t": ids.stride(0),
        "stride_k": ids.stride(1),
        "stride_m": 0 if mask is None else mask.stride(0),
        "threshold": threshold,
        "min_active": min_active,
        "max_active": max_active,
        "K": int(ids.shape[1]),
        "SELECT": select_top_k,
        "E": num_experts,
        "E_BLOCK": expert_block(num_experts),
        "HAS_MASK": mask is not None,
        "HAS_REAL": real_tokens is not None,
        "HAS_MIN": min_active > 0,
        "HAS_MAX": max_active > 0,
        "SLOTS": config.slots,
        "CHUNK": config.chunk,
        "num_warps": config.num_warps,
    }
