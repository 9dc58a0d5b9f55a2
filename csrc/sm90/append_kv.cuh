// K, V, the 4-bit shadow and the pages' bounds and means of one step in one launch.
//
// Grid: (chunks of 64 tokens, KV heads, sequences). A warp writes one token's row at a time; once a block's rows are
// written its warps take the touched pages. Only a prompt of several chunks needs a second launch, because chunks share
// pages.

#pragma once

#include "../region.h"
#include "primitives.cuh"

namespace twilight {
namespace {

constexpr int kChunkTokens = 64;

struct AppendParams {
  const void* k;
  const void* v;
  int64_t k_strides[3], v_strides[3];  // batch, token, head
  Region<char> k_cache, v_cache;
  Region<char> k_quant, k_scale;
  Region<char> page_bounds, bounds_scale;  // null scale: bounds in K's dtype
  const int* channel_order;
  const int* prefix_channels;
  const float* k_center;  // null: zeros
  const int* page_table;
  const int* seq_lens;
  const int* positions;
  Region<char> page_means, means_scale;
  const float* k_descale;  // of Float8 alone; null: 1
  const float* v_descale;
  const float* k_shift;  // null: 0
  int tokens, kv_heads, page_size, max_pages, num_pages;
};

// Minimum or maximum that keeps a NaN.
__device__ __forceinline__ float lower(float a, float b) { return b < a || isnan(b) ? b : a; }
__device__ __forceinline__ float higher(float a, float b) { return b > a || isnan(b) ? b : a; }

__device__ __forceinline__ void warp_range(float& low, float& high) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    low = lower(low, __shfl_xor_sync(~0u, low, mask));
    high = higher(high, __shfl_xor_sync(~0u, high, mask));
  }
}

// Asymmetric codes 0..levels from a rounded scale and zero.
struct Quantiser {
  __nv_bfloat16 scale, zero;
  float levels;

  __device__ Quantiser(float low, float high, int steps)
      : scale(__float2bfloat16_rn((high - low) / steps)), zero(__float2bfloat16_rn(low)), levels(steps) {}

  __device__ __forceinline__ void store_to(__nv_bfloat16* pair) const {
    pair[0] = scale;
    pair[1] = zero;
  }

  __device__ __forceinline__ uint32_t code(float x) const {
    const float step = __bfloat162float(scale);
    if (!(step > 0.0f)) return 0;
    const float value = (x - __bfloat162float(zero)) / step;
    return isnan(value) ? 0 : static_cast<uint32_t>(fminf(fmaxf(rintf(value), 0.0f), levels));
  }
};

// T is what comes, E what the caches hold.
template <typename T, typename E, int D>
struct Appender {
  static constexpr bool kIsFloat8 = sizeof(E) == 1;
  static constexpr int kPerLane = D / 32;
  const AppendParams& p;
  const int head = blockIdx.y, sequence = blockIdx.z;

  __device__ int position_of(int token) const {
    return p.positions ? p.positions[static_cast<int64_t>(sequence) * p.tokens + token]
                       : max(p.seq_lens[sequence], 0) - p.tokens + token;
  }
  // Physical page of a position, -1 where nothing is to be written.
  __device__ int page_of(int position) const {
    if (position < 0 || position / p.page_size >= p.max_pages) return -1;
    const int page = p.page_table[static_cast<int64_t>(sequence) * p.max_pages + position / p.page_size];
    return page < p.num_pages ? page : -1;
  }
  // What a region has of this head and a page.
  template <typename V>
  __device__ V* at(const Region<char>& region, int page) const {
    return reinterpret_cast<V*>(region.data + static_cast<uint64_t>(region.page_stride) * page +
                                static_cast<uint64_t>(region.head_stride) * head);
  }

  __device__ const T* source(const void* base, const int64_t (&strides)[3], int token) const {
    return static_cast<const T*>(base) + sequence * strides[0] + token * strides[1] + head * strides[2];
  }

  __device__ __forceinline__ float center(int d) const {
    return p.k_center == nullptr ? 0.0f : p.k_center[head * D + d];
  }
  __device__ __forceinline__ float centred(const T* k, int d) const { return to_float(k[d]) - center(d); }

  __device__ __forceinline__ float descale(const float* by_head) const {
    return kIsFloat8 && by_head != nullptr ? by_head[head] : 1.0f;
  }
  __device__ __forceinline__ float shift(int d) const {
    return kIsFloat8 && p.k_shift != nullptr ? p.k_shift[head * D + d] : 0.0f;
  }
  __device__ static __forceinline__ void store_element(E* to, T x, float shift, float descale) {
    if constexpr (kIsFloat8) {
      store(to, (to_float(x) - shift) / descale);
    } else {
      *to = x;
    }
  }
  __device__ __forceinline__ float stored_key(E x, int d, float descale) const {
    return kIsFloat8 ? to_float(x) * descale + shift(d) : to_float(x);
  }

