// `sere::fill`, and `sere::route` with filling or re-routing, in one launch: one cluster of blocks, a warp for each token.
// Through each other's shared memory the blocks exchange what their tokens say about each expert, where two launches
// would go through memory. For few tokens, whose cost is launches and instructions that are fetched for the first time:
// little code.
//
// Compiled at first use (cluster.py), with these numbers as macros:
//   EXPERTS, TOP_K, SELECT (S), REROUTES (by similarity; else the kernel fills), GIVEN (ids, weights and scores are; else
//   the kernel selects by logits), SCORING (0: scores, with GIVEN; 1: softmax, 2: sigmoid, 3: softmax_after, 4: none),
//   RENORMALIZE, HAS_BIAS, HAS_CHOICE, HAS_MASK, HAS_MAX, HAS_THRESHOLD, HAS_PROJECTION, HAS_REAL, HAS_REROUTED, IDS64,
//   HIDDEN (above 0 the logits are made of hidden states of this size by the router's weight), HALF (both are fp16),
//   TILES (of 8 tokens, where there are hidden states), and types of floats (0: fp32, 1: bf16, 2: fp16): SCORES (logits
//   too), CHOICES, BIAS, WEIGHTS, SIMILARITY
// common.cuh comes before this file. What is computed: reference.py of ops/fill, ops/route and ops/reroute.

constexpr int MOST_BLOCKS = 8, MOST_WARPS = 32;
constexpr int LANE = (EXPERTS + 31) / 32;  // experts of a lane: its number, that and 32, and so on
constexpr int SPAN = LANE * 32;
constexpr int LEAST = -0x7fffffff - 1;     // below the key of every float
constexpr u32 ALL = 0xffffffff;
constexpr float CLOSED = -3.0e38f;         // reference.py has these three
constexpr float WORTH = 0.75f, RESTORE = 0.75f;
#define NOTHING __int_as_float(0xff800000)  // -inf

// Whether the scores alone rank; and whether they leave room for an expert's number in the low bits of its key.
constexpr bool X_RANKS = !HAS_BIAS && !HAS_CHOICE;
constexpr bool PACKED = X_RANKS && SCORES != 0;
constexpr int LOW = 8191;                  // of an fp32 that a 16-bit float became these bits say nothing

// What a block's tokens, or all, say about an expert: sum of squared weights; bit k: a slot k names it.
struct __align__(8) Said {
  float mass;
  u32 slots;
};
#if HIDDEN
constexpr int PART = HIDDEN / MOST_BLOCKS;            // columns of a block
constexpr int WARPS = SPAN / 16 > 8 ? SPAN / 16 : 8;  // of a block, and so many tokens at most
#endif
struct __align__(16) Board {
  u64 barrier;
  Said received[MOST_BLOCKS][SPAN];
  Said all[SPAN];
  int key[SPAN];
  int place[SPAN];                         // of an expert: how many come before it
#if HIDDEN
  u64 projected;
  float sums[MOST_BLOCKS][WARPS][SPAN];
  union __align__(16) {
    u16 hidden[TILES * 8][PART + 8];       // before sums have come
    Said token[WARPS][SPAN];
  };
#else
  Said token[MOST_WARPS][SPAN];
#endif
};

template <int TYPE>
DEVICE float number(const void* from, long long i) {
  if (TYPE == 0) return ((const float*)from)[i];
  const u16 x = ((const u16*)from)[i];
  return TYPE == 1 ? bfloat_to_float(x) : half_to_float(x);
}
// As it is when it has been stored.
template <int TYPE>
DEVICE float rounded(float x) {
  return TYPE == 0 ? x : TYPE == 1 ? bfloat_to_float(float_to_bfloat(x)) : half_to_float(float_to_half(x));
}
DEVICE void store_weight(void* to, int i, float x) {
  if (WEIGHTS == 0) ((float*)to)[i] = x;
  else ((u16*)to)[i] = WEIGHTS == 1 ? float_to_bfloat(x) : float_to_half(x);
}

