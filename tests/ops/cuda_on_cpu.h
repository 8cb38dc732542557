// common.cuh and hopper.cuh for a CPU: CUDA threads as fibers, so that kernels run where there is no GPU.
//
// One thread runs until it waits for others. Copies in the background happen as late as they may: when the barrier that
// they are to arrive at is told so. Shared memory is poisoned before each block. Kernels run one after the other, and so
// do blocks, but those of a cluster.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <vector>

// Which 16-bit numbers `multiply` takes.
#ifndef HALF
#define HALF 0
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE inline
#define __device__
#define __global__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
using std::max;
using std::min;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
static Index gridDim, blockDim;

// Fibers

constexpr int BLOCKS_AT_ONCE = 8, WARPS_AT_ONCE = 64;
__align__(1024) static u8 shared[BLOCKS_AT_ONCE * 256 * 1024];

struct Copy {
  u32 to;
  const void* from;
  int bytes;
};
// Products of four warps in the background, which happen as late as they may: when they are waited for.
struct Product {
  float* c;
  int tiles;
  u64 a, b;
  bool adds;
};
struct Fiber {
  ucontext_t context;
  static constexpr int STACK = 1 << 17;
  std::unique_ptr<char[]> stack{new char[STACK]};  // not touched before it is used
  Index index, block;
  int rank = 0;          // of its block in the cluster
  u8* memory = nullptr;  // its block's
  bool done = false, arrived = false;
  int phase = 0;
  std::vector<Copy> copies;
  std::vector<std::vector<Product>> groups = {{}};
};
static std::vector<std::unique_ptr<Fiber>> fibers;
static Fiber* running;
static ucontext_t scheduler;
static bool progress;
static std::function<void()> body;
#define threadIdx (running->index)
#define blockIdx (running->block)

// Why the kernels were stopped, or null.
static const char* problem;

static void yield() { swapcontext(&running->context, &scheduler); }
static void stop(const char* why) {
  problem = why;
  for (;;) yield();
}
template <class F>
static void wait_until(F condition) {
  while (!condition()) yield();
  progress = true;
}
// Meeting points: `size` threads come, all leave.
struct Meeting {
  int come = 0, generation = 0;
  void meet(int size) {
    const int mine = generation;
    if (++come == size) {
      come = 0;
      ++generation;
    }
    wait_until([&] { return generation != mine; });
  }
};
static Meeting cluster_meeting;

static void run_fiber() {
  body();
  running->done = true;
  progress = true;
  yield();
}
static void run_blocks(int blocks, int threads, int shared_bytes, Index first) {
  if (blocks > BLOCKS_AT_ONCE || threads > 32 * WARPS_AT_ONCE) {
    problem = "more blocks or threads at once than there is room for";
    return;
  }
  fibers.clear();
  cluster_meeting = {};
  blockDim = {(unsigned)threads, 1, 1};
  for (int i = 0; i < blocks * threads; ++i) {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber& f = *fibers.back();
    f.index.x = i % threads;
    f.rank = i / threads;
    f.block = first;
    f.block.x += f.rank;
    f.memory = shared + (u64)f.rank * shared_bytes;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = Fiber::STACK;
    f.context.uc_link = &scheduler;
    makecontext(&f.context, run_fiber, 0);
  }
  bool all = false;
  for (int round = 0; !all; ++round) {
    all = true;
    progress = false;
    // The last of several blocks is late: it has one turn in four.
    const bool waits = blocks > 1 && round % 4 != 0;
    for (auto& f : fibers) {
      if (f->done) continue;
      all = false;
      if (waits && f->rank == blocks - 1) {
        progress = true;
        continue;
      }
      running = f.get();
      swapcontext(&scheduler, &f->context);
      if (problem) return;
    }
    if (!all && !progress) problem = "deadlock: every thread waits";
    if (problem) return;
  }
}
static void run_grid(unsigned x, unsigned y, int threads, int shared_bytes, const std::function<void()>& kernel,
                     unsigned cluster = 1) {
  body = kernel;
  gridDim = {x, y, 1};
  for (unsigned row = 0; row < y; ++row)
    for (unsigned column = 0; column < x; column += cluster) {
      if (problem) return;
      std::memset(shared, 0xff, (u64)cluster * shared_bytes);
      run_blocks(cluster, threads, shared_bytes, {column, row, 0});
    }
}

static Meeting block_meetings[BLOCKS_AT_ONCE], warp_meetings[BLOCKS_AT_ONCE][WARPS_AT_ONCE], named_meetings[16];
static void __syncthreads() { block_meetings[running->rank].meet(blockDim.x); }
static void __syncwarp() { warp_meetings[running->rank][threadIdx.x / 32].meet(32); }
DEVICE void meet(int id, int threads) { named_meetings[id].meet(threads); }

