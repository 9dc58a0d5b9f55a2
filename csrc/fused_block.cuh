// What every stage of the fused decode kernel shares: who a thread is, where things lie, the query rows, softmax sums.
#pragma once

#include "fused_layout.cuh"

namespace twilight {
namespace {

using ScoreBins = FloatBins<79, kScoreBins - 1>;   // full resolution down to 2^-48 of the largest possible score
using WeightBins = FloatBins<100, kMassBins - 1>;  // down to 2^-27; 1.0 lands in bin 964

#ifdef __CUDACC__
extern __shared__ __align__(16) char dynamic_shared[];
#endif

template <typename T, int D, int RP, FusedSelector kSelector>
struct FusedBlock {
  static constexpr bool kByPage = kSelector == FusedSelector::kQuest;
  static constexpr bool kSelects = kByPage || kSelector == FusedSelector::kShadowPrefix;
  static constexpr bool kOnlyDense = kSelector == FusedSelector::kDense;
  static constexpr int kWords = D / 8;  // 32-bit words of codes a row
  // Tokens scored by several rows keep each row's logit in 16 bits until the rows' softmax norms are known. That
  // settles which items are chosen but for a narrow band around the boundary, whose scores are computed again.
  static constexpr bool kLevels = !kByPage && RP > 1;
  static constexpr int kScoreStride = kLevels ? RP / 2 : RP;
  static constexpr int kCopies =
      8 / RP;  // tiles that share one accumulator: its eight columns are RP query rows of each
  using Shared = FusedShared<T, D, RP>;

  const FusedParams& p;
  Shared& s;
  Cluster cluster;
  int sequence, head, rows;
  int live;  // tokens of the sequence
  int warp, lane, g, t;
  int first, owned;
  int lead_words;  // of a row's codes in the page's leading block
  int unit_shift, slot_count;

  __device__ explicit FusedBlock(const FusedParams& params)
      : p(params), s(*reinterpret_cast<Shared*>(dynamic_shared)), cluster(Cluster::current()) {
    const int unit = blockIdx.x / cluster.size;
    sequence = unit / p.kv_heads;
    head = unit - sequence * p.kv_heads;
    rows = p.query_tokens * p.group_size;
    warp = threadIdx.x >> 5;
    lane = threadIdx.x & 31;
    g = lane >> 2;
    t = lane & 3;
  }