// Numbers that sort like floats: 0.0 and -0.0 are equal, NaN is above everything, as in torch.topk. And back.
DEVICE int order_of(float x) {
  const int order = x == 0 ? 0 : __float_as_int(x);
  return x != x ? 0x7fffffff : order ^ (order >> 31 & 0x7fffffff);
}
DEVICE float of_order(int order) { return __int_as_float(order ^ (order >> 31 & 0x7fffffff)); }
// The same with an expert's number in the low bits, where there is room.
DEVICE int key_of(float x, int expert) {
  const int key = order_of(x);
  return PACKED ? (key & ~LOW) | (LOW - expert) : key;
}
DEVICE float of_key(int key) {
  if (PACKED) key = key < 0 ? key | LOW : key & ~LOW;
  return of_order(key);
}

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}
// Of the lanes that hold slots, to these.
constexpr int SLOT_LANES = TOP_K <= 1 ? 1 : TOP_K <= 2 ? 2 : TOP_K <= 4 ? 4 : TOP_K <= 8 ? 8 : 16;
DEVICE float slot_sum(float x) {
#pragma unroll
  for (int step = SLOT_LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}

// The greatest of a warp's keys and its expert, the lowest of equals, which loses its key.
struct Best {
  int key, expert;
};
DEVICE Best take_best(int (&keys)[LANE]) {
  const int lane = threadIdx.x & 31;
  int mine = keys[0];
#pragma unroll
  for (int j = 1; j < LANE; ++j) mine = max(mine, keys[j]);
  const int key = warp_max(mine);
  int expert = LOW - (key & LOW);
  if (!PACKED) {
    int which = 0;
#pragma unroll
    for (int j = LANE - 1; j >= 0; --j)
      if (keys[j] == mine) which = j;
    expert = warp_min(mine == key ? which * 32 + lane : SPAN);
  }
#pragma unroll
  for (int j = 0; j < LANE; ++j)
    if (PACKED ? keys[j] == key : j * 32 + lane == expert) keys[j] = LEAST;
  return {key, expert};
}

// What an expert's score is in `sere::route`, of a softmax up to a factor of the token's; `greatest`: of its logits.
DEVICE float score_of(float x, float greatest) {
  if (SCORING == 0) return x;
  return SCORING == 2 ? divided(1, 1 + exponential(-x)) : exponential(x - greatest);
}

// A token: what ranks and weighs its experts; and, in the lanes of its slots, the expert (or -1) and weight of each.
struct Token {
  float x[LANE];       // logits or scores
  float choice[LANE];
  float greatest;      // of its logits
  u32 named;           // bit j: a slot names the lane's expert j
  long long id;
  int expert;
  float chosen;        // x of the expert
  float weight;
};

// Each lane's own expert: its x, from the lane that has it.
DEVICE float x_of(const Token& token, int expert) {
  float found = NOTHING;
#pragma unroll
  for (int j = 0; j < LANE; ++j) {
    const float x = __shfl_sync(ALL, token.x[j], expert & 31);
    if (expert >> 5 == j) found = x;
  }
  return found;
}

DEVICE void select(Token& token, float epsilon, float scale) {
  const int lane = threadIdx.x & 31;
  int keys[LANE];
  float total = 0;
#pragma unroll
  for (int j = 0; j < LANE; ++j) {
    const int e = j * 32 + lane;
    keys[j] = e < EXPERTS ? key_of(token.choice[j], e) : LEAST;
    total += exponential(token.x[j] - token.greatest);
  }
#pragma unroll 1
  for (int k = 0; k < TOP_K; ++k) {
    const Best best = take_best(keys);
    if (lane == (best.expert & 31)) token.named |= 1u << (best.expert >> 5);
    if (lane == k) token.expert = best.expert, token.chosen = of_key(best.key);
  }
  token.id = token.expert;
  if (!X_RANKS) token.chosen = x_of(token, token.expert);
  if (lane >= TOP_K) token.chosen = NOTHING;
  float weight = SCORING == 2 ? score_of(token.chosen, 0)
      : SCORING == 4 ? token.chosen : exponential(token.chosen - token.greatest);
  if (SCORING == 1) weight = divided(weight, warp_sum(total));
  if (SCORING == 3) weight = divided(weight, slot_sum(weight));
  if (RENORMALIZE) weight = divided(weight, slot_sum(lane < TOP_K ? weight : 0) + epsilon);
  token.weight = lane < TOP_K ? rounded<WEIGHTS>(weight * scale) : 0;
}

#if HIDDEN
// Logits of hidden states [T, HIDDEN] and the router's weight [EXPERTS, HIDDEN]: each block multiplies its part of the
// columns for all tokens, and sends a token's sums to the block that has the token.
constexpr int STEPS = PART / 32;              // of 32 columns
constexpr int AHEAD = STEPS < 8 ? STEPS : 8;  // steps whose weights are asked for at once
struct __align__(16) Eight {
  u32 pairs[4];
};
// A lane's part of 16 rows: two rows, 8 columns of each step.
struct Weights {
  Eight of[AHEAD][2];
};
DEVICE int first_row() { return threadIdx.x / 32 * 16 + (threadIdx.x & 31) / 4; }
DEVICE int first_column(int step) { return step * 32 + (threadIdx.x & 3) * 8; }
DEVICE void read_weights(Weights& weights, const u16* router, int step) {
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int e = first_row() + half * 8, column = (int)cluster_rank() * PART + first_column(step + i);
      weights.of[i][half] = {};
      if (e < EXPERTS && step + i < STEPS) weights.of[i][half] = *(const Eight*)(router + e * HIDDEN + column);
    }
  }
}
// The block's columns of all tokens, four loads of a thread at once.
DEVICE void read_hidden(Board& board, const u16* hidden, long long stride, int num_tokens) {
  constexpr int PIECES = TILES * PART, EACH = (PIECES + 32 * WARPS - 1) / (32 * WARPS), ONCE = EACH < 4 ? EACH : 4;
#pragma unroll 1
  for (int from = 0; from < EACH; from += ONCE) {
    Eight found[ONCE];
#pragma unroll
    for (int i = 0; i < ONCE; ++i) {
      const int piece = (from + i) * 32 * WARPS + threadIdx.x, t = piece / (PART / 8), column = piece % (PART / 8) * 8;
      found[i] = {};
      if (t < num_tokens) found[i] = *(const Eight*)(hidden + t * stride + (int)cluster_rank() * PART + column);
    }
#pragma unroll
    for (int i = 0; i < ONCE; ++i) {
      const int piece = (from + i) * 32 * WARPS + threadIdx.x;
      if (piece < PIECES) *(Eight*)&board.hidden[piece / (PART / 8)][piece % (PART / 8) * 8] = found[i];
    }
  }
  __syncthreads();
}
// In the products columns stand in the order in which lanes have them, which is the same for both.
DEVICE void project(float (&sums)[TILES][4], Weights& weights, const Board& board, const u16* router) {
#pragma unroll 1
  for (int step = 0; step < STEPS; step += AHEAD) {
    if (step > 0) read_weights(weights, router, step);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (step + i >= STEPS) break;
      const Eight &a = weights.of[i][0], &b = weights.of[i][1];
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        const Eight x = *(const Eight*)&board.hidden[n * 8 + (threadIdx.x & 31) / 4][first_column(step + i)];
        multiply(sums[n], {a.pairs[0], b.pairs[0], a.pairs[1], b.pairs[1]}, x.pairs[0], x.pairs[1]);
        multiply(sums[n], {a.pairs[2], b.pairs[2], a.pairs[3], b.pairs[3]}, x.pairs[2], x.pairs[3]);
      }
    }
  }
}
// What a thread has are rows of experts, and two columns, of tokens, of each tile.
DEVICE void send_sums(Board& board, const float (&sums)[TILES][4], int num_tokens) {
  const int warps = blockDim.x / 32, mine = cluster_rank();
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int e = first_row() + i / 2 * 8, t = n * 8 + (threadIdx.x & 3) * 2 + i % 2;
      if (e < EXPERTS && t < num_tokens)
        store_and_tell(&board.sums[mine][t % warps][e], &board.projected, t / warps, sums[n][i]);
    }
  }
}
// Of this warp's token.
DEVICE float logit(const Board& board, int e) {
  float sum = 0;
#pragma unroll
  for (int block = 0; block < MOST_BLOCKS; ++block) sum += board.sums[block][threadIdx.x / 32][e];
  return rounded<SCORES>(sum);
}
#endif

