"""What one program of `sere::expert_mlp` does with a tile of a weight: load it, widen it, multiply it.

Weights are in the dtype of the activations, FP8 with scales of blocks, or MXFP4 (`mxfp4.py`).
"""

import triton
import triton.language as tl

from .mxfp4 import MX_BLOCK

# `SCALE` of kernels: how many columns of a weight row share a scale; 0 without scales. By it they know MXFP4.
MX = tl.constexpr(MX_BLOCK)


@triton.jit
def load_tile(ptrs, rows, columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile with 0 outside: rows [R, 1] and columns [1, C] say what is inside."""
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(ptrs, mask=rows & columns, other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=rows, other=0.0)
    elif MASK_COLUMNS:
        return tl.load(ptrs, mask=columns, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def dot_rows(x, w, acc, SWAP: tl.constexpr):
    """Return acc + x [M, D] @ w [N, D].T, kept as [N, M] with SWAP: 64 weight rows feed a whole warp group's wgmma."""
    if SWAP:
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        return tl.dot(x, tl.trans(w), acc, input_precision="ieee")


@triton.jit
def dot_weights(x, w, acc, s_ptrs, k, SWAP: tl.constexpr, SCALE: tl.constexpr):
    """`dot_rows`; with SCALE of FP8 weights, each row's part times the scale of its block at depth k."""
    if SCALE:
        scale = tl.load(s_ptrs + k // SCALE)
        part = dot_rows(x, w.to(x.dtype), tl.zeros_like(acc), SWAP)
        return acc + part * (scale[:, None] if SWAP else scale[None, :])
    else:
        return dot_rows(x, w, acc, SWAP)


@triton.jit
def scale_rows(s_ptr, n, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to the scales of rows n at depth 0."""
    ROWS: tl.constexpr = 1 if BLOCK == MX else BLOCK
    return s_ptr + n // ROWS * ((DEPTH + BLOCK - 1) // BLOCK)


@triton.jit
def scales_of(s_ptr, expert, ROWS: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    """Where an expert's scales begin, of a weight [ROWS, DEPTH]."""
    if BLOCK:
        HIGH: tl.constexpr = 1 if BLOCK == MX else BLOCK
        BLOCKS: tl.constexpr = ((ROWS + HIGH - 1) // HIGH) * ((DEPTH + BLOCK - 1) // BLOCK)
        s_ptr += expert.to(tl.int64) * BLOCKS
    return s_ptr


@triton.jit
def fp4_numbers(codes):
    """What 4-bit floats stand for, in fp32."""
    # Four bits for each of 0, 1, 2, 3, 4, 6, 8, 12: twice the numbers of codes 0 to 7.
    doubled = (0xC8643210 >> ((codes & 7).to(tl.uint32) * 4)) & 15
    return doubled.to(tl.float32) * tl.where(codes < 8, 0.5, -0.5)


@triton.jit
def powers_of_two(scale):
    """2 ** (scale - 127) in fp32 of uint8, NaN of 255; the least one has no exponent of its own."""
    bits = scale.to(tl.uint32)
    return tl.where(bits == 0, 1 << 22, tl.where(bits == 255, 0x7FC00000, bits << 23)).to(tl.float32, bitcast=True)


@triton.jit
def stored_column(n, COLUMNS: tl.constexpr, SCALE: tl.constexpr):
    """Where a row of what a weight is multiplied with has column n: for MXFP4 all even ones are ahead of the odd ones.

    A byte has a number of each: so both halves of it meet columns that lie side by side.
    """
    if SCALE == MX:
        return n // 2 + n % 2 * (COLUMNS // 2)
    else:
        return n


@triton.jit
def add_mxfp4(
    x_ptrs,
    w_ptrs,
    s_ptrs,
    x_rows,
    w_rows,
    step_x,
    step_w,
    acc,
    DEPTH: tl.constexpr,
    N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_N: tl.constexpr,
    SWAP: tl.constexpr,
):
    """`project` of packed weights, not transposed back: BLOCK_K / 2 bytes of a row at a time, x as `stored_column`."""
    HALF: tl.constexpr = BLOCK_K // 2
    GROUPS: tl.constexpr = BLOCK_K // MX
    MASK_K: tl.constexpr = DEPTH % BLOCK_K != 0
    byte = tl.arange(0, HALF)[None, :]
    group = tl.arange(0, GROUPS)[None, :]
    s_ptrs = s_ptrs[:, None] + group
    for k in range(0, DEPTH // 2, HALF):
        inside = byte < DEPTH // 2 - k
        even = load_tile(x_ptrs, x_rows, inside, True, MASK_K)
        odd = load_tile(x_ptrs + DEPTH // 2, x_rows, inside, True, MASK_K)
        codes = load_tile(w_ptrs, w_rows, inside, MASK_N, MASK_K)
        scale = powers_of_two(load_tile(s_ptrs, w_rows, group < (DEPTH // 2 - k) // (MX // 2), MASK_N, MASK_K))
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (N, GROUPS, MX // 2)), (N, HALF))
        acc = dot_rows(even, (fp4_numbers(codes & 15) * scale).to(even.dtype), acc, SWAP)
        acc = dot_rows(odd, (fp4_numbers(codes >> 4) * scale).to(odd.dtype), acc, SWAP)
        x_ptrs += step_x
        w_ptrs += step_w
        s_ptrs += GROUPS
    return acc


@triton.jit
def project(
    x_ptrs,
    w_ptrs,
    s_ptrs,
    x_rows,
    w_rows,
    step_x,
    step_w,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_N: tl.constexpr,
    SWAP: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Return x [M, DEPTH] @ w [N, DEPTH].T in fp32 [M, N], from pointers to the first BLOCK_K columns of each.

    With SCALE every SCALE columns of a weight row have a factor, the first at s_ptrs [N].
    """
    acc = tl.zeros([N, M] if SWAP else [M, N], tl.float32)
    if SCALE == MX:
        acc = add_mxfp4(x_ptrs, w_ptrs, s_ptrs, x_rows, w_rows, step_x, step_w, acc, DEPTH, N, BLOCK_K, MASK_N, SWAP)
    else:
        MASK_K: tl.constexpr = DEPTH % BLOCK_K != 0
        column = tl.arange(0, BLOCK_K)[None, :]
        for k in range(0, DEPTH, BLOCK_K):
            inside = column < DEPTH - k
            x = load_tile(x_ptrs, x_rows, inside, True, MASK_K)
            w = load_tile(w_ptrs, w_rows, inside, MASK_N, MASK_K)
            acc = dot_weights(x, w, acc, s_ptrs, k, SWAP, SCALE)
            x_ptrs += step_x
            w_ptrs += step_w
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def project_pair(
    x_ptrs,
    w_ptrs,
    s_ptrs,
    s_up_ptrs,
    x_rows,
    w_rows,
    step_x,
    step_w,
    to_up,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_N: tl.constexpr,
    SWAP: tl.constexpr,
    SCALE: tl.constexpr,
):
    """`project` for gate and up at once; the pointers to up are to_up elements further."""
    gate = tl.zeros([N, M] if SWAP else [M, N], tl.float32)
    up = tl.zeros([N, M] if SWAP else [M, N], tl.float32)
    if SCALE == MX:
        gate = add_mxfp4(x_ptrs, w_ptrs, s_ptrs, x_rows, w_rows, step_x, step_w, gate, DEPTH, N, BLOCK_K, MASK_N, SWAP)
        w_ptrs += to_up
        up = add_mxfp4(x_ptrs, w_ptrs, s_up_ptrs, x_rows, w_rows, step_x, step_w, up, DEPTH, N, BLOCK_K, MASK_N, SWAP)
    else:
        MASK_K: tl.constexpr = DEPTH % BLOCK_K != 0
        column = tl.arange(0, BLOCK_K)[None, :]
        for k in range(0, DEPTH, BLOCK_K):
            inside = column < DEPTH - k
            x = load_tile(x_ptrs, x_rows, inside, True, MASK_K)
            w = load_tile(w_ptrs, w_rows, inside, MASK_N, MASK_K)
            v = load_tile(w_ptrs + to_up, w_rows, inside, MASK_N, MASK_K)
            gate = dot_weights(x, w, gate, s_ptrs, k, SWAP, SCALE)
            up = dot_weights(x, v, up, s_up_ptrs, k, SWAP, SCALE)
            x_ptrs += step_x
            w_ptrs += step_w
    if SWAP:
        gate, up = tl.trans(gate), tl.trans(up)
    return gate, up