  __device__ void write_row(int token) const {
    const int position = position_of(token), page = page_of(position), lane = threadIdx.x & 31;
    if (page < 0) return;
    const int slot = position % p.page_size;
    E* key_to = at<E>(p.k_cache, page) + slot * D;
    E* value_to = at<E>(p.v_cache, page) + slot * D;
    const T* k = source(p.k, p.k_strides, token);
    const T* v = source(p.v, p.v_strides, token);
    const float k_descale = descale(p.k_descale), v_descale = descale(p.v_descale);
    float low = infinity(), high = -infinity();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int d = lane + 32 * i;
      store_element(key_to + d, k[d], shift(d), k_descale);
      store_element(value_to + d, v[d], 0.0f, v_descale);
      const float x = centred(k, d);
      low = lower(low, x);
      high = higher(high, x);
    }
    if (p.k_quant.data == nullptr) return;
    warp_range(low, high);
    const Quantiser quantiser(low, high, 15);
    if (lane == 0) quantiser.store_to(at<__nv_bfloat16>(p.k_scale, page) + 2 * slot);
    if (lane >= D / 8) return;
    const int first = 8 * lane, prefix = min(max(p.prefix_channels[head], 0), D) & ~7;
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int channel = min(max(p.channel_order[head * D + first + i], 0), D - 1);
      word |= quantiser.code(centred(k, channel)) << (4 * i);
    }
    const int offset = first < prefix ? slot * (prefix / 2) + first / 2
                                      : p.page_size * (prefix / 2) + (slot * (D - prefix) + first - prefix) / 2;
    *reinterpret_cast<uint32_t*>(at<uint8_t>(p.k_quant, page) + offset) = word;
  }

  // Bounds and mean of the page that `token` went to, from the page's live tokens.
  __device__ void write_statistics(int token) const {
    const int position = position_of(token), page = page_of(position), lane = threadIdx.x & 31;
    if (page < 0) return;
    const int logical = position / p.page_size;
    if (token % kChunkTokens != 0) {
      const int before = position_of(token - 1);
      if (before >= 0 && before / p.page_size == logical) return;
    }
    const int live = min(p.seq_lens[sequence] - logical * p.page_size, p.page_size);
    const E* keys = at<E>(p.k_cache, page);
    const float k_descale = descale(p.k_descale);
    float low[kPerLane], high[kPerLane], sum[kPerLane] = {};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) low[i] = infinity(), high[i] = -infinity();
#pragma unroll 4
    for (int slot = 0; slot < live; ++slot) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const float x = stored_key(keys[slot * D + lane + 32 * i], lane + 32 * i, k_descale);
        low[i] = lower(low[i], x);
        high[i] = higher(high[i], x);
        sum[i] += x;  // slot by slot, as every backend adds them
      }
    }
    if (p.page_means.data != nullptr) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) sum[i] = sum[i] / max(live, 1) - center(lane + 32 * i);
      write_mean(page, sum);
    }
    if (p.page_bounds.data != nullptr) write_bounds(page, live, low, high);
  }

  // Of a lane's channels lane + 32 i, less their centres.
  __device__ void write_mean(int page, const float (&mean)[kPerLane]) const {
    const int lane = threadIdx.x & 31;
    float low = infinity(), high = -infinity();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      low = lower(low, mean[i]);
      high = higher(high, mean[i]);
    }
    warp_range(low, high);
    const Quantiser quantiser(low, high, 15);
    uint32_t word = 0;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int place = min(8 * lane + n, D - 1);
      const int channel = p.channel_order == nullptr ? place : min(max(p.channel_order[head * D + place], 0), D - 1);
      float x = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const float other = __shfl_sync(~0u, mean[i], channel & 31);
        if (channel >> 5 == i) x = other;
      }
      word |= quantiser.code(x) << (4 * n);
    }
    if (lane < D / 8) at<uint32_t>(p.page_means, page)[lane] = word;
    if (lane == 0) quantiser.store_to(at<__nv_bfloat16>(p.means_scale, page));
  }

  __device__ void write_bounds(int page, int live, float (&low)[kPerLane], float (&high)[kPerLane]) const {
    const int lane = threadIdx.x & 31;
    float lowest = infinity(), highest = -infinity();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (live <= 0) low[i] = high[i] = 0.0f;
      lowest = lower(lowest, lower(low[i], high[i]));
      highest = higher(highest, higher(low[i], high[i]));
    }
    if (p.bounds_scale.data == nullptr) {
      T* bounds = at<T>(p.page_bounds, page);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        store(bounds + lane + 32 * i, low[i]);
        store(bounds + D + lane + 32 * i, high[i]);
      }
      return;
    }
    warp_range(lowest, highest);
    const Quantiser quantiser(lowest, highest, 255);
    uint8_t* codes = at<uint8_t>(p.page_bounds, page);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      codes[lane + 32 * i] = quantiser.code(low[i]);
      codes[D + lane + 32 * i] = quantiser.code(high[i]);
    }
    if (lane == 0) quantiser.store_to(at<__nv_bfloat16>(p.bounds_scale, page));
  }
};

template <typename T, typename E, int D, bool kRows, bool kStatistics>
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ AppendParams p) {
  await_earlier_kernels();
  const Appender<T, E, D> appender{p};
  const int first = blockIdx.x * kChunkTokens, end = min(first + kChunkTokens, p.tokens);
  if (kRows) {
    for (int token = first + threadIdx.x / 32; token < end; token += kWarps) appender.write_row(token);
  }
  if (kRows && kStatistics) sync_block("rows written");
  if (kStatistics) {
    for (int token = first + threadIdx.x / 32; token < end; token += kWarps) appender.write_statistics(token);
  }
}

}  // namespace
}  // namespace twilight