// Reads a token of logits or scores, and selects its experts where they are not given.
DEVICE void read_token(Token& token, const Board& board, const void* scores, long long row, const void* choice,
                       long long choice_row, const void* bias, const void* ids, const void* weights, int t,
                       float epsilon, float scale) {
  const int lane = threadIdx.x & 31;
  if (GIVEN && lane < TOP_K) {
    const int slot = t * TOP_K + lane;
    token.id = IDS64 ? ((const long long*)ids)[slot] : ((const int*)ids)[slot];
    token.weight = number<WEIGHTS>(weights, slot);
  }
  float greatest = NOTHING;
#pragma unroll
  for (int j = 0; j < LANE; ++j) {
    const int e = j * 32 + lane;
#if HIDDEN
    token.x[j] = e < EXPERTS ? logit(board, e) : NOTHING;
#else
    token.x[j] = e < EXPERTS ? number<SCORES>(scores, row + e) : NOTHING;
#endif
    greatest = fmaxf(greatest, token.x[j]);
  }
  if (SCORING != 0 && SCORING != 2) token.greatest = of_key(warp_max(key_of(greatest, 0)));
  float total = 1;
  if (HAS_BIAS && SCORING == 1) {
    total = 0;
#pragma unroll
    for (int j = 0; j < LANE; ++j) total += exponential(token.x[j] - token.greatest);
    total = warp_sum(total);
  }
#pragma unroll
  for (int j = 0; j < LANE; ++j) {
    const int e = j * 32 + lane;
    token.choice[j] = token.x[j];
    if (HAS_CHOICE) token.choice[j] = e < EXPERTS ? number<CHOICES>(choice, choice_row + e) : NOTHING;
    if (HAS_BIAS && SCORING == 1) token.choice[j] = divided(exponential(token.x[j] - token.greatest), total);
    if (HAS_BIAS && SCORING == 2) token.choice[j] = score_of(token.x[j], 0);
    if (HAS_BIAS && e < EXPERTS) token.choice[j] += number<BIAS>(bias, e);
  }
  if (!GIVEN) return select(token, epsilon, scale);
  if (lane < TOP_K && token.id >= 0 && token.id < EXPERTS) token.expert = (int)token.id;
  token.chosen = x_of(token, max(token.expert, 0));
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) {
    const int e = __shfl_sync(ALL, token.expert, k);
    if (e >= 0 && lane == (e & 31)) token.named |= 1u << (e >> 5);
  }
}

