// `sere::expert_mlp` for few slots per expert, in CUDA C++ (sm_90 and later): three kernels that overlap.
//
// Every block owns an equal share of all rows of active weights and streams them through a ring in shared memory:
// two warps copy weights, two copy activations, the others multiply. The ring never drains between tiles. The second
// projection's blocks start while the first still runs (programmatic dependent launch), find their experts, fill their
// ring with weights, and wait only for the activations. The third kernel sums a token's slots.
//
// Compiled at first use (stream.py), with these numbers as macros:
//   EXPERTS, TOP_K, HIDDEN, INNER, ROWS (slots of one pass), STAGES (of the ring), PLAN_BYTES, MAX_SLOTS, IDS64,
//   GATED, INTERLEAVED, ACTIVATION, GATE_UP_BIAS, DOWN_BIAS, HALF (fp16 instead of bf16), FP8,
//   FP8_ROWS (activations are rounded to FP8 as well), WEIGHTS (0: fp32, 1: bf16, 2: fp16), TRIGGER, GROUPS, WGMMA,
//   ROW_WARPS, BLOCKS (StreamConfig's), ROUNDS_AHEAD (by a kernel of its own)
// hopper.cuh and plan.cuh come before this file.

// Where 16-byte piece p of a 128-byte row lies: no bank conflicts for 8 rows of one piece, nor for 2 rows of 4 pieces.
// With WGMMA as wgmma's 128-byte swizzle has it.
DEVICE u32 swizzled(u32 row, u32 piece) {
  if (WGMMA) return (piece ^ row) << 4;
  u32 reversed = ((row & 1) << 2) | (row & 2) | ((row >> 2) & 1);
  return (piece ^ reversed) << 4;
}

DEVICE float to_float(u16 x) { return HALF ? half_to_float(x) : bfloat_to_float(x); }
DEVICE u16 from_float(float x) { return HALF ? float_to_half(x) : float_to_bfloat(x); }
DEVICE float routing_weight(const void* weights, int slot) {
#if WEIGHTS == 0
  return ((const float*)weights)[slot];
#elif WEIGHTS == 1
  return bfloat_to_float(((const u16*)weights)[slot]);
#else
  return half_to_float(((const u16*)weights)[slot]);
#endif
}

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
DEVICE float activate(float x) {
#if ACTIVATION == 0 || ACTIVATION == 5  // silu
  return x * sigmoid(x);
#elif ACTIVATION == 1                   // gelu
  return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
#elif ACTIVATION == 2                   // gelu_tanh
  return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
#elif ACTIVATION == 3                   // relu
  return fmaxf(x, 0.0f);
#else                                   // relu2
  x = fmaxf(x, 0.0f);
  return x * x;
#endif
}
DEVICE float combine(float gate, float up) {
#if ACTIVATION == 5                     // gpt_oss
  gate = fminf(gate, 7.0f);
  up = fminf(fmaxf(up, -7.0f), 7.0f);
  return (up + 1.0f) * gate * sigmoid(1.702f * gate);
#else
  return activate(gate) * up;
#endif
}

