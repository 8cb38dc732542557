"""What one program of `sere::expert_mlp` does with a tile of a weight: load it, widen it, multiply it.

Weights are in the dtype of the activations, FP8 with scales of blocks, or MXFP4 (`mxfp4.py`).
"""

import triton
import triton.language as tl

from .mxfp4 import MX_BLOCK, MX_WORD

# `SCALE` of kernels: how many columns of a weight row share a scale; 0 without scales. By it they know MXFP4.
MX = tl.constexpr(MX_BLOCK)
# Of MXFP4, how many numbers are loaded as one.
WORD = tl.constexpr(MX_WORD)


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


def _fp4_to_bf16(quarter: int) -> tl.constexpr:
    """PTX for what a 4-bit float of each half of $1 stands for, times the bf16 in each half of $2.

    Sign, exponent and mantissa go to where bf16 has its own: that is the number times 2 ** -126, the least ones
    subnormal. Then products with 2 ** 126 and with the scale, neither of which rounds (a multiply-add of -0: before
    Hopper there is no other instruction for bf16).
    """
    return tl.constexpr(
        "{ .reg .b32 word, t, up, zero;\n"
        "mov.b32 up, 0x7E807E80;\n"  # 2 ** 126, twice
        "mov.b32 zero, 0x80008000;\n"
        f"shl.b32 word, $1, {12 - 4 * quarter};\n"
        "shr.b32 t, word, 6;\n"
        "and.b32 t, t, 0x01C001C0;\n"
        "and.b32 word, word, 0x80008000;\n"
        "or.b32 t, t, word;\n"
        "fma.rn.bf16x2 t, t, up, zero;\n"
        "fma.rn.bf16x2 $0, t, $2, zero; }"
    )


_FP4_TO_BF16_0, _FP4_TO_BF16_1, _FP4_TO_BF16_2, _FP4_TO_BF16_3 = map(_fp4_to_bf16, range(WORD.value))


@triton.jit
def fp4_quarter(words, scale, PTX: tl.constexpr):
    """One of `fp4_words` in bf16. Two words to a register, each on its own: any layout of the tensors will do."""
    return tl.inline_asm_elementwise(PTX, "=r,r,r", [words, scale], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def fp4_words(words, scale):
    """What the four 4-bit floats of int16 stand for, the lowest bits first, times scale: four tensors of its dtype.

    scale: in the shape of words, bf16 or fp32.
    """
    if scale.dtype == tl.bfloat16:
        # Not one statement with four results: Triton 3.8 moves all but the first through shared memory.
        a, b = fp4_quarter(words, scale, _FP4_TO_BF16_0), fp4_quarter(words, scale, _FP4_TO_BF16_1)
        c, d = fp4_quarter(words, scale, _FP4_TO_BF16_2), fp4_quarter(words, scale, _FP4_TO_BF16_3)
    else:
        a, b = fp4_numbers(words & 15) * scale, fp4_numbers(words >> 4 & 15) * scale
        c, d = fp4_numbers(words >> 8 & 15) * scale, fp4_numbers(words >> 12 & 15) * scale
    return a, b, c, d


@triton.jit
def powers_of_two(scale):
    """2 ** (scale - 127) in fp32 of uint8, NaN of 255; the least one has no exponent of its own."""
    bits = scale.to(tl.uint32)
    return tl.where(bits == 0, 1 << 22, tl.where(bits == 255, 0x7FC00000, bits << 23)).to(tl.float32, bitcast=True)


@triton.jit
def row_ptrs(w_ptr, n, d, stride_n, stride_d, SCALE: tl.constexpr):
    """Pointers [N, D] to rows n of a weight; to words of four numbers if they are MXFP4, which is never transposed."""
    rows = w_ptr + n[:, None] * stride_n
    if SCALE == MX:
        return rows.to(tl.pointer_type(tl.int16), bitcast=True) + d[None, :]
    else:
        return rows + d[None, :] * stride_d


@triton.jit
def stored_column(n, COLUMNS: tl.constexpr, SCALE: tl.constexpr):
    """Where a row of what a weight is multiplied with has column n: for MXFP4 every fourth ones lie side by side.

    A word has a number of each: so each quarter of it meets columns that are one tile.
    """
    if SCALE == MX:
        return n // WORD + n % WORD * (COLUMNS // WORD)
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
    """`project` of packed weights, not transposed back: BLOCK_K / 4 words of a row at a time, x as `stored_column`."""
    WORDS: tl.constexpr = BLOCK_K // WORD
    GROUPS: tl.constexpr = BLOCK_K // MX
    QUARTER: tl.constexpr = DEPTH // WORD
    MASK_K: tl.constexpr = DEPTH % BLOCK_K != 0
    word = tl.arange(0, WORDS)[None, :]
    group = tl.arange(0, GROUPS)[None, :]
    s_ptrs = s_ptrs[:, None] + group
    for k in range(0, QUARTER, WORDS):
        inside = word < QUARTER - k
        words = load_tile(w_ptrs, w_rows, inside, MASK_N, MASK_K)
        bits = load_tile(s_ptrs, w_rows, group < (QUARTER - k) // (MX // WORD), MASK_N, MASK_K)
        x0 = load_tile(x_ptrs, x_rows, inside, True, MASK_K)
        x1 = load_tile(x_ptrs + QUARTER, x_rows, inside, True, MASK_K)
        x2 = load_tile(x_ptrs + 2 * QUARTER, x_rows, inside, True, MASK_K)
        x3 = load_tile(x_ptrs + 3 * QUARTER, x_rows, inside, True, MASK_K)
        scale = powers_of_two(bits).to(x0.dtype)
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (N, GROUPS, MX // WORD)), (N, WORDS))
        w0, w1, w2, w3 = fp4_words(words, scale)
        acc = dot_rows(x0, w0, acc, SWAP)
        acc = dot_rows(x1, w1, acc, SWAP)
        acc = dot_rows(x2, w2, acc, SWAP)
        acc = dot_rows(x3, w3, acc, SWAP)
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
        w_ptrs += tl.multiple_of(to_up // 2, 8)  # bytes to words; rows are of whole groups of 16 bytes
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