// The token's own row of the board.
DEVICE void say(Said* row, const Token& token, bool is_real) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < LANE; ++j) row[j * 32 + lane] = {0, 0};
  __syncwarp();
  const float square = token.weight * token.weight;
  const Said said = {square >= 0 ? square : 0, 1u << lane};  // not NaN
  const bool is_said = is_real && token.expert >= 0;
  // Given ids may name an expert twice; slot by slot then, in order.
  bool is_twice = false;
  if (GIVEN) is_twice = __popc(__match_any_sync(ALL, is_said ? token.expert : -1 - lane)) > 1;
  if (!GIVEN || __ballot_sync(ALL, is_twice) == 0) {
    if (is_said) row[token.expert] = said;
    return;
  }
#pragma unroll 1
  for (int k = 0; k < TOP_K; ++k) {
    if (is_said && lane == k) {
      const Said before = row[token.expert];
      row[token.expert] = {before.mass + said.mass, before.slots | said.slots};
    }
    __syncwarp();
  }
}

// What all tokens say about each expert, to board.all. All threads of all blocks.
DEVICE void exchange(Board& board, const Token& token, bool is_real, int blocks) {
  const int e = threadIdx.x, warps = blockDim.x / 32;
  say(board.token[e / 32], token, is_real);
  __syncthreads();
  if (!HIDDEN) wait_for_cluster();  // all of its blocks have started, and can be written to
  if (e < SPAN) {
    Said said = {0, 0};
#pragma unroll 4
    for (int w = 0; w < warps; ++w) {
      const Said other = board.token[w][e];
      said.mass += other.mass, said.slots |= other.slots;
    }
    const u32 mine = cluster_rank();
#pragma unroll 1
    for (int to = 0; to < blocks; ++to)
      store_and_tell(&board.received[mine][e], &board.barrier, to, (u32)__float_as_int(said.mass), said.slots);
    wait_for_bytes(&board.barrier);
    said = {0, 0};
#pragma unroll
    for (int b = 0; b < MOST_BLOCKS; ++b) {
      if (b < blocks) {
        const Said other = board.received[b][e];
        said.mass += other.mass, said.slots |= other.slots;
      }
    }
    board.all[e] = said;
  }
  __syncthreads();
}