  // Parts of the dynamic shared memory; addresses are cheaper made again than kept in registers.
  template <typename V>
  __device__ static __forceinline__ V* part(int at) {
    return reinterpret_cast<V*>(dynamic_shared + at);
  }
  __device__ __forceinline__ uint32_t* histogram() const { return part<uint32_t>(p.scratch_at); }
  __device__ __forceinline__ unsigned long long* mass_histogram() const {
    return part<unsigned long long>(p.scratch_at);
  }
  // All that lies before the lists, whichever of the histograms comes next.
  __device__ __forceinline__ void clear_histograms() const {
    constexpr int kVectors = kScratchLists / sizeof(uint4);
    static_assert(kVectors % kThreads == 0, "whole vectors of every thread");
    static_assert(kScoreBins * 4 <= kScratchLists && kMassBins * 8 <= kScratchLists && kRowBins * 8 <= kScratchLists,
                  "every histogram");
#pragma unroll
    for (int i = 0; i < kVectors; i += kThreads) part<uint4>(p.scratch_at)[i + tid()] = make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ float* warp_rows() const { return part<float>(p.scratch_at); }
  __device__ __forceinline__ T* streamed_tiles() const { return part<T>(p.scratch_at); }
  __device__ __forceinline__ float* weight_list() const { return part<float>(p.scratch_at + kScratchLists); }
  // This block's, read by the cluster; behind them those of the whole cluster.
  __device__ __forceinline__ uint32_t* boundary_keys() const { return part<uint32_t>(p.scratch_at + kScratchLists); }
  // Of this block's share: page * kv_heads + head of every page, or the first row of every tile of 16 tokens.
  __device__ __forceinline__ uint32_t* pages() const { return part<uint32_t>(p.pages_at); }
  __device__ __forceinline__ uint32_t* tiles() const { return part<uint32_t>(p.pages_at); }
  // (first row, first position) of every 2^unit_shift slots.
  __device__ __forceinline__ uint2* candidates() const { return part<uint2>(p.candidates_at); }
  // Bitmaps of items (above the boundary, inside it); later the last weights that thresholds are sought among.
  __device__ __forceinline__ uint2* marks() const { return part<uint2>(p.bitmap_at); }
  __device__ __forceinline__ uint32_t* last_weights() const { return part<uint32_t>(p.bitmap_at); }
  // Base-2 logits: of items as [items][kScoreStride], then their keys; of candidates as [RP][slot_capacity]. Then the
  // slots of survivors.
  __device__ __forceinline__ float* scores() const { return part<float>(p.state_at); }
  __device__ __forceinline__ uint32_t* levels() const { return part<uint32_t>(p.state_at); }
  __device__ __forceinline__ float* estimates() const { return part<float>(p.state_at); }
  __device__ __forceinline__ int* kept() const { return part<int>(p.state_at); }

  __device__ __forceinline__ int page_size() const { return 1 << p.log2_page_size; }
  __device__ __forceinline__ int tid() const { return threadIdx.x; }
  __device__ __forceinline__ int row_of_column(int k) const { return (2 * t + k) % RP; }
  __device__ __forceinline__ float log2_scale() const { return p.sm_scale * kLog2e; }

  __device__ __forceinline__ uint32_t page_block(int logical) const {
    const int page = __ldg(p.page_table + static_cast<int64_t>(sequence) * p.max_pages + logical);
    return static_cast<uint32_t>(min(max(page, 0), p.num_pages - 1) * p.kv_heads + head);
  }
  __device__ __forceinline__ uint32_t slot_in_page(uint32_t row) const { return row & (page_size() - 1); }
  // First words of a row's leading and of its other codes, counted from the start of k_quant.
  __device__ __forceinline__ uint32_t lead_word(uint32_t row) const {
    return row * kWords - slot_in_page(row) * (kWords - lead_words);
  }
  __device__ __forceinline__ uint32_t rest_word(uint32_t row) const {
    return (row - slot_in_page(row) + page_size()) * lead_words + row * (kWords - lead_words);
  }
  __device__ __forceinline__ uint32_t load_codes(uint32_t word) const {
    return __ldg(reinterpret_cast<const uint32_t*>(p.k_quant) + word);
  }
  __device__ __forceinline__ uint32_t load_scale(uint32_t row) const {
    return __ldg(reinterpret_cast<const uint32_t*>(p.k_scale) + row);
  }
  // (row, position) of a candidate slot.
  __device__ __forceinline__ uint2 resolve(int slot) const { return entry_of(candidates()[slot >> unit_shift], slot); }
  __device__ __forceinline__ uint2 entry_of(uint2 unit, int slot) const {
    const uint32_t offset = slot & ((1 << unit_shift) - 1);
    return make_uint2(unit.x + offset, unit.y + offset);
  }
  // The cluster's blocks divide the lines of this sequence's page table among them, before the length is known.
  __device__ __forceinline__ void prefetch_page_table() const {
    constexpr int kLine = 32;  // entries
    const int* table = p.page_table + static_cast<int64_t>(sequence) * p.max_pages;
#pragma unroll 1
    for (int i = (tid() * cluster.size + cluster.rank) * kLine; i < p.max_pages; i += kThreads * cluster.size * kLine) {
      prefetch_line(table + i);
    }
  }
  // Makes whole pages candidates: `count` of them from logical page `begin`.
  __device__ __forceinline__ void list_pages(int begin, int count) {
#pragma unroll 1
    for (int i = tid(); i < count; i += kThreads) {
      candidates()[i] = make_uint2(page_block(begin + i) << p.log2_page_size, (begin + i) << p.log2_page_size);
    }
  }

  // Where the queries of word w of a page's bounds lie: what the threads of a row read at a time is together.
  __device__ static __forceinline__ int bounds_place(int w) { return (w & ~15) | (w & 3) << 2 | (w >> 2 & 3); }

  // The query rows as they are, and, where codes are read, as fp16 operands scaled by a power of two (so that bf16 fits
  // too). Every global load of the prologue is in flight before the first is used.
  __device__ void load_query(bool reads_codes, bool scores_items, int prefix) {
    constexpr int kValues = RP * D / kThreads > 0 ? RP * D / kThreads : 1;
    T* rows_out = reinterpret_cast<T*>(s.q_rows);
    T value[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int row = (i * kThreads + tid()) / D, d = tid() % D;
      value[i] = T();
      if (row < rows) {
        const int token = row / p.group_size, group = row - token * p.group_size;
        value[i] = static_cast<const T*>(p.q)[sequence * p.q_stride_batch + token * p.q_stride_token +
                                              (head * p.group_size + group) * p.q_stride_head + d];
      }
    }
    int order = tid();
    if (reads_codes && p.channel_order != nullptr && tid() < D) order = p.channel_order[head * D + tid()];
    if (scores_items) {
      // Entries behind the last repeat it, so that whole tiles, or whole steps of a warp, can be read.
      const int filled = kByPage ? round_up(owned, kTileTokens) : round_up(owned, kBlockTokens) / kTileTokens;
      constexpr int kBatch = 4;  // loads in flight
#pragma unroll 1
      for (int start = tid(); start < filled; start += kBatch * kThreads) {
        uint32_t entry[kBatch];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          const int i = start + u * kThreads;
          if (kByPage) {
            entry[u] = page_block(first + min(i, owned - 1));
          } else {
            const int token = first + (min(i * kTileTokens, owned - 1) & -kTileTokens);
            entry[u] = (page_block(token >> p.log2_page_size) << p.log2_page_size) + slot_in_page(token);
          }
        }
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (start + u * kThreads < filled) pages()[start + u * kThreads] = entry[u];
        }
        if (kByPage && start < kWarps * kTileTokens) {  // the first pages that are scored
#pragma unroll
          for (int d = 0; d < 2 * D; d += 128) {
            prefetch_line(p.page_bounds + static_cast<int64_t>(entry[0]) * (2 * D) + d);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (i * kThreads + tid() < RP * D) rows_out[i * kThreads + tid()] = value[i];
    }
    if (tid() < D) s.order[tid()] = min(max(order, 0), D - 1);
    if (tid() < RP) s.horizon[tid()] = live - p.query_tokens + tid() / p.group_size;
    __syncthreads();
    if (!reads_codes) return;
    for (int row = warp; row < RP; row += kWarps) {
      float top = 0.0f, sum = 0.0f, sum_prefix = 0.0f;
      for (int j = lane; j < D; j += 32) {
        const float x = to_float(rows_out[row * D + s.order[j]]);
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
      for (int j = lane; j < D; j += 32) {
        const float x = scale * to_float(rows_out[row * D + s.order[j]]);
        const int nibble = j % 8;
        __half* word = reinterpret_cast<__half*>(&s.q_codes[j / 8][row]);
        word[(nibble & 3) * 2 + nibble / 4] = __float2half_rn(nibble & 1 ? x * 0.0625f : x);
      }
      for (int d = lane; kByPage && d < D; d += 32) {
        const float x = scale * to_float(rows_out[row * D + d]);
        const int at = (d & 1) * 2 + ((d & 3) >> 1);
        reinterpret_cast<__half*>(&s.q_bounds[bounds_place(d / 4)][row])[at] = __float2half_rn(x > 0.0f ? 0.0f : x);
        reinterpret_cast<__half*>(&s.q_bounds[bounds_place((D + d) / 4)][row])[at] =
            __float2half_rn(x < 0.0f ? 0.0f : x);
      }
      if (lane == 0) {
        s.gain[row] = log2_scale() * __uint_as_float(static_cast<uint32_t>(127 + 24 - shift) << 23);
        s.q_sum[row] = log2_scale() * sum;
        s.q_sum_prefix[row] = log2_scale() * sum_prefix;
      }
    }
    __syncthreads();
  }

  // Hands every block of the cluster this one's softmax sums, two columns a thread.
  __device__ void publish_sums(SoftmaxSum (&sum)[2]) {
    constexpr int kNumColumns = RP == 1 ? 1 : 2;
    if (RP == 1) sum[0].merge(sum[1].peak, sum[1].z);
#pragma unroll
    for (int k = 0; k < kNumColumns; ++k) {
      sum[k].template merge_lanes<16, RP == 8 ? 4 : RP == 4 ? 2 : 1>();
      if (g == 0 && 2 * t + k < RP) s.warp_stat[warp][2 * t + k] = make_float2(sum[k].peak, sum[k].z);
    }
    __syncthreads();
    if (warp < RP) publish_row_sum(part_of(s.warp_stat, kWarps));
  }

  // A lane's part of the sum of row `warp`, and what up to kParts of them add up to.
  __device__ __forceinline__ float2 part_of(const float2 (*parts)[RP], int count) const {
    return lane < count ? parts[lane][warp] : make_float2(kEmptyPeak, 0.0f);
  }
  template <int kParts>
  __device__ __forceinline__ SoftmaxSum merge_parts(float2 part) const {
    SoftmaxSum all;
    all.peak = part.x;
    all.z = part.y;
    all.template merge_lanes<kParts / 2, 1>();
    return all;
  }
  // Merges the warps' sums of row `warp`, hands the result to every block of the cluster and returns it.
  __device__ __forceinline__ SoftmaxSum publish_row_sum(float2 own) {
    SoftmaxSum all = merge_parts<kWarps>(own);
    all.peak = __shfl_sync(~0u, all.peak, 0);
    all.z = __shfl_sync(~0u, all.z, 0);
    if (lane < cluster.size) {
      cluster.write(&s.stat_parts[cluster.rank][warp], lane, make_float2(all.peak, all.z));
    }
    return all;
  }

  // What the rows' logits are lowered by, once the cluster has met.
  __device__ void read_norms(float* norms) {
    if (warp < RP) {
      const SoftmaxSum all = merge_parts<kMaxClusterSize>(part_of(s.stat_parts, cluster.size));
      if (lane == 0) norms[warp] = warp < rows ? all.norm() : infinity();
    }
    __syncthreads();
  }

  // Adds `count` values to a running sum; values of masked items are -inf.
  template <int kCount>
  __device__ __forceinline__ void accumulate(SoftmaxSum& sum, const float (&value)[kCount]) {
    float top = sum.peak;
#pragma unroll
    for (int i = 0; i < kCount; ++i) top = fmaxf(top, value[i]);
    sum.z *= exp2_fast(sum.peak - top);
    sum.peak = top;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum.z += exp2_fast(value[i] - top);
  }

  __device__ __forceinline__ float finite_or_masked(float x, bool valid) const {
    return valid && x < infinity() ? x : -infinity();
  }

  __device__ __forceinline__ int64_t out_row(int row) const {
    const int token = row / p.group_size, group = row % p.group_size;
    return (static_cast<int64_t>(sequence) * p.query_tokens + token) * p.kv_heads * p.group_size + head * p.group_size +
           group;
  }
};

}  // namespace
}  // namespace twilight