template <bool FIRST>
DEVICE void load_weights(Plan& plan, u32 stages, const u8* weight, const float* scale) {
  constexpr int DEPTH = FIRST ? HIDDEN : INNER, WIDTH = FIRST ? COLUMNS : HIDDEN;
  constexpr long long ROW = (long long)DEPTH * (FP8 ? 1 : 2);
  constexpr int SCALE_ROWS = (WIDTH + BLOCK - 1) / BLOCK, SCALE_COLUMNS = (DEPTH + BLOCK - 1) / BLOCK;
  // A thread copies one piece of rows r and r + 8 of each granule.
  const int thread = threadIdx.x - MULTIPLIERS * 32, r = thread >> 3;
  const u32 to = r * CHUNK_BYTES + swizzled(r, thread & 7);
  const long long step = weight_row<FIRST>(1, 0) * ROW, to_other = weight_row<FIRST>(0, 8) * ROW;
  Ring ring;
  for_passes<FIRST>(plan, [&](const Pass& pass) {
    auto piece_of = [&](int rank, int granule) {
      const long long row = (long long)plan.active[rank] * WIDTH + weight_row<FIRST>(granule, r);
      return weight + row * ROW + (thread & 7) * 16;
    };
    const u8* from = piece_of(pass.rank, pass.granule);
    const u8* from_next = pass.split < pass.size ? piece_of(pass.rank + 1, 0) - pass.split * step : from;
    const float* from_scale = scale;
    if (FP8 && thread < 2 * pass.size) {
      const int g = thread / 2, next = g >= pass.split;
      const int row = weight_row<FIRST>(next ? g - pass.split : pass.granule + g, thread % 2 * 8);
      from_scale += ((long long)plan.active[pass.rank + next] * SCALE_ROWS + row / BLOCK) * SCALE_COLUMNS;
    }
    for (int k = 0; k < DEPTH; k += CHUNK) {
      const bool few_left = pass.is_last && k == max(0, DEPTH - CHUNK * TRIGGER - CHUNK);
      if (FIRST && TRIGGER >= 0 && few_left) let_next_kernel_start();
      barrier_wait(&plan.empty[ring.stage], ring.phase ^ 1);
      const u32 stage = tile_of(stages, ring) + to;
#pragma unroll
      for (int j = 0; j < CONSUMERS; ++j) {
        if (j < pass.size) {
          const u8* granule = (j < pass.split ? from : from_next) + j * step;
          copy16_and_fetch(stage + j * (GRANULE * CHUNK_BYTES), granule);
          copy16_and_fetch(stage + j * (GRANULE * CHUNK_BYTES) + 8 * CHUNK_BYTES, granule + to_other);
        }
      }
      if (FP8 && thread < 2 * pass.size) copy4(scales_of(stages, ring) + thread * 4, from_scale + k / BLOCK);
      barrier_arrive_after_copies(&plan.full[ring.stage]);
      from += CHUNK_BYTES;
      from_next += CHUNK_BYTES;
      ring.next();
    }
  });
}

// Activations rounded ahead: e4m3 numbers, and what they are to be multiplied with, one for each 128 columns.
struct Rounded {
  u8* numbers;
  float* factors;
};

#if FP8_ROWS
// The largest of 128 bf16 numbers, whose signs do not count, or 1e-10, for rows of zeros: 16 of them, 8 lanes together.
DEVICE float largest_of(const u32 (&x)[8]) {
  // Of positive numbers the bits sort as the numbers do, NaN last.
  u32 most = x[0] & 0x7fff7fffu;
#pragma unroll
  for (int i = 1; i < 8; ++i) most = max_of_halves(most, x[i] & 0x7fff7fffu);
#pragma unroll
  for (int step = 1; step < 8; step *= 2) most = max_of_halves(most, (u32)__shfl_xor_sync(~0u, (int)most, step));
  return __uint_as_float(max(0x2edbe6ffu, max(most & 0xffff0000u, most << 16)));
}

// Two bf16 numbers in a register, times a factor.
DEVICE u32 pair_to_fp8(u32 pair, float factor) {
  return floats_to_e4m3(bfloat_to_float((u16)pair) * factor, bfloat_to_float((u16)(pair >> 16)) * factor);
}

// 16 of a row's 128 bf16 numbers to e4m3, times 448 over the largest of the 128, which 8 lanes hold together.
// Returns what undoes that.
DEVICE float round_to_fp8(const u32 (&x)[8], u32 (&y)[4]) {
  const float largest = largest_of(x), factor = 448.0f * reciprocal(largest);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    y[i] = pair_to_fp8(x[2 * i], factor) | pair_to_fp8(x[2 * i + 1], factor) << 16;
  return largest * (1.0f / 448.0f);
}

#endif

#if WGMMA
// Writes 16 columns of a slot's row and, in one of 8 lanes, the row's factor.
DEVICE void store_rounded(const u32 (&x)[8], u32 tile, u32 factors, int row, int piece) {
  u32 y[4];
  const float factor = round_to_fp8(x, y);
  put16(tile + row * 128 + swizzled(row & 7, piece), y);
  if (piece == 0) put4(factors + row * 4, factor);
}