// What 32 lanes have in hand, for all of them to see.
template <class T, int N>
static void exchange(const T (&mine)[N], T (&all)[32][N]) {
  static T board[BLOCKS_AT_ONCE * WARPS_AT_ONCE][32][N];
  const int warp = running->rank * WARPS_AT_ONCE + threadIdx.x / 32, lane = threadIdx.x % 32;
  std::copy(mine, mine + N, board[warp][lane]);
  __syncwarp();
  std::memcpy(all, board[warp], sizeof all);
  __syncwarp();
}
template <class T>
static T __shfl_sync(u32, T x, int from) {
  T all[32][1];
  exchange({x}, all);
  return all[from & 31][0];
}
static int __shfl_up_sync(u32, int x, int by) {
  int all[32][1];
  exchange({x}, all);
  const int lane = threadIdx.x % 32;
  return all[lane < by ? lane : lane - by][0];
}
template <class T>
static T __shfl_xor_sync(u32, T x, int mask) {
  T all[32][1];
  exchange({x}, all);
  return all[threadIdx.x % 32 ^ mask][0];
}
static u32 __ballot_sync(u32, bool x) {
  int all[32][1];
  exchange({(int)x}, all);
  u32 those = 0;
  for (int i = 0; i < 32; ++i) those |= (u32)all[i][0] << i;
  return those;
}
static u32 __match_any_sync(u32, int x) {
  int all[32][1];
  exchange({x}, all);
  u32 same = 0;
  for (int i = 0; i < 32; ++i) same |= (u32)(all[i][0] == x) << i;
  return same;
}
static int __ffs(u32 x) { return __builtin_ffs((int)x); }
static int __popc(u32 x) { return __builtin_popcount(x); }
static int atomicAdd(int* p, int x) {
  const int before = *p;
  *p += x;
  return before;
}
static float __uint_as_float(u32 x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
static u32 __float_as_uint(float x) {
  u32 y;
  std::memcpy(&y, &x, 4);
  return y;
}

static int __float_as_int(float x) { return (int)__float_as_uint(x); }
static float __int_as_float(int x) { return __uint_as_float((u32)x); }

// The functions of common.cuh; those of numbers follow

DEVICE u8* dynamic_memory() { return running->memory; }
static int cluster_size() { return (int)(fibers.size() / blockDim.x); }
DEVICE u32 cluster_rank() { return running->rank; }
// Whoever arrives twice, or waits without, would hang a GPU.
DEVICE void arrive_at_cluster() {
  if (running->arrived) stop("a thread arrives at its cluster twice");
  running->arrived = true;
  running->phase = cluster_meeting.generation;
  if (++cluster_meeting.come == (int)fibers.size()) cluster_meeting.come = 0, ++cluster_meeting.generation;
}
DEVICE void wait_for_cluster() {
  if (!running->arrived) stop("a thread waits for a cluster at which it has not arrived");
  wait_until([] { return cluster_meeting.generation != running->phase; });
  running->arrived = false;
}
// The bytes that are still to come.
DEVICE void expect_bytes(u64* barrier, int bytes) { *barrier = bytes; }
static void store_there(const void* mine, const u64* barrier, u32 rank, const void* from, int bytes) {
  if (cluster_meeting.generation == 0) stop("a store to a block that may not have started");
  if ((int)rank >= cluster_size()) stop("a store to a block that is not in the cluster");
  if (fibers[rank * blockDim.x]->done) stop("a store to a block that has ended");
  const long long there = fibers[rank * blockDim.x]->memory - running->memory;
  std::memcpy((u8*)mine + there, from, bytes);
  *(u64*)((u8*)barrier + there) -= bytes;
  progress = true;
}
DEVICE void store_and_tell(const void* mine, const u64* barrier, u32 rank, u32 low, u32 high) {
  const u32 both[2] = {low, high};
  store_there(mine, barrier, rank, both, 8);
}
DEVICE void store_and_tell(const float* mine, const u64* barrier, u32 rank, float x) {
  store_there(mine, barrier, rank, &x, 4);
}
DEVICE void wait_for_bytes(u64* barrier) {
  wait_until([&] { return *barrier == 0; });
}
DEVICE int warp_max(int x) {
  int all[32][1];
  exchange({x}, all);
  for (auto& other : all) x = max(x, other[0]);
  return x;
}
DEVICE int warp_min(int x) {
  int all[32][1];
  exchange({x}, all);
  for (auto& other : all) x = min(x, other[0]);
  return x;
}
DEVICE float divided(float x, float y) { return x / y; }
DEVICE float power(float x, float exponent) { return std::pow(x, exponent); }
DEVICE float exponential(float x) { return std::exp(x); }

// The functions of hopper.cuh

// In its block's memory.
DEVICE u32 shared_address(const void* p) { return (u32)((const u8*)p - running->memory); }

// A barrier: arrivals that are missing, how many there are to be, number of the phase.
DEVICE void barrier_init(u64* b, int arrivals) { *b = (u64)arrivals | (u64)arrivals << 16; }
DEVICE void barrier_arrive(u64* b) {
  if ((*b & 0xffff) == 0) stop("a barrier is arrived at that nothing has set up");
  if ((--*b & 0xffff) == 0) *b = (*b + (1ull << 32)) | (*b >> 16 & 0xffff);
  progress = true;
}
DEVICE void barrier_wait(u64* b, u32 parity) {
  wait_until([&] { return (*b >> 32 & 1) != parity; });
}
DEVICE void barrier_arrive_after_copies(u64* b) {
  yield();
  for (const Copy& copy : running->copies) std::memcpy(running->memory + copy.to, copy.from, copy.bytes);
  running->copies.clear();
  barrier_arrive(b);
}
DEVICE void copy16(u32 to, const void* from) {
  if (to % 16 || (u64)from % 16) stop("a copy of 16 bytes at an odd address");
  running->copies.push_back({to, from, 16});
}
DEVICE void copy16_and_fetch(u32 to, const void* from) { copy16(to, from); }
DEVICE void copy4(u32 to, const void* from) { running->copies.push_back({to, from, 4}); }
DEVICE void wait_for_earlier_kernels() {}
DEVICE void let_next_kernel_start() {}

DEVICE void load_matrices(u32 (&r)[4], u32 from) {
  u32 all[32][1];
  exchange({from}, all);
  const int lane = threadIdx.x % 32;
  for (int m = 0; m < 4; ++m) std::memcpy(&r[m], running->memory + all[8 * m + lane / 4][0] + lane % 4 * 4, 4);
  __syncwarp();
}
DEVICE void load8(u32& a, u32& b, u32 from) {
  if (from % 8) stop("a load of 8 bytes at an odd address");
  std::memcpy(&a, running->memory + from, 4);
  std::memcpy(&b, running->memory + from + 4, 4);
}
DEVICE void load16(u32 (&r)[4], u32 from) {
  if (from % 16) stop("a load of 16 bytes at an odd address");
  std::memcpy(r, running->memory + from, 16);
}
DEVICE void load_two(float (&x)[2], u32 from) {
  if (from % 8) stop("a load of 8 bytes at an odd address");
  std::memcpy(x, running->memory + from, 8);
}
DEVICE void put4(u32 to, float x) { std::memcpy(running->memory + to, &x, 4); }
DEVICE void put16(u32 to, const u32 (&r)[4]) {
  if (to % 16) stop("a store of 16 bytes at an odd address");
  std::memcpy(running->memory + to, r, 16);
}
DEVICE float get4(u32 from) {
  float x;
  std::memcpy(&x, running->memory + from, 4);
  return x;
}
DEVICE void load32(u32 (&r)[8], const void* from) {
  if ((u64)from % 16) stop("a load of 16 bytes at an odd address");
  std::memcpy(r, from, 32);
}
DEVICE void load_floats(float (&x)[4], const float* from) { std::memcpy(x, from, 16); }
DEVICE void store16(void* to, const u32 (&r)[4]) {
  if ((u64)to % 16) stop("a store of 16 bytes at an odd address");
  std::memcpy(to, r, 16);
}
DEVICE void store8(void* to, u32 low, u32 high) {
  std::memcpy(to, &low, 4);
  std::memcpy((u8*)to + 4, &high, 4);
}

DEVICE float bfloat_to_float(u16 x) { return __uint_as_float((u32)x << 16); }
DEVICE u16 float_to_bfloat(float x) {
  const u32 bits = __float_as_uint(x);
  return x != x ? 0x7fff : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DEVICE float half_to_float(u16 x) {
  _Float16 h;
  std::memcpy(&h, &x, 2);
  return (float)h;
}
DEVICE u16 float_to_half(float x) {
  const _Float16 h = (_Float16)x;
  u16 y;
  std::memcpy(&y, &h, 2);
  return y;
}
DEVICE float reciprocal(float x) { return 1.0f / x; }
// e4m3: sign, 4 bits of exponent (bias 7), 3 of fraction; 0x7f and 0xff are NaN.
static float e4m3_to_float(u8 x) {
  const int exponent = x >> 3 & 15, fraction = x & 7;
  if ((x & 127) == 127) return NAN;
  const float size = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp((float)fraction, -9);
  return x & 128 ? -size : size;
}
static u8 float_to_e4m3(float x) {
  if (x != x) return 0x7f;
  const u8 sign = std::signbit(x) ? 128 : 0;
  u8 nearest = 0;
  for (int i = 1; i < 127; ++i) {
    const float before = std::fabs(e4m3_to_float(nearest) - std::fabs(x)), now = std::fabs(e4m3_to_float(i) - std::fabs(x));
    if (now < before || (now == before && i % 2 == 0)) nearest = i;
  }
  return sign | nearest;
}
DEVICE u32 floats_to_e4m3(float first, float second) { return float_to_e4m3(first) | float_to_e4m3(second) << 8; }
DEVICE u32 max_of_halves(u32 a, u32 b) { return max(a & 0xffff, b & 0xffff) | max(a >> 16, b >> 16) << 16; }
static float element(u32 pair, int which) {
  const u16 x = (u16)(pair >> (16 * which));
  return HALF ? half_to_float(x) : bfloat_to_float(x);
}
DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  u32 all[32][6];
  exchange({a[0], a[1], a[2], a[3], b0, b1}, all);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    float sum = c[i];
#if FP8_ROWS
    auto byte = [](u32 four, int which) { return e4m3_to_float(four >> (8 * which) & 255); };
    for (int k = 0; k < 32; ++k) {
      const float x = byte(all[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2], k % 4);
      sum += x * byte(all[column * 4 + k % 16 / 4][4 + k / 16], k % 4);
    }
#else
    for (int k = 0; k < 16; ++k) {
      const float x = element(all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
      sum += x * element(all[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
    }
#endif
    c[i] = sum;
  }
}
#if WGMMA
DEVICE void show_to_tensor_cores() {}
DEVICE void before_products() {}
DEVICE void end_products() { running->groups.emplace_back(); }
// As PTX has a descriptor of shared memory: bits 0 to 13 the start, 32 to 45 bytes from 8 rows to the next, both in 16
// bytes, 49 to 51 an offset of the pattern, 62 and 63 its kind. Here rows of 128 bytes: bits 4 to 6 of an address are
// exchanged by its bits 7 to 9.
DEVICE u64 matrix_at(u32 from) { return 1ull << 62 | (1024ull >> 4) << 32 | 1ull << 16 | (from & 0x3ffff) >> 4; }
static float element_of(u64 matrix, int row, int column) {
  if (matrix >> 62 != 1 || (matrix >> 49 & 7) != 0) stop("a matrix of another layout");
  const u32 start = (matrix & 0x3fff) << 4, of_8_rows = (matrix >> 32 & 0x3fff) << 4;
  const u32 at = start + row / 8 * of_8_rows + row % 8 * 128 + column;
  return e4m3_to_float(running->memory[at ^ (at >> 7 & 7) << 4]);
}
static void carry_out(const Product& product) {
  const int thread = threadIdx.x % 128, row = thread / 32 * 16 + thread % 32 / 4;
  for (int i = 0; i < product.tiles * 4; ++i) {
    const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    float sum = product.adds ? product.c[i] : 0.0f;
    for (int k = 0; k < 32; ++k)
      sum += element_of(product.a, row + i % 4 / 2 * 8, k) * element_of(product.b, column, k);
    product.c[i] = sum;
  }
}
template <bool ADD, int NT>
DEVICE void multiply_64(float (&c)[NT][4], u64 a, u64 b) {
  running->groups.back().push_back({&c[0][0], NT, a, b, ADD});
}
template <int N, int NT>
DEVICE void wait_for_products(float (&c)[NT][4]) {
  yield();
  auto& groups = running->groups;
  while (groups.size() > N + 1) {
    for (const Product& product : groups.front()) carry_out(product);
    groups.erase(groups.begin());
  }
  progress = true;
}
#endif
DEVICE u32 permute_bytes(u32 x, u32 selector) {
  u32 out = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 digit = selector >> (4 * i) & 15;
    u32 byte = digit & 4 ? 0 : x >> (8 * (digit & 3)) & 255;
    if (digit & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << (8 * i);
  }
  return out;
}
DEVICE u32 multiply_bfloats(u32 a, u32 b) {
  const u32 low = float_to_bfloat(bfloat_to_float((u16)a) * bfloat_to_float((u16)b));
  return low | (u32)float_to_bfloat(bfloat_to_float((u16)(a >> 16)) * bfloat_to_float((u16)(b >> 16))) << 16;
}
