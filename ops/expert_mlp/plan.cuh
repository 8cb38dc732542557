// What a block of stream.cu has to do: which experts are active, which slots theirs, which weight rows the block's.
// The macros are stream.cu's; hopper.cuh comes before this file.

constexpr int CONSUMERS = 8, LOADERS = 2, ROW_LOADERS = ROW_WARPS;
constexpr int MULTIPLIERS = CONSUMERS * GROUPS;           // warps that multiply: each group has every GROUPS-th stage
constexpr int THREADS = (MULTIPLIERS + LOADERS + ROW_LOADERS) * 32;
// A granule is 16 weight rows, one tensor core instruction's: 8 of gate and 8 of up, or 16 of one kind.
constexpr int GRANULE = 16;
constexpr int CHUNK_BYTES = 128;                            // of a weight row, a stage
constexpr int CHUNK = FP8 ? CHUNK_BYTES : CHUNK_BYTES / 2;  // the same in columns
constexpr int WEIGHT_BYTES = CONSUMERS * GRANULE * CHUNK_BYTES;
constexpr bool WIDENED = FP8 && !FP8_ROWS;                 // FP8 weights, 16-bit activations
constexpr int ROW_BYTES = WIDENED ? CHUNK * 2 : CHUNK_BYTES;  // of activations, a stage
constexpr int WEIGHT_SCALE_BYTES = FP8 ? 128 : 0;
constexpr int SCALE_BYTES = WEIGHT_SCALE_BYTES + (FP8_ROWS ? ROWS * 4 : 0);
constexpr int TILE_BYTES = WEIGHT_BYTES + ROWS * ROW_BYTES;
constexpr int STAGE_BYTES = TILE_BYTES + SCALE_BYTES;
static_assert(!WGMMA || (FP8_ROWS && !HALF && GROUPS == 1 && ROWS <= 32 && TILE_BYTES % 1024 == 0), "not with wgmma");
// Of the threads that copy or round activations, those that tell a stage's barrier.
constexpr int ROW_ARRIVALS = WGMMA && !ROUNDS_AHEAD ? ROW_LOADERS : ROW_LOADERS * 32;
constexpr int COLUMNS = GATED ? 2 * INNER : INNER;
constexpr int BLOCK = 128;                                  // rows and columns of one FP8 scale

struct __align__(16) Plan {
  u64 full[STAGES], empty[STAGES];
  int count[EXPERTS];                                       // slots of an expert, then where its first one is in list
  int first[EXPERTS + 1];                                   // in list, by rank of the active expert
  u16 active[EXPERTS];
  u16 list[MAX_SLOTS];                                      // slots by expert
  u16 place[MAX_SLOTS];                                     // of a slot among its expert's
  int num_active;
};

extern __shared__ __align__(1024) u8 shared[];

// After the plan: the sums that groups exchange, and what a last tile of 8 rows reads beyond the last stage.
static_assert(sizeof(Plan) + (GROUPS == 2 ? 512 * ROWS : WGMMA ? 0 : 7 * ROW_BYTES) <= PLAN_BYTES, "more than was asked for");

DEVICE long long id_of(const void* ids, int slot) {
#if IDS64
  return ((const long long*)ids)[slot];
#else
  return ((const int*)ids)[slot];
#endif
}