// Rounds activations on their way into the stages: 8 lanes take 128 columns of a row. With few rows the warps take
// stages in turn, with many each of them has several rows of a stage. Loads of some stages are under way together.
template <bool FIRST>
DEVICE void round_rows(Plan& plan, u32 stages, const u8* x) {
  constexpr int STEPS = (FIRST ? HIDDEN : INNER) / CHUNK, AT_ONCE = ROW_LOADERS * 4, AHEAD = 4;
  constexpr int TIMES = (ROWS + AT_ONCE - 1) / AT_ONCE;  // rows of a stage for one thread
  static_assert(AHEAD % TIMES == 0, "too few warps for so many rows");
  const int thread = threadIdx.x - (MULTIPLIERS + LOADERS) * 32, warp = thread / 32, lane = thread % 32;
  Ring ring;
  for_passes<FIRST>(plan, [&](const Pass& pass) {
    int together = 1;  // warps for one stage
    while (together < ROW_LOADERS && together * 4 < pass.rows) together *= 2;
    const int turns = ROW_LOADERS / together, turn = warp / together, first = warp % together * 4;
    u32 from[TIMES];
#pragma unroll
    for (int i = 0; i < TIMES; ++i) {
      const int slot = plan.list[pass.row + min(first + i * AT_ONCE + lane / 8, pass.rows - 1)];
      from[i] = ((FIRST ? slot / TOP_K : slot) * STEPS + turn) * 256 + lane % 8 * 32;
    }
    int step = 0;
#pragma unroll 1
    while (step < STEPS) {
      u32 in[AHEAD][8];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int ahead = step + i / TIMES * turns;
        if (ahead + turn < STEPS && first + i % TIMES * AT_ONCE < pass.rows)
          load32(in[i], x + (from[i % TIMES] + ahead * 256));
      }
#pragma unroll
      for (int i = 0; i < AHEAD; i += TIMES) {
#pragma unroll 1
        for (int now = 0; now < turns && step < STEPS; ++now, ++step) {
          barrier_wait(&plan.empty[ring.stage], ring.phase ^ 1);
          __syncwarp();
          const u32 tile = tile_of(stages, ring) + WEIGHT_BYTES, factors = scales_of(stages, ring) + WEIGHT_SCALE_BYTES;
#pragma unroll
          for (int j = 0; j < TIMES; ++j) {
            const int row = first + j * AT_ONCE;
            // All lanes or none: they find the largest number together.
            if (now == turn && row < pass.rows) store_rounded(in[i + j], tile, factors, row + lane / 8, lane % 8);
          }
          show_to_tensor_cores();
          __syncwarp();
          if (lane == 0) barrier_arrive(&plan.full[ring.stage]);
          ring.next();
        }
      }
    }
  });
}
#endif

#if ROUNDS_AHEAD
// What 128 columns of a row become, ahead: FP8 numbers and a factor.
DEVICE void round_ahead_of(const u8* x, u8* numbers, float* factors, int item, int piece) {
  u32 in[8], y[4];
  load32(in, x + item * 256 + piece * 32);
  const float factor = round_to_fp8(in, y);
  store16(numbers + item * 128 + piece * 16, y);
  if (piece == 0) factors[item] = factor;
}
#endif

#if !WGMMA || ROUNDS_AHEAD
template <bool FIRST>
DEVICE void load_rows(Plan& plan, u32 stages, const u8* x, const float* factors) {
  constexpr int DEPTH = FIRST ? HIDDEN : INNER;
  constexpr int PIECES = ROW_BYTES / 16, AT_ONCE = ROW_LOADERS * 32 / PIECES;
  const int thread = threadIdx.x - (MULTIPLIERS + LOADERS) * 32, piece = thread % PIECES;
  Ring ring;
  for_passes<FIRST>(plan, [&](const Pass& pass) {
    for (int k = 0; k < DEPTH; k += CHUNK) {
      barrier_wait(&plan.empty[ring.stage], ring.phase ^ 1);
      const u32 stage = tile_of(stages, ring) + WEIGHT_BYTES;
#pragma unroll 2
      for (int row = thread / PIECES; row < pass.rows; row += AT_ONCE) {
        const int slot = plan.list[pass.row + row], number = FIRST ? slot / TOP_K : slot;
        const u8* from = x + ((long long)number * DEPTH + k) * (FP8_ROWS ? 1 : 2) + piece * 16;
        if (FP8_ROWS && piece == 0)
          copy4(scales_of(stages, ring) + WEIGHT_SCALE_BYTES + row * 4, factors + (number * DEPTH + k) / BLOCK);
        copy16(stage + row * ROW_BYTES + (piece / 8) * 128 + swizzled(row & 7, piece % 8), from);
      }
      barrier_arrive_after_copies(&plan.full[ring.stage]);
      ring.next();
    }
  });
}

