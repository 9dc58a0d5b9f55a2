// The query rows of the fused decode kernel.
#pragma once

#include "context.cuh"

namespace twilight {
namespace {

// Where the queries of word w of a page's bounds lie: what the threads of a row read at a time is together.
__device__ __forceinline__ int bounds_place(int w) { return (w & ~15) | (w & 3) << 2 | (w >> 2 & 3); }

// The rows as fp16 operands scaled by a power of two (so that bf16 fits too).
template <class C>
__device__ __forceinline__ void make_operands(const C& c, int prefix, Queries<C::D, C::RP>& q) {
  using T = typename C::T;
  constexpr int D = C::D, RP = C::RP;
  const T* rows = reinterpret_cast<const T*>(q.rows);
  for (int row = c.warp; row < RP; row += kWarps) {
    float top = 0.0f, sum = 0.0f, sum_prefix = 0.0f;
    for (int j = c.lane; j < D; j += 32) {
      const float x = to_float(rows[row * D + q.order[j]]);
      top = fmaxf(top, fabsf(x));
      sum += x;
      if (j < prefix) sum_prefix += x;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, mask));
    sum = warp_sum(sum);
    sum_prefix = warp_sum(sum_prefix);
    const int exponent = static_cast<int>(__float_as_uint(top) >> 23);
    const int shift = exponent == 255 || exponent < 30 ? 0 : 127 + 12 - exponent;
    const float scale = __uint_as_float(static_cast<uint32_t>(127 + shift) << 23);
    for (int j = c.lane; j < D; j += 32) {
      const float x = scale * to_float(rows[row * D + q.order[j]]);
      const int nibble = j % 8;
      __half* word = reinterpret_cast<__half*>(&q.codes[j / 8][row]);
      word[(nibble & 3) * 2 + nibble / 4] = __float2half_rn(nibble & 1 ? x * 0.0625f : x);
    }
    for (int d = c.lane; C::kByPage && !C::kByMean && d < D; d += 32) {
      const float x = scale * to_float(rows[row * D + d]);
      const int at = (d & 1) * 2 + ((d & 3) >> 1);
      reinterpret_cast<__half*>(&q.bounds[bounds_place(d / 4)][row])[at] = __float2half_rn(x > 0.0f ? 0.0f : x);
      reinterpret_cast<__half*>(&q.bounds[bounds_place((D + d) / 4)][row])[at] = __float2half_rn(x < 0.0f ? 0.0f : x);
    }
    if (c.lane == 0) {
      q.gain[row] = c.log2_scale() * __uint_as_float(static_cast<uint32_t>(127 + 24 - shift) << 23);
      q.sum[row] = c.log2_scale() * sum;
      q.prefix_sum[row] = c.log2_scale() * sum_prefix;
    }
  }
  sync_block("queries ready");
}

// The query rows as they are, and, where codes are read, as operands. Where items are scored, their pages. Every global
// load is in flight before the first is used.
template <class C>
__device__ void load_queries(const C& c, Share share, bool reads_codes, bool scores_items, int prefix,
                             Queries<C::D, C::RP>& q, View<uint32_t> pages) {
  using T = typename C::T;
  constexpr int D = C::D, RP = C::RP;
  constexpr int kValues = RP * D / kThreads > 0 ? RP * D / kThreads : 1;
  constexpr int kRowStride = Queries<D, RP>::kRowChunks * 8;
  T* rows_out = reinterpret_cast<T*>(q.rows);
  T value[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int row = (i * kThreads + c.tid()) / D, d = c.tid() % D;
    value[i] = T();
    if (row < c.rows) {
      const int token = row / c.p.group_size, group = row - token * c.p.group_size;
      value[i] = static_cast<const T*>(c.p.q)[c.sequence * c.p.q_stride_batch + token * c.p.q_stride_token +
                                              (c.head * c.p.group_size + group) * c.p.q_stride_head + d];
    }
  }
  int order = c.tid();
  if (reads_codes && c.p.channel_order != nullptr && c.tid() < D) order = c.p.channel_order[c.head * D + c.tid()];
  if (scores_items) {
    // Entries behind the last repeat it, so that whole tiles, or whole steps of a warp, can be read.
    const int filled =
        C::kByPage ? round_up(share.owned, kTileTokens) : round_up(share.owned, kBlockTokens) / kTileTokens;
    constexpr int kBatch = 4;  // loads in flight
#pragma unroll 1
    for (int start = c.tid(); start < filled; start += kBatch * kThreads) {
      uint32_t entry[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int i = start + u * kThreads;
        if (C::kByPage) {
          entry[u] = c.page_of(share.first + min(i, share.owned - 1));
        } else {
          const int token = share.first + (min(i * kTileTokens, share.owned - 1) & -kTileTokens);
          entry[u] = c.page_row(token) + c.slot_in_page(token);
        }
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (start + u * kThreads < filled) pages[start + u * kThreads] = entry[u];
      }
      if (C::kByMean) {
        if (start < kThreads) prefetch_line(c.template at<char>(c.p.page_means, entry[0]));
      } else if (C::kByPage && start < kWarps * kTileTokens) {  // the first pages that are scored
#pragma unroll
        for (int d = 0; d < 2 * D; d += 128) {
          prefetch_line(c.template at<char>(c.p.page_bounds, entry[0]) + d);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int at = i * kThreads + c.tid();
    if (at < RP * D) rows_out[at / D * kRowStride + at % D] = value[i];
  }
  if (c.tid() < RP) q.horizon[c.tid()] = c.live - c.p.query_tokens + c.tid() / c.p.group_size;
  if constexpr (RP <= kMaxRows) {
    if (c.tid() < D) q.order[c.tid()] = min(max(order, 0), D - 1);
  }
  sync_block("query rows read");
  if constexpr (RP <= kMaxRows) {
    if (reads_codes) make_operands(c, prefix, q);
  }
}

}  // namespace
}  // namespace twilight
