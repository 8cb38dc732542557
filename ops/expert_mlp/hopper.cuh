// The instructions of sm_90 that stream.cu uses, one function each; ops/cuda/common.cuh comes before this file.
// (tests/ops/cuda_on_cpu.h has the same functions for a CPU.)

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Barriers in shared memory.
DEVICE void barrier_init(u64* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
DEVICE void barrier_wait(u64* b, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(shared_address(b)), "r"(parity) : "memory");
}
DEVICE void barrier_arrive(u64* b) {
  asm volatile("{ .reg .b64 s; mbarrier.arrive.shared::cta.b64 s, [%0]; }" ::"r"(shared_address(b)) : "memory");
}
// Arrives once all of this thread's copies so far have landed.
DEVICE void barrier_arrive_after_copies(u64* b) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(b)) : "memory");
}
// So many threads of whole warps meet; id from 1 to 15.
DEVICE void meet(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Copies to shared memory in the background.
DEVICE void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// The same, and 256 bytes to the L2: what the next stage needs as well.
DEVICE void copy16_and_fetch(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void copy4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// Four matrices of 8 x 8 16-bit numbers; lane l names row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 (&r)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from));
}
DEVICE void load8(u32& a, u32& b, u32 from) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "r"(from));
}
DEVICE void load16(u32 (&r)[4], u32 from) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from));
}
DEVICE void load_two(float (&x)[2], u32 from) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(from));
}
DEVICE float get4(u32 from) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from));
  return x;
}
DEVICE void put4(u32 to, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory"); }
DEVICE void put16(u32 to, const u32 (&r)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
// From memory as the L2 has it.
DEVICE void load32(u32 (&r)[8], const void* from) {
  asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(from));
  asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4 + 16];"
               : "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7]) : "l"(from));
}
DEVICE void load_floats(float (&x)[4], const float* from) {
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "l"(from));
}
DEVICE void store16(void* to, const u32 (&r)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
DEVICE void store8(void* to, u32 low, u32 high) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(low), "r"(high) : "memory");
}

#if WGMMA
// What this thread wrote to shared memory, or saw written, is there for the tensor cores' own reads as well.
DEVICE void show_to_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Rows of 128 bytes from a multiple of 1024 on, 16-byte pieces of each 8 rows exchanged as `swizzled` says; `from` may be
// 32, 64 or 96 bytes further on. Bits 62: the 128-byte swizzle; 32: bytes of 8 rows; 16: unused; all in 16 bytes.
DEVICE u64 matrix_at(u32 from) { return 1ull << 62 | (1024ull >> 4) << 32 | 1ull << 16 | (from & 0x3ffff) >> 4; }

// Before the first product that uses registers anew; after the last one of a group; until at most N groups are under way.
DEVICE void before_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N, int NT>
DEVICE void wait_for_products(float (&c)[NT][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
  // The compiler may not read them earlier.
#pragma unroll
  for (int i = 0; i < NT * 4; ++i) asm volatile("" : "+f"(c[i / 4][i % 4])::"memory");
}

// c = (ADD ? c : 0) + a [64 x 32] @ b [32 x 8 NT], FP8 numbers in shared memory, by four warps; each has 16 rows, in
// the order of `multiply`'s. In the background.
#define FOUR(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define MULTIPLY_64(NT, N, REGISTERS, A, B, ADDS, ...)                                                          \
  template <bool ADD>                                                                                           \
  DEVICE void multiply_64(float (&c)[NT][4], u64 a, u64 b) {                                                    \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " ADDS ", 0;\n"                                       \
                 "wgmma.mma_async.sync.aligned.m64n" N "k32.f32.e4m3.e4m3 {" REGISTERS "}, " A ", " B           \
                 ", adds, 1, 1;\n}"                                                                             \
                 : __VA_ARGS__                                                                                  \
                 : "l"(a), "l"(b), "n"((int)ADD));                                                              \
  }
#define NAMES_8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define NAMES_16 NAMES_8(0, 1, 2, 3, 4, 5, 6, 7) "," NAMES_8(8, 9, 10, 11, 12, 13, 14, 15)
#define NAMES_32 NAMES_16 "," NAMES_8(16, 17, 18, 19, 20, 21, 22, 23) "," NAMES_8(24, 25, 26, 27, 28, 29, 30, 31)
MULTIPLY_64(1, "8", "%0,%1,%2,%3", "%4", "%5", "%6", FOUR(0))
MULTIPLY_64(2, "16", NAMES_8(0, 1, 2, 3, 4, 5, 6, 7), "%8", "%9", "%10", FOUR(0), FOUR(1))
MULTIPLY_64(3, "24", NAMES_8(0, 1, 2, 3, 4, 5, 6, 7) ",%8,%9,%10,%11", "%12", "%13", "%14", FOUR(0), FOUR(1), FOUR(2))
MULTIPLY_64(4, "32", NAMES_16, "%16", "%17", "%18", FOUR(0), FOUR(1), FOUR(2), FOUR(3))
MULTIPLY_64(8, "64", NAMES_32, "%32", "%33", "%34", FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6),
            FOUR(7))
#endif

// Bytes of x: byte i of the result is the one that digit i of selector names, or, with 8 added, its sign in all 8 bits.
DEVICE u32 permute_bytes(u32 x, u32 selector) {
  u32 y;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(x), "r"(selector));
  return y;
}
DEVICE u32 multiply_bfloats(u32 a, u32 b) {
  asm("mul.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}

DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two e4m3 numbers, the first in the low byte; beyond 448 they are 448.
DEVICE u32 floats_to_e4m3(float first, float second) {
  u16 y;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(second), "f"(first));
  return y;
}

// The larger of the lower, and of the upper, halves.
DEVICE u32 max_of_halves(u32 a, u32 b) {
  u32 y;
  asm("max.u16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