#endif

#if FP8 && !FP8_ROWS
// Bytes `first` and `first` + 1 of x, e4m3 numbers, as bf16. Exact: sign, exponent and fraction are moved to their
// places, and the exponent's bias is corrected by a product with 2^120.
DEVICE u32 widen(u32 x, int first) {
  u32 y = permute_bytes(x, first == 0 ? 0x9180 : 0xb3a2);  // each byte with its sign repeated above it
  return multiply_bfloats((y << 4) & 0x87f087f0u, 0x7b807b80u);
}
#endif

// Independent sums of a warp's tile: a tensor core instruction takes longer than loading its operands, so that with few
// slots each would wait for the one before.
template <int NT>
constexpr int PARTS = NT == 1 ? 4 : NT == 2 ? 2 : 1;
template <int NT>
constexpr int SUMS = FP8 ? 1 : PARTS<NT>;  // FP8 adds them up in each stage
template <int N, int NT>
DEVICE float sum_of_parts(const float (&parts)[N][NT][4], int n, int i) {
  float sum = parts[0][n][i];
#pragma unroll
  for (int u = 1; u < N; ++u) sum += parts[u][n][i];
  return sum;
}

#if !WGMMA
// c += a stage's 16 weight rows, from w, times its activations, from x. Calls release() once all is in registers.
// Of numbers of 16 bits, or of FP8 numbers: the instructions for both have the same bytes in the same lanes.
#if FP8_ROWS || !FP8
template <int NT, class F>
DEVICE void multiply_bytes(float (&c)[PARTS<NT>][NT][4], u32 w, u32 x, int row, int lane, F release) {
  u32 a[4][4];
#pragma unroll
  for (int k = 0; k < 4; ++k)
    load_matrices(a[k], w + (lane & 15) * CHUNK_BYTES + swizzled(lane & 7, k * 2 + (lane >> 4)));
  const int mine = row + (lane & 7);
  constexpr int AHEAD = NT <= 3 ? 2 : 1, GROUP = NT < 4 ? NT : 4;
#pragma unroll
  for (int ahead = 0; ahead < 2; ahead += AHEAD)
#pragma unroll
    for (int from = 0; from < NT; from += GROUP) {
      u32 b[AHEAD][GROUP][4];
#pragma unroll
      for (int k = 0; k < AHEAD; ++k)
#pragma unroll
        for (int n = 0; n < GROUP; ++n)
          load_matrices(b[k][n], x + (mine + (from + n) * 8) * ROW_BYTES +
                                     swizzled(mine & 7, (ahead + k) * 4 + (lane >> 3)));
      if (ahead + AHEAD == 2 && from + GROUP >= NT) release();
#pragma unroll
      for (int k = 0; k < AHEAD; ++k)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int n = 0; n < GROUP; ++n) {
            const int step = 2 * (ahead + k) + i;
            multiply(c[step % PARTS<NT>][from + n], a[step], b[k][n][2 * i], b[k][n][2 * i + 1]);
          }
    }
}
#endif

