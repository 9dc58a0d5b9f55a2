// Building blocks of the fused Hopper kernels: tensor-core products, cluster barriers and scans.
#pragma once

#ifdef __CUDACC__
#include "hopper.cuh"
#else
#include "cuda_emulator.h"
#endif

#include <cstdint>

#include "../plan.h"
#include "phases.cuh"

namespace twilight {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kEmptyPeak = -1e30f;  // running maximum of nothing; finite, so that it can be subtracted

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// Eight 4-bit codes of one token in `x`, of the token eight rows below in `y`, against one column of queries. A code n
// masked out of the word is the fp16 subnormal n * 2^-24 (or 16 n * 2^-24), which tensor cores multiply exactly: no
// conversion at all.
__device__ __forceinline__ void mma_codes4(float (&acc)[4], uint32_t x, uint32_t y, uint4 q) {
  mma(acc, x & 0x000f000f, y & 0x000f000f, x & 0x00f000f0, y & 0x00f000f0, q.x, q.y, __half());
  x >>= 8;
  y >>= 8;
  mma(acc, x & 0x000f000f, y & 0x000f000f, x & 0x00f000f0, y & 0x00f000f0, q.z, q.w, __half());
}

// Four 8-bit codes of one page in `x`, of the page eight rows below in `y`; the same subnormals.
__device__ __forceinline__ void mma_codes8(float (&acc)[4], uint32_t x, uint32_t y, uint2 q) {
  mma(acc, x & 0x00ff00ff, y & 0x00ff00ff, (x >> 8) & 0x00ff00ff, (y >> 8) & 0x00ff00ff, q.x, q.y, __half());
}

// Of a tile's columns only its own are not zero, so that sums of tiles add up.
template <int kCount>
__device__ __forceinline__ void fold(float (&acc)[kCount][4]) {
#pragma unroll
  for (int i = 1; i < kCount; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) acc[0][c] += acc[i][c];
  }
}

__device__ __forceinline__ float2 scale_and_zero(uint32_t packed) {
  return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
}

// Channel i of eight of two tokens, packed.
__device__ __forceinline__ uint32_t channel_pair(uint4 one, uint4 other, int i) {
  const uint32_t a = i / 2 == 0 ? one.x : i / 2 == 1 ? one.y : i / 2 == 2 ? one.z : one.w;
  const uint32_t b = i / 2 == 0 ? other.x : i / 2 == 1 ? other.y : i / 2 == 2 ? other.z : other.w;
  return i % 2 == 0 ? (a & 0xffffu) | (b << 16) : (a >> 16) | (b & 0xffff0000u);
}

__device__ __forceinline__ float2 unpack2(uint32_t packed, __nv_bfloat16) { return scale_and_zero(packed); }

__device__ __forceinline__ float2 unpack2(uint32_t packed, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&packed));
}

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store(__half* p, float x) { *p = __float2half_rn(x); }

// One element of float8_e4m3fn.
struct Float8 {
  uint8_t bits;
};

__device__ __forceinline__ float to_float(Float8 x) { return from_e4m3x2(x.bits).x; }
__device__ __forceinline__ void store(Float8* p, float x) { p->bits = to_e4m3(x); }

// Eight channels of a row, as the caches hold them and as operands of the type T.
template <typename E>
struct Channels {
  uint4 packed;
  template <typename T>
  __device__ __forceinline__ uint4 widen(T) const {
    return packed;
  }
};
template <>
struct Channels<Float8> {
  uint2 packed;
  template <typename T>
  __device__ __forceinline__ uint4 widen(T type) const {
    const auto pair = [&](uint32_t codes) {
      const float2 x = from_e4m3x2(static_cast<uint16_t>(codes));
      return pack2(x.x, x.y, type);
    };
    return make_uint4(pair(packed.x), pair(packed.x >> 16), pair(packed.y), pair(packed.y >> 16));
  }
};

