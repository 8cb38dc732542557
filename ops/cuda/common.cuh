// Types and instructions that all kernels in CUDA C++ use, one function each. Header-free: NVRTC needs no CUDA headers.
// (tests/ops/cuda_on_cpu.h has the same functions for a CPU.)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

// What the launch asked for beside what kernels declare.
DEVICE u8* dynamic_memory() {
  extern __shared__ __align__(1024) u8 shared[];
  return shared;
}

// Earlier kernels of the stream are complete, and what they wrote can be read.
DEVICE void wait_for_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Blocks of the next kernel may start once every block has one thread that came here, or has ended.
DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Clusters: blocks that run at the same time and reach each other's shared memory.
DEVICE u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Every thread of every block arrives, then waits until all have. What was written before need not be seen by others,
// except for the barriers that `expect_bytes` made.
DEVICE void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// A barrier, in shared memory, of so many bytes that `store_and_tell` of any block brings. One thread.
DEVICE void expect_bytes(u64* barrier, int bytes) {
  const u32 address = (u32)__cvta_generic_to_shared(barrier);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;\n"
               "{ .reg .b64 s; mbarrier.arrive.expect_tx.shared::cta.b64 s, [%0], %1; }" ::"r"(address), "r"(bytes)
               : "memory");
}
// Stores 8 bytes, or a number, where another block has the same variable, and tells its barrier once that is there.
DEVICE void store_and_tell(const void* mine, const u64* barrier, u32 rank, u32 low, u32 high) {
  const u32 to = (u32)__cvta_generic_to_shared(mine), tell = (u32)__cvta_generic_to_shared(barrier);
  asm volatile("{\n.reg .b32 there, bell;\nmapa.shared::cluster.u32 there, %0, %2;\nmapa.shared::cluster.u32 bell, %1, %2;\n"
               "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [there], {%3, %4}, [bell];\n}" ::"r"(to),
               "r"(tell), "r"(rank), "r"(low), "r"(high) : "memory");
}
DEVICE void store_and_tell(const float* mine, const u64* barrier, u32 rank, float x) {
  const u32 to = (u32)__cvta_generic_to_shared(mine), tell = (u32)__cvta_generic_to_shared(barrier);
  asm volatile("{\n.reg .b32 there, bell;\nmapa.shared::cluster.u32 there, %0, %2;\nmapa.shared::cluster.u32 bell, %1, %2;\n"
               "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %3, [bell];\n}" ::"r"(to),
               "r"(tell), "r"(rank), "r"(__float_as_uint(x)) : "memory");
}
DEVICE void wait_for_bytes(u64* barrier) {
  const u32 address = (u32)__cvta_generic_to_shared(barrier);
  asm volatile("{\n.reg .pred done;\nAGAIN:\n"
               "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
               "@done bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(address) : "memory");
}

// Of a warp.
DEVICE int warp_max(int x) {
  int y;
  asm volatile("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
  return y;
}
DEVICE int warp_min(int x) {
  int y;
  asm volatile("redux.sync.min.s32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
  return y;
}

// To a few units of the last place, in few instructions; the divisor is below 2^126.
DEVICE float divided(float x, float y) {
  float z;
  asm("div.approx.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
DEVICE float exponential(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
DEVICE float power(float x, float exponent) {
  float y;
  asm("{ .reg .f32 l; lg2.approx.f32 l, %1; mul.f32 l, l, %2; ex2.approx.f32 %0, l; }" : "=f"(y) : "f"(x), "f"(exponent));
  return y;
}

DEVICE float half_to_float(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
DEVICE u16 float_to_half(float x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
DEVICE float bfloat_to_float(u16 x) { return __uint_as_float((u32)x << 16); }
DEVICE u16 float_to_bfloat(float x) {
  u16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

// c += a [16 x 16] @ b [16 x 8], bf16 or, with HALF, fp16; of FP8 numbers a [16 x 32] @ b [32 x 8].
DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if FP8_ROWS
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#elif HALF
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