// The same, with FP8 the part of a stage times its scales.
template <int NT, class F>
DEVICE void multiply_stage(float (&c)[SUMS<NT>][NT][4], u32 w, u32 x, int row, u32 scales, u32 factors, int lane,
                           F release) {
#if FP8_ROWS
  float p[PARTS<NT>][NT][4] = {}, of_rows[NT][2];
  multiply_bytes<NT>(p, w, x, row, lane, [] {});
  // Not before: registers are scarce.
  const float of_weights[2] = {get4(scales), get4(scales + 4)};
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      of_rows[n][i] = get4(factors + (row + n * 8 + 2 * (lane & 3) + i) * 4);
  release();
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[0][n][i] += of_weights[i >> 1] * of_rows[n][i & 1] * sum_of_parts(p, n, i);
#elif FP8
  // Lane 4 g + t has columns 8 t to 8 t + 7 of 32, of both operands: the instruction has others there, but sums them all.
  const int g = lane >> 2, t = lane & 3;
  float p[PARTS<NT>][NT][4] = {};
  u32 raw[4][2][2];
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      load8(raw[k][h][0], raw[k][h][1], w + (g + 8 * h) * CHUNK_BYTES + swizzled(g, k * 2 + (t >> 1)) + (t & 1) * 8);
  u32 scales_as_bits[2];
  load8(scales_as_bits[0], scales_as_bits[1], scales);
  const float scale[2] = {__uint_as_float(scales_as_bits[0]), __uint_as_float(scales_as_bits[1])};
  constexpr int AHEAD = NT == 1 ? 4 : NT == 2 ? 2 : 1;  // steps of 32 columns whose activations are loaded together
#pragma unroll
  for (int ahead = 0; ahead < 4; ahead += AHEAD) {
    u32 b[AHEAD][NT][4];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k)
#pragma unroll
      for (int n = 0; n < NT; ++n)
        load16(b[k][n], x + (row + n * 8 + g) * ROW_BYTES + ((ahead + k) >> 1) * 128 +
                            swizzled((row + g) & 7, ((ahead + k) & 1) * 4 + t));
    if (ahead + AHEAD == 4) release();
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      u32 a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int q = 0; q < 4; ++q) a[i][q] = widen(raw[ahead + k][q & 1][i], q & 2);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int n = 0; n < NT; ++n)
          multiply(p[(2 * k + i) % PARTS<NT>][n], a[i], b[k][n][2 * i], b[k][n][2 * i + 1]);
    }
  }
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[0][n][i] += scale[i >> 1] * sum_of_parts(p, n, i);
#else
  multiply_bytes<NT>(c, w, x, row, lane, release);
#endif
}
#endif

// What one warp does in a pass: granule `granule` of an expert, for `rows` slots from list[first], which are the rows
// from `row` of the stages.
struct Share {
  int expert, granule, first, row, rows;
};

#if WGMMA
// c = a [64 x 128] @ b [128 x 8 NT], of four warps.
template <int NT>
DEVICE void multiply_128(float (&c)[NT][4], u64 a, u64 b) {
  before_products();
  multiply_64<false>(c, a, b);
#pragma unroll
  for (int k = 1; k < 4; ++k) multiply_64<true>(c, a + k * 2, b + k * 2);
  end_products();
}

// c += a stage's products times its scales, for which it is waited while N later stages' are under way; the stage is free.
template <int N, int NT>
DEVICE void add_stage(float (&c)[NT][4], float (&p)[NT][4], Plan& plan, u32 stages, Ring& ring) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const u32 scales = scales_of(stages, ring), factors = scales + WEIGHT_SCALE_BYTES;
  float of_weights[2], of_rows[NT][2];
  load_two(of_weights, scales + warp * 8);
#pragma unroll
  for (int n = 0; n < NT; ++n) load_two(of_rows[n], factors + (n * 8 + 2 * (lane & 3)) * 4);
  wait_for_products<N>(p);
  __syncwarp();
  if (lane == 0) barrier_arrive(&plan.empty[ring.stage]);
  ring.next();
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] += of_weights[i >> 1] * of_rows[n][i & 1] * p[n][i];
}