// Sets of experts: bit j of a lane is the lane's expert j.
DEVICE bool has(u32 experts, int expert) { return __shfl_sync(ALL, experts, expert & 31) >> (expert >> 5) & 1; }
DEVICE int count(u32 experts) {
  int found = 0;
#pragma unroll
  for (int j = 0; j < LANE; ++j) found += __popc(__ballot_sync(ALL, experts >> j & 1));
  return found;
}
// Those that one of these slots names.
DEVICE u32 named_by(const Said (&all)[LANE], u32 slots) {
  u32 found = 0;
#pragma unroll
  for (int j = 0; j < LANE; ++j) found |= (u32)((all[j].slots & slots) != 0) << j;
  return found;
}

// The first `number` experts, and with a threshold those above it; all threads. First choices come first, then the
// heaviest, then the lowest.
DEVICE u32 best_experts(Board& board, const Said (&all)[LANE], float threshold, int number) {
  const int thread = threadIdx.x, lane = thread & 31, parts = blockDim.x / SPAN, part = thread / SPAN, e = thread % SPAN;
  if (thread < SPAN) {
    // First choices are 0 and above, by the bits of their masses; other experts in use below; the rest the least.
    const Said said = board.all[e];
    const int bits = __float_as_int(said.mass);
    board.key[e] = said.slots == 0 ? LEAST : said.slots & 1 ? bits : (bits ^ LEAST) + 1;
    board.place[e] = 0;
  }
  __syncthreads();
  // Each part of the threads compares with its part of the experts.
  if (part < parts) {
    const int mine = board.key[e], each = (SPAN + parts - 1) / parts;
    int before = 0;
#pragma unroll 8
    for (int i = part * each; i < min(SPAN, part * each + each); ++i) before += board.key[i] > mine - (i < e);
    if (mine != LEAST && before) atomicAdd(&board.place[e], before);
  }
  __syncthreads();
  float sum = 0;
  if (HAS_THRESHOLD) {
#pragma unroll
    for (int j = 0; j < LANE; ++j) sum += all[j].mass;
    sum = warp_sum(sum);
  }
  u32 found = 0;
#pragma unroll
  for (int j = 0; j < LANE; ++j) {
    bool kept = board.place[j * 32 + lane] < number;
    if (HAS_THRESHOLD) kept |= all[j].mass > threshold * sum;
    found |= (u32)(kept && all[j].slots != 0) << j;
  }
  return found;
}

// The experts that the batch keeps: all that there are, where it loses none that it uses. All threads.
DEVICE u32 kept_experts(Board& board, float threshold, int least, int budget) {
  Said all[LANE];
#pragma unroll
  for (int j = 0; j < LANE; ++j) all[j] = board.all[j * 32 + (threadIdx.x & 31)];
  const u32 used = named_by(all, ALL), first = named_by(all, 1);
  int number = budget;
  if (!HAS_MAX) {
    int width = SELECT;
    number = count(named_by(all, (1u << width) - 1));
#pragma unroll 1
    while (number < least && width < TOP_K) number = count(named_by(all, (1u << ++width) - 1));
  }
  if (number >= count(used)) return ALL;
  if (!HAS_THRESHOLD && number == count(first)) return first;
  const u32 kept = best_experts(board, all, threshold, number);
  return HAS_THRESHOLD && count(kept) == count(used) ? ALL : kept;
}