// Which experts are active and which slots are theirs. All threads.
DEVICE void make_plan(Plan& plan, const void* ids, int num_slots) {
  const int thread = threadIdx.x, lane = thread & 31;
  // The expert that a slot names, or -1: also where an earlier slot of its token names the same one, as re-routing
  // leaves some, which then has the weights of both. The first ones are loaded while the rest is made ready.
  auto expert_of = [&](int slot) {
    if (slot >= num_slots) return -1;
    const long long e = id_of(ids, slot);
    bool is_new = e >= 0 && e < EXPERTS;
#pragma unroll
    for (int k = 1; k < TOP_K; ++k)
      if (k <= slot % TOP_K && id_of(ids, slot - k) == e) is_new = false;
    return is_new ? (int)e : -1;
  };
  const int first_expert = expert_of(thread);
  for (int e = thread; e < EXPERTS; e += THREADS) plan.count[e] = 0;
  if (thread == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(&plan.full[s], LOADERS * 32 + ROW_ARRIVALS);
      barrier_init(&plan.empty[s], CONSUMERS);
    }
  }
  __syncthreads();
  for (int start = 0; start < num_slots; start += THREADS) {
    const int slot = start + thread, e = start == 0 ? first_expert : expert_of(slot);
    // One addition for all slots of a warp that name the same expert.
    const u32 same = __match_any_sync(~0u, e);
    int place = 0;
    if (e >= 0 && lane == __ffs(same) - 1) place = atomicAdd(&plan.count[e], __popc(same));
    place = __shfl_sync(~0u, place, __ffs(same) - 1) + __popc(same & ((1u << lane) - 1));
    if (slot < num_slots) plan.place[slot] = place;
  }
  __syncthreads();
  if (thread < 32) {
    constexpr int EACH = (EXPERTS + 31) / 32;
    int active = 0, slots = 0;
    for (int i = 0; i < EACH; ++i) {
      int e = lane * EACH + i;
      int n = e < EXPERTS ? plan.count[e] : 0;
      active += n > 0;
      slots += n;
    }
    int rank = active, place = slots;
    for (int step = 1; step < 32; step *= 2) {
      int a = __shfl_up_sync(~0u, rank, step), b = __shfl_up_sync(~0u, place, step);
      if (lane >= step) rank += a, place += b;
    }
    if (lane == 31) plan.num_active = rank, plan.first[rank] = place;
    rank -= active;
    place -= slots;
    for (int i = 0; i < EACH; ++i) {
      int e = lane * EACH + i;
      int n = e < EXPERTS ? plan.count[e] : 0;
      if (n > 0) {
        plan.active[rank] = e;
        plan.first[rank++] = place;
        plan.count[e] = place;
        place += n;
      }
    }
  }
  __syncthreads();
  // Warps come in no fixed order, which no result depends on: every slot has a column of its own.
  for (int slot = thread; slot < num_slots; slot += THREADS) {
    const int e = slot == thread ? first_expert : expert_of(slot);
    if (e >= 0) plan.list[plan.count[e] + plan.place[slot]] = slot;
  }
  __syncthreads();
}

// `size` granules: `split` of them the active expert `rank`'s, from `granule`; the others the next one's first.
// Of `rows` slots, from list[row], the first `split_rows` are the first expert's. `is_last`: of the block.
struct Pass {
  int rank, granule, size, split, row, rows, split_rows;
  bool is_last;
};

// Of an expert in a projection.
template <bool FIRST>
constexpr int GRANULES = FIRST && GATED ? INNER / 8 : (FIRST ? INNER : HIDDEN) / GRANULE;

// This block's, of those of all active experts one after the other.
struct Range {
  int begin, end;
};
DEVICE Range my_granules(const Plan& plan, int of_expert) {
  const long long total = (long long)plan.num_active * of_expert;
  return {(int)(total * blockIdx.x / gridDim.x), (int)(total * (blockIdx.x + 1) / gridDim.x)};
}

// Calls f(pass) for each pass of this block: the same sequence in every warp. In one place: f is inlined there, and every
// instruction is fetched anew in each launch.
template <bool FIRST, class F>
DEVICE void for_passes(const Plan& plan, F f) {
  constexpr int EACH = GRANULES<FIRST>;
  const Range mine = my_granules(plan, EACH);
  int begin = mine.begin, done = 0;  // slots of the tile at `begin` that earlier passes had
  const int end = mine.end;
#pragma unroll 1
  while (begin < end) {
    const int rank = begin / EACH, granule = begin % EACH;
    const int tiles = (end - begin + CONSUMERS - 1) / CONSUMERS, size = (end - begin + tiles - 1) / tiles;
    const int here = min(size, EACH - granule), first = plan.first[rank], last = plan.first[rank + 1];
    // A tile of two experts: one of few granules would have few bytes under way.
    const bool two = size - here > 0 && size - here <= EACH && plan.first[rank + 2] - first <= ROWS;
    const int row = first + done, rows = two ? plan.first[rank + 2] - first : min(last - row, ROWS);
    const bool ends = two || row + ROWS >= last;
    const int taken = two ? size : here;
    f(Pass{rank, granule, taken, here, row, rows, two ? last - first : rows, ends && begin + taken >= end});
    begin += ends ? taken : 0;
    done = ends ? 0 : done + ROWS;
  }
}

struct Ring {
  int stage = 0;
  u32 phase = 0;
  DEVICE void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

// Where a stage's tile of weights and activations is, and where its scales are: after all tiles, which so are aligned.
DEVICE u32 tile_of(u32 stages, const Ring& ring) { return stages + ring.stage * TILE_BYTES; }
DEVICE u32 scales_of(u32 stages, const Ring& ring) { return stages + STAGES * TILE_BYTES + ring.stage * SCALE_BYTES; }

// The weight row that row r of a granule is.
template <bool FIRST>
DEVICE int weight_row(int granule, int r) {
  if (FIRST && GATED) {
    const int column = granule * 8 + (r & 7);
    return INTERLEAVED ? 2 * column + (r >> 3) : column + (r >> 3) * INNER;
  }
  return granule * GRANULE + r;
}