// The same slots for all warps, all of the pass: its right operand starts where 8 rows do. Four warps multiply at once.
// c: the sums over all stages of a pass, of this warp's 16 weight rows and NT times 8 columns. While the tensor cores
// have one stage, the one before is scaled.
template <bool FIRST, int NT>
DEVICE void sum_stages(float (&c)[NT][4], Plan& plan, u32 stages, Ring& ring) {
  constexpr int STEPS = (FIRST ? HIDDEN : INNER) / CHUNK;
  Ring next = ring;
  float even[NT][4], odd[NT][4];
  auto start = [&](float (&p)[NT][4]) {
    const u32 tile = tile_of(stages, next), w = tile + (threadIdx.x >> 5) / 4 * (64 * CHUNK_BYTES);
    barrier_wait(&plan.full[next.stage], next.phase);
    show_to_tensor_cores();
    __syncwarp();
    multiply_128(p, matrix_at(w), matrix_at(tile + WEIGHT_BYTES));
    next.next();
  };
#pragma unroll 1
  for (int step = 1; step < STEPS; step += 2) {
    start(even);
    start(odd);
    add_stage<1>(c, even, plan, stages, ring);
    add_stage<0>(c, odd, plan, stages, ring);
  }
  if (STEPS % 2) {
    start(even);
    add_stage<0>(c, even, plan, stages, ring);
  }
}
#else
// c: the sums over all stages of a pass, of this warp's 16 weight rows and NT times 8 slots from row `row` on.
template <bool FIRST, int NT>
DEVICE void sum_stages(float (&c)[NT][4], Plan& plan, u32 stages, Ring& ring, int row) {
  constexpr int DEPTH = FIRST ? HIDDEN : INNER;
  const int warp = (threadIdx.x >> 5) % CONSUMERS, group = (threadIdx.x >> 5) / CONSUMERS, lane = threadIdx.x & 31;
  float sums[SUMS<NT>][NT][4] = {};
#pragma unroll 1
  for (int k = 0; k < DEPTH; k += CHUNK) {
    if (GROUPS == 2 && (ring.stage & 1) != group) {
      ring.next();
      continue;
    }
    const u32 tile = tile_of(stages, ring), scales = scales_of(stages, ring);
    barrier_wait(&plan.full[ring.stage], ring.phase);
    __syncwarp();
    u64* empty = &plan.empty[ring.stage];
    const u32 w = tile + warp * (GRANULE * CHUNK_BYTES), factors = scales + WEIGHT_SCALE_BYTES;
    multiply_stage<NT>(sums, w, tile + WEIGHT_BYTES, row, scales + warp * 8, factors, lane, [&] {
      __syncwarp();
      if (lane == 0) barrier_arrive(empty);
    });
    ring.next();
  }
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = sum_of_parts(sums, n, i);
}
#endif

template <bool FIRST, int NT>
DEVICE void multiply_pass(Plan& plan, u32 stages, Ring& ring, const Share& mine, const u16* bias, void* out) {
  constexpr int WIDTH = FIRST ? COLUMNS : HIDDEN;
  const int warp = (threadIdx.x >> 5) % CONSUMERS, group = (threadIdx.x >> 5) / CONSUMERS;
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#if WGMMA
  float c[NT][4] = {};
  sum_stages<FIRST, NT>(c, plan, stages, ring);
  if (mine.rows == 0) return;
#else
  float c[NT][4];
  sum_stages<FIRST, NT>(c, plan, stages, ring, mine.row);
#endif
  if (GROUPS == 2) {
    float* other = (float*)(shared + STAGES * STAGE_BYTES + sizeof(Plan)) + (warp * (ROWS / 8) * 4) * 32 + lane;
    if (group == 1)
#pragma unroll
      for (int i = 0; i < NT * 4; ++i) other[i * 32] = c[i / 4][i % 4];
    meet(warp + 1, 64);
    if (group == 0)
#pragma unroll
      for (int i = 0; i < NT * 4; ++i) c[i / 4][i % 4] += other[i * 32];
    meet(warp + 1, 64);
    if (group == 1) return;
  }
  float b[2] = {0.0f, 0.0f};
  if (FIRST ? GATE_UP_BIAS : DOWN_BIAS)
    for (int h = 0; h < 2; ++h)
      b[h] = to_float(bias[(long long)mine.expert * WIDTH + weight_row<FIRST>(mine.granule, g + 8 * h)]);
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = n * 8 + 2 * t + i - (WGMMA ? mine.row : 0);
      if (row < 0 || row >= mine.rows) continue;
      const int slot = plan.list[mine.first + row];
      const float lower = c[n][i] + b[0], upper = c[n][2 + i] + b[1];
      if (!FIRST) {
        float* to = (float*)out + (long long)slot * HIDDEN + mine.granule * GRANULE + g;
        to[0] = lower;
        to[8] = upper;
      } else if (GATED) {
        ((u16*)out)[(long long)slot * INNER + mine.granule * 8 + g] = from_float(combine(lower, upper));
      } else {
        u16* to = (u16*)out + (long long)slot * INNER + mine.granule * GRANULE + g;
        to[0] = from_float(activate(lower));
        to[8] = from_float(activate(upper));
      }
    }
}

