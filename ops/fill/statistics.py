"""What the tokens of a batch say about each expert, as rows that several programs write and others add up.

`sere::route` writes them in the launch that selects, from registers; `statistics_kernel` from ids and weights.
"""

import triton
import triton.language as tl


@triton.jit
def count_slot(expert, weight, counted, mass, slots, slot, E_BLOCK: tl.constexpr):
    """Add one slot of N tokens to fp32 masses and int32 sets of slots [N, E_BLOCK], a bit for each slot."""
    here = (tl.arange(0, E_BLOCK)[None, :] == expert[:, None]) & counted[:, None]
    square = weight * weight
    # Not NaN.
    square = tl.where(square >= 0, square, 0.0)
    return mass + tl.where(here, square[:, None], 0.0), slots | tl.where(here, 1 << slot, 0)


@triton.jit
def store_statistics(mass, slots, mass_ptr, slots_ptr, row, E: tl.constexpr, E_BLOCK: tl.constexpr):
    """One row of masses and sets of slots, of [N, E_BLOCK]."""
    column = tl.arange(0, E_BLOCK)
    offset = row.to(tl.int64) * E + column
    tl.store(mass_ptr + offset, tl.sum(mass, axis=0), mask=column < E)
    tl.store(slots_ptr + offset, tl.reduce_or(slots, axis=0), mask=column < E)


@triton.jit(do_not_specialize=["num_tokens", "tokens_a_row"])
def statistics_kernel(
    ids_ptr, weights_ptr, mask_ptr, mass_ptr, slots_ptr, num_tokens, tokens_a_row, stride_t, stride_k,
    weight_stride_t, weight_stride_k, stride_m, K: tl.constexpr, E: tl.constexpr, HAS_MASK: tl.constexpr,
    TOKENS: tl.constexpr, E_BLOCK: tl.constexpr,
):  # fmt: skip
    """Row r of masses and sets of slots [rows, E]: of tokens r * tokens_a_row and on, TOKENS at a time."""
    row = tl.program_id(0)
    mass = tl.zeros([TOKENS, E_BLOCK], tl.float32)
    slots = tl.zeros([TOKENS, E_BLOCK], tl.int32)
    for start in range(0, tokens_a_row, TOKENS):
        place = start + tl.arange(0, TOKENS)
        token = row.to(tl.int64) * tokens_a_row + place
        inside = (token < num_tokens) & (place < tokens_a_row)
        real = inside
        if HAS_MASK:
            real = inside & tl.load(mask_ptr + token * stride_m, mask=inside, other=0).to(tl.int1)
        for k in range(K):
            ids = tl.load(ids_ptr + token * stride_t + k * stride_k, mask=inside, other=-1)
            weight = tl.load(weights_ptr + token * weight_stride_t + k * weight_stride_k, mask=inside, other=0.0)
            counted = real & (ids >= 0) & (ids < E)
            mass, slots = count_slot(ids.to(tl.int32), weight.to(tl.float32), counted, mass, slots, k, E_BLOCK)
    store_statistics(mass, slots, mass_ptr, slots_ptr, row, E, E_BLOCK)


@triton.jit
def load_statistics(
    mass_ptr, slots_ptr, E: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, E_BLOCK: tl.constexpr
):
    """Masses and sets of slots [1, E_BLOCK] of all rows; STEP of them at a time."""
    column = tl.arange(0, E_BLOCK)[None, :]
    mass = tl.zeros([1, E_BLOCK], tl.float32)
    slots = tl.zeros([1, E_BLOCK], tl.int32)
    for start in range(0, ROWS, STEP):
        offset = (start + tl.arange(0, STEP)[:, None]) * E + column
        mass += tl.sum(tl.load(mass_ptr + offset, mask=column < E, other=0.0), axis=0)[None, :]
        slots |= tl.reduce_or(tl.load(slots_ptr + offset, mask=column < E, other=0), axis=0)[None, :]
    return mass, slots
