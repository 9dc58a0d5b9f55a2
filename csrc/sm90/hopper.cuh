// The instructions of the fused kernels that C++ has no words for. tests/emulator/cuda_emulator.h is the twin that runs
// on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace twilight {

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A NaN if either is one.
__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

__device__ __forceinline__ float fma_rz(float a, float b, float c) { return __fmaf_rz(a, b, c); }

// Rows that no other load shares a sector with: nothing to keep in L1.
__device__ __forceinline__ uint4 load_stream(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ uint2 load_stream8(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// From host memory, which gives twice as many bytes a second where lines of 128 of them are asked for.
__device__ __forceinline__ uint4 load_host(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ uint2 load_host8(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// Two numbers of float8_e4m3fn, the first in the lower byte; and the nearest such number, where what is too large
// becomes the largest.
__device__ __forceinline__ float2 from_e4m3x2(uint16_t codes) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}
__device__ __forceinline__ uint8_t to_e4m3(float x) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(0.0f), "f"(x));
  return static_cast<uint8_t>(codes);
}

// Starts to bring a line to the L2 cache.
__device__ __forceinline__ void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Two values rounded to the type, the first in the lower half.
__device__ __forceinline__ uint32_t pack2(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&packed);
}
__device__ __forceinline__ uint32_t pack2(float low, float high, __half) {
  const __half2 packed = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&packed);
}

// Transposes a matrix of 8 x 8 16-bit values, of which thread (g, t) holds row g, columns 2t and 2t + 1.
__device__ __forceinline__ uint32_t transpose8(uint32_t row_pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(row_pair));
  return out;
}

// acc[16 x 8] += a[16 x 16] b[16 x 8], fp16 operands.
__device__ __forceinline__ void mma(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1, __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ int cluster_blocks() {
  uint32_t count;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return static_cast<int>(count);
}

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Barriers say what every thread has reached where they return; the emulator checks that all wait for the same.
__device__ __forceinline__ void sync_block(const char* /*reached*/) { __syncthreads(); }
__device__ __forceinline__ void cluster_barrier(const char* /*reached*/) {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same in two parts: all blocks have started where the second returns.
__device__ __forceinline__ void cluster_start() { asm volatile("barrier.cluster.arrive.relaxed.aligned;"); }
__device__ __forceinline__ void cluster_started() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// A kernel launched with programmatic stream serialization may start before what those ahead of it in the stream wrote
// is visible: only behind this may it touch what they read or write.
__device__ __forceinline__ void await_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The address of the same shared-memory location in another block.
__device__ __forceinline__ uint32_t cluster_address(const void* p, int peer) {
  uint32_t out;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(shared_address(p)), "r"(peer));
  return out;
}

template <typename V>
__device__ __forceinline__ V cluster_read(const V* p, int peer) {
  constexpr int kWords = sizeof(V) / 4;
  static_assert(kWords == 1 || kWords == 2 || kWords == 4, "one, two or four words");
  uint32_t words[4] = {};
  const uint32_t address = cluster_address(p, peer);
  if (kWords == 1) {
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(words[0]) : "r"(address) : "memory");
  } else if (kWords == 2) {
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
  V out;
  memcpy(&out, words, sizeof(V));
  return out;
}

template <typename V>
__device__ __forceinline__ void cluster_write(V* p, int peer, V value) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8, "one or two words");
  uint32_t words[2] = {};
  memcpy(words, &value, sizeof(V));
  if (sizeof(V) == 4) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(cluster_address(p, peer)), "r"(words[0]) : "memory");
  } else {
    asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(cluster_address(p, peer)), "r"(words[0]),
                 "r"(words[1])
                 : "memory");
  }
}

// Starts to copy 16 bytes to shared memory, or fills in zeros.
__device__ __forceinline__ void start_copy(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
// Copies a thread starts between two of these belong together.
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all of this thread's copies but those of the last `kLeft` such groups.
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

}  // namespace twilight