// A warp that has no granule of a pass: it only says that it is done with the stages.
template <bool FIRST>
DEVICE void skip_pass(Plan& plan, Ring& ring) {
  const int group = (threadIdx.x >> 5) / CONSUMERS;
#pragma unroll 1
  for (int k = 0; k < (FIRST ? HIDDEN : INNER); k += CHUNK) {
    if (GROUPS == 1 || (ring.stage & 1) == group) {
      barrier_wait(&plan.full[ring.stage], ring.phase);
      if ((threadIdx.x & 31) == 0) barrier_arrive(&plan.empty[ring.stage]);
    }
    ring.next();
  }
}

template <bool FIRST>
DEVICE void multiply_all(Plan& plan, u32 stages, const u16* bias, void* out) {
  const int warp = (threadIdx.x >> 5) % CONSUMERS;
  Ring ring;
  for_passes<FIRST>(plan, [&](const Pass& pass) {
    const bool next = warp >= pass.split;
    const int row = next ? pass.split_rows : 0;
    const Share mine{
        plan.active[pass.rank + (warp < pass.size && next)],
        next ? warp - pass.split : pass.granule + warp,
        pass.row + row,
        row,
        warp >= pass.size ? 0 : next ? pass.rows - row : pass.split_rows,
    };
#if WGMMA
    // What four warps do together they do alike.
    if (warp / 4 * 4 >= pass.size) skip_pass<FIRST>(plan, ring);
    else if (ROWS == 8 || pass.rows <= 8) multiply_pass<FIRST, 1>(plan, stages, ring, mine, bias, out);
    else if (ROWS == 16 || pass.rows <= 16) multiply_pass<FIRST, 2>(plan, stages, ring, mine, bias, out);
    else if (pass.rows <= 24) multiply_pass<FIRST, 3>(plan, stages, ring, mine, bias, out);
    else multiply_pass<FIRST, 4>(plan, stages, ring, mine, bias, out);
#else
    if (mine.rows == 0) skip_pass<FIRST>(plan, ring);
    else if (ROWS == 8 || mine.rows <= 8) multiply_pass<FIRST, 1>(plan, stages, ring, mine, bias, out);
    else if (ROWS == 16 || mine.rows <= 16) multiply_pass<FIRST, 2>(plan, stages, ring, mine, bias, out);
    else if (mine.rows <= 24) multiply_pass<FIRST, 3>(plan, stages, ring, mine, bias, out);
    else if (ROWS == 32 || mine.rows <= 32) multiply_pass<FIRST, 4>(plan, stages, ring, mine, bias, out);
    else multiply_pass<FIRST, 8>(plan, stages, ring, mine, bias, out);
#endif
  });
}

template <bool FIRST>
DEVICE void project(const u8* x, const u8* weight, const float* scale, const u16* bias, const void* ids, void* out,
                    Rounded rounded, int num_slots) {
  Plan& plan = *(Plan*)(shared + STAGES * STAGE_BYTES);
  const u32 stages = shared_address(shared);
  // Blocks of the second projection start when the first has got here, so that ids are complete for them as well. So
  // they are where activations are rounded ahead: that kernel starts when all earlier ones are done.
  if (FIRST && !ROUNDS_AHEAD) wait_for_earlier_kernels();
  if (!FIRST || TRIGGER < 0) let_next_kernel_start();
  make_plan(plan, ids, num_slots);
  const int warp = threadIdx.x >> 5;
  const bool multiplies = warp < MULTIPLIERS, loads_rows = warp >= MULTIPLIERS + LOADERS;
  if ((!FIRST || ROUNDS_AHEAD) && loads_rows) wait_for_earlier_kernels();
  if (multiplies) multiply_all<FIRST>(plan, stages, bias, out);
#if WGMMA && !ROUNDS_AHEAD
  else if (loads_rows) round_rows<FIRST>(plan, stages, x);
#else
  else if (loads_rows) load_rows<FIRST>(plan, stages, ROUNDS_AHEAD ? rounded.numbers : x, rounded.factors);
#endif
  else load_weights<FIRST>(plan, stages, weight, scale);
}