// Lost slots go to kept experts that the token does not name: ids and weights of its slots, in their lanes.
DEVICE void fill(u32 kept, Token& token) {
  const int lane = threadIdx.x & 31;
  const bool is_expert = token.expert >= 0, is_kept = has(kept, max(token.expert, 0)), is_lost = is_expert && !is_kept;
  const u32 lost = __ballot_sync(ALL, is_lost);
  if (lost == 0) return;
  int keys[LANE];
#pragma unroll
  for (int j = 0; j < LANE; ++j) {
    const bool is_candidate = (kept & ~token.named) >> j & 1;
    keys[j] = is_candidate ? key_of(token.choice[j] > CLOSED ? token.choice[j] : NOTHING, j * 32 + lane) : LEAST;
  }
  int expert = token.expert;
  float x = NOTHING;
  bool is_filled = false;
#pragma unroll 1
  for (u32 left = lost; left; left &= left - 1) {
    const Best best = take_best(keys);
    if (best.key == LEAST) break;
    const float choice = of_key(best.key);
    if ((left & (0 - left)) >> lane & 1) expert = best.expert, is_filled = choice > CLOSED, x = choice;
  }
  if (!X_RANKS) x = x_of(token, max(expert, 0));
  const float chosen = slot_sum(is_expert ? score_of(token.chosen, token.greatest) : 0);
  const float total = slot_sum(is_expert ? token.weight : 0);
  const float worth = chosen > 0 ? WORTH * divided(total, chosen) : 0;
  float weight = token.weight;
  if (is_lost) weight = is_filled ? worth * score_of(x, token.greatest) : 0;
  const float sum = slot_sum(is_expert ? weight : 0);
  if (total > 0 && sum > 0) weight *= power(divided(total, sum), RESTORE);
  if (is_expert) token.weight = weight;
  if (is_lost) token.id = expert;
}

// Re-routing

// Rows of similarities that a lane has its part of at once: they are asked for before other blocks are waited for.
constexpr int AT_ONCE = TOP_K - SELECT < 32 / LANE ? TOP_K - SELECT : 32 / LANE;
struct Rows {
  float x[AT_ONCE][LANE];
};
// Of the experts of slots from this one on.
DEVICE void read_rows(Rows& rows, const Token& token, int from, const void* similarity) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i) {
    const int expert = __shfl_sync(ALL, token.expert, min(from + i, TOP_K - 1));
#pragma unroll
    for (int j = 0; j < LANE; ++j) {
      const int e = j * 32 + lane;
      rows.x[i][j] = expert >= 0 && e < EXPERTS ? number<SIMILARITY>(similarity, expert * EXPERTS + e) : NOTHING;
    }
  }
}

// The experts that no slot may leave: those of the first S slots, or of more.
DEVICE u32 primary_experts(const Board& board, int least, int budget) {
  Said all[LANE];
#pragma unroll
  for (int j = 0; j < LANE; ++j) all[j] = board.all[j * 32 + (threadIdx.x & 31)];
  int width = SELECT;
#pragma unroll 1
  for (; width < TOP_K; ++width) {
    const bool enough = least <= 0 || count(named_by(all, (1u << width) - 1)) >= least;
    if (enough && !(HAS_MAX && count(named_by(all, (2u << width) - 1)) <= budget)) break;
  }
  return width < TOP_K ? named_by(all, (1u << width) - 1) : ALL;
}

// Of these experts the most similar, the lowest of equals; -1 where none is similar enough. NaN and -inf never are.
DEVICE int most_similar(const float (&row)[LANE], u32 experts, float threshold) {
  float mine = NOTHING;
  int which = SPAN;
#pragma unroll
  for (int j = 0; j < LANE; ++j)
    if ((experts >> j & 1) && row[j] > mine) mine = row[j], which = j * 32 + (threadIdx.x & 31);
  const int order = order_of(mine), greatest = warp_max(order);
  const int expert = warp_min(order == greatest ? which : SPAN);
  return expert == SPAN || (HAS_THRESHOLD && of_order(greatest) < threshold) ? -1 : expert;
}