// A row's channels by eights, kCount to each of kLanes threads, in loads of 16 bytes where there are that many: which
// of the eights is a thread's j-th, and its share of the row.
template <typename E, bool kFromHost, int kLanes, int kCount>
struct RowShare {
  static constexpr bool kPairs = sizeof(E) == 1 && kCount % 2 == 0;
  __device__ static __forceinline__ int eight(int j, int lane) {
    return kPairs ? 2 * (kLanes * (j / 2) + lane) + j % 2 : kLanes * j + lane;
  }
  __device__ static __forceinline__ void load(Channels<E> (&to)[kCount], const E* row, int lane) {
#pragma unroll
    for (int j = 0; j < kCount; j += kPairs ? 2 : 1) {
      const E* from = row + 8 * eight(j, lane);
      if constexpr (kPairs) {
        const uint4 both = kFromHost ? load_host(from) : load_stream(from);
        to[j].packed = make_uint2(both.x, both.y);
        to[j + 1].packed = make_uint2(both.z, both.w);
      } else if constexpr (sizeof(E) == 1) {
        to[j].packed = kFromHost ? load_host8(from) : load_stream8(from);
      } else {
        to[j].packed = kFromHost ? load_host(from) : load_stream(from);
      }
    }
  }
};

// The blocks that share one (sequence, KV head).
struct Cluster {
  int size;
  int rank;

  __device__ static Cluster current() { return {cluster_blocks(), cluster_rank()}; }

  // Before a block touches another's shared memory it must have started: every block says so, and waits for it later.
  __device__ __forceinline__ void start() const {
    if (size > 1) cluster_start();
  }
  __device__ __forceinline__ void started() const {
    if (size > 1) cluster_started();
  }

  // Returns where all blocks have `reached` this.
  __device__ __forceinline__ void sync(const char* reached) const {
    if (size == 1) {
      sync_block(reached);
    } else {
      cluster_barrier(reached);
    }
  }
  template <typename V>
  __device__ __forceinline__ V read(const V* p, int peer) const {
    return cluster_read(p, peer);
  }
  template <typename V>
  __device__ __forceinline__ void write(V* p, int peer, V value) const {
    cluster_write(p, peer, value);
  }
};

// Sum of base-2 exponentials with its peak, merged pairwise. NaN and +inf logits leave z NaN.
struct SoftmaxSum {
  float peak = kEmptyPeak;
  float z = 0.0f;

  __device__ __forceinline__ void merge(float other_peak, float other_z) {
    const float top = fmaxf(peak, other_peak);
    z = z * exp2_fast(peak - top) + other_z * exp2_fast(other_peak - top);
    peak = top;
  }
  // Over lanes whose numbers differ in the bits kHigh down to kLow.
  template <int kHigh, int kLow>
  __device__ __forceinline__ void merge_lanes() {
    float top = peak;
#pragma unroll
    for (int mask = kHigh; mask >= kLow; mask >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, mask));
    z *= exp2_fast(peak - top);
#pragma unroll
    for (int mask = kHigh; mask >= kLow; mask >>= 1) z += __shfl_xor_sync(~0u, z, mask);
    peak = top;
  }
  // log2 of the sum: what a logit is lowered by to become a log-weight.
  __device__ __forceinline__ float norm() const { return z == 0.0f ? 0.0f : peak + __log2f(z); }
  // Adds values; those of masked items are -inf.
  template <int kCount>
  __device__ __forceinline__ void add(const float (&value)[kCount]) {
    float top = peak;
#pragma unroll
    for (int i = 0; i < kCount; ++i) top = fmaxf(top, value[i]);
    z *= exp2_fast(peak - top);
    peak = top;
#pragma unroll
    for (int i = 0; i < kCount; ++i) z += exp2_fast(value[i] - top);
  }
};

__device__ __forceinline__ float finite_or_masked(float x, bool valid) {
  return valid && x < infinity() ? x : -infinity();
}

template <typename V>
__device__ __forceinline__ V warp_sum(V v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) v += __shfl_xor_sync(~0u, v, mask);
  return v;
}

template <typename V>
__device__ __forceinline__ V warp_inclusive_scan(V v) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const V below = __shfl_up_sync(~0u, v, step);
    if (lane >= step) v += below;
  }
  return v;
}

// Exclusive prefix sum over the block; `totals` has kWarps entries, and is free again behind it. Every thread must call
// it.
__device__ __forceinline__ uint32_t block_exclusive_scan(uint32_t v, uint32_t* totals, uint32_t& total) {
  const uint32_t inclusive = warp_inclusive_scan(v);
  if ((threadIdx.x & 31) == 31) totals[threadIdx.x >> 5] = inclusive;
  sync_block("warps' totals written");
  uint32_t before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < static_cast<int>(threadIdx.x >> 5)) before += totals[w];
    total += totals[w];
  }
  sync_block("warps' totals read");
  return before + inclusive - v;
}

}  // namespace twilight