#define PROJECTION extern "C" __global__ void __launch_bounds__(THREADS, GROUPS == 1 ? BLOCKS : 1)

#if ROUNDS_AHEAD
// Rounds `items` times 128 numbers, for all blocks of the projection that follows. Those may start at once; but ahead of
// the first projection only when the ids are complete, which they read without waiting.
extern "C" __global__ void __launch_bounds__(128)
round_ahead(const u8* x, u8* numbers, float* factors, int items, int is_first) {
  if (is_first) wait_for_earlier_kernels();
  let_next_kernel_start();
  if (!is_first) wait_for_earlier_kernels();
  const int item = blockIdx.x * 16 + threadIdx.x / 8;
  // All lanes of a warp or none: they find the largest number together.
  if (blockIdx.x * 16 + threadIdx.x / 32 * 4 < items)
    round_ahead_of(x, numbers, factors, min(item, items - 1), threadIdx.x % 8);
}
#endif

// act [T * K, INNER] in the dtype of x. numbers, factors: room for x rounded, or x rounded ahead, where it is.
PROJECTION gate_up(const u8* x, const u8* weight, const float* scale, const u16* bias, const void* ids, void* act,
                   u8* numbers, float* factors, int num_slots) {
  project<true>(x, weight, scale, bias, ids, act, {numbers, factors}, num_slots);
}

// rows [T * K, HIDDEN] in fp32; those of slots of no expert, or of one named before, stay unwritten.
PROJECTION down(const u8* act, const u8* weight, const float* scale, const u16* bias, const void* ids, void* rows,
                u8* numbers, float* factors, int num_slots) {
  project<false>(act, weight, scale, bias, ids, rows, {numbers, factors}, num_slots);
}

// out [T, HIDDEN]: the sum of a token's rows times routing weights, in slot order. 4 columns a thread.
extern "C" __global__ void __launch_bounds__(128)
sum_slots(const float* rows, const void* ids, const void* weights, u16* out) {
  const int token = blockIdx.y, column = (blockIdx.x * 128 + threadIdx.x) * 4;
  if (column >= HIDDEN) return;
  long long expert[TOP_K];
  bool named[TOP_K];
  float weight[TOP_K];
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) {
    expert[k] = id_of(ids, token * TOP_K + k);
    named[k] = expert[k] >= 0 && expert[k] < EXPERTS;
    weight[k] = routing_weight(weights, token * TOP_K + k);
  }
  // The first of a token's slots that name one expert has its row.
#pragma unroll
  for (int k = 1; k < TOP_K; ++k)
#pragma unroll
    for (int first = 0; first < k; ++first)
      if (named[first] && named[k] && expert[k] == expert[first]) {
        weight[first] += weight[k];
        named[k] = false;
      }
  wait_for_earlier_kernels();
  float x[TOP_K][4];
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) {
    x[k][0] = x[k][1] = x[k][2] = x[k][3] = 0.0f;
    if (named[k])
      load_floats(x[k], rows + ((long long)token * TOP_K + k) * HIDDEN + column);
  }
  float sum[4] = {};
#pragma unroll
  for (int k = 0; k < TOP_K; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += named[k] ? weight[k] * x[k][i] : 0.0f;
  u16* to = out + (long long)token * HIDDEN + column;
  store8(to, from_float(sum[0]) | (u32)from_float(sum[1]) << 16, from_float(sum[2]) | (u32)from_float(sum[3]) << 16);
}