// Slots on other experts go to the most similar primary one: ids and weights of the token, in its slots' lanes.
DEVICE void reroute(u32 primary, Token& token, Rows& rows, const void* similarity, const float* projection,
                    float threshold) {
  const int lane = threadIdx.x & 31;
  const bool is_primary = has(primary, max(token.expert, 0));
  const u32 leaves = __ballot_sync(ALL, token.expert >= 0 && !is_primary);
  int to = -1;
#pragma unroll 1
  for (int from = SELECT; from < TOP_K; from += AT_ONCE) {
    if (leaves >> from == 0) break;
    if (from > SELECT) read_rows(rows, token, from, similarity);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      if (!(leaves >> (from + i) & 1)) continue;
      const int expert = most_similar(rows.x[i], primary, threshold);
      if (lane == from + i) to = expert;
    }
  }
  if (to < 0) return;
  if (HAS_PROJECTION) token.weight *= projection[token.expert * EXPERTS + to];
  token.id = to;
}

extern "C" __global__ void __launch_bounds__(REROUTES ? 512 : 1024)
route_cluster(const void* scores, const void* router, const void* choice, const void* bias, const void* ids,
              const void* weights, const u8* mask, const void* similarity, const float* projection,
              const long long* real, const long long* rerouted, void* out_ids, void* out_weights, int num_tokens,
              int stride, int choice_stride, int mask_stride, float epsilon, float scale, float threshold, int least,
              int budget, int blocks) {
  Board& board = *(Board*)dynamic_memory();
  // Without hidden states blocks without tokens are few.
  const int warps = blockDim.x / 32, owners = HIDDEN ? (num_tokens + warps - 1) / warps : blocks;
  const int lane = threadIdx.x & 31, first = cluster_rank() * warps, t = first + threadIdx.x / 32;
  const bool is_token = t < num_tokens;
  if (threadIdx.x == 0) expect_bytes(&board.barrier, owners * (int)sizeof board.received[0]);
#if HIDDEN
  if (threadIdx.x == 0)
    expect_bytes(&board.projected, max(0, min(warps, num_tokens - first)) * EXPERTS * MOST_BLOCKS * 4);
  Weights ahead;  // no kernel writes these
  read_weights(ahead, (const u16*)router, 0);
#endif
  arrive_at_cluster();
  wait_for_earlier_kernels();
  let_next_kernel_start();
  const long long num_real = HAS_REAL ? *real : num_tokens, num_rerouted = HAS_REROUTED ? *rerouted : num_tokens;
#if HIDDEN
  float sums[TILES][4] = {};
  read_hidden(board, (const u16*)scores, stride, num_tokens);
  project(sums, ahead, board, (const u16*)router);
  wait_for_cluster();  // all blocks have started, and can be written to
  send_sums(board, sums, num_tokens);
  if (cluster_rank() >= owners) return;
  wait_for_bytes(&board.projected);
#endif
  Token token;
  token.expert = -1, token.id = -1, token.weight = 0, token.named = 0, token.greatest = 0;
  if (is_token && t < num_real)
    read_token(token, board, scores, (long long)t * stride, choice, (long long)t * choice_stride, bias, ids, weights, t,
               epsilon, scale);
  const bool counts = is_token && t < num_rerouted && (!HAS_MASK || mask[(long long)t * mask_stride]);
  if (REROUTES) {
    Rows rows;
    read_rows(rows, token, SELECT, similarity);
    exchange(board, token, counts, owners);
    const u32 primary = primary_experts(board, least, budget);
    if (counts) reroute(primary, token, rows, similarity, projection, threshold);
  } else {
    exchange(board, token, counts, owners);
    const u32 kept = kept_experts(board, threshold, least, budget);
    if (is_token && t < num_rerouted) fill(kept, token);
  }
  if (!is_token || lane >= TOP_K) return;
  const int slot = t * TOP_K + lane;
  if (IDS64) ((long long*)out_ids)[slot] = token.id;
  else ((int*)out_ids)[slot] = (int)token.id;
  store_weight(out_weights, slot, token.weight);
}
