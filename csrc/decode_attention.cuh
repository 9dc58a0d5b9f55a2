// One launch a layer: candidate scores, exact top-k, 4-bit estimate, exact top-p, attention on the survivors, merge.
//
// Grid: a cluster of C blocks a (sequence, KV head). In every phase each block owns an even share: of the sequence
// while scoring, of the candidates while estimating, of the survivors while attending; shares are handed over through
// distributed shared memory.
#pragma once

#include <algorithm>

#include "capacity.h"
#include "fused_primitives.cuh"

namespace twilight {

enum class FusedSelector : int { kDense, kFull, kQuest, kShadowPrefix };

constexpr int kTileTokens = 16;    // rows of one tensor-core product
constexpr int kBlockTokens = 128;  // a block's share of a sequence is a multiple of this
constexpr int kScoreBins = 2048;   // of candidate scores
constexpr int kMassBins = 1024;    // of estimated weights
constexpr int kWeightList =
    2048;  // weights that can matter to one row's threshold; more are read again from the estimates
constexpr int kBoundaryList = 256;   // keys that share the threshold's bin and are ranked one by one
constexpr int kScratchLists = 8192;  // bytes before the lists in scratch: the histograms
constexpr int kMaxClusterSize = 16;

struct FusedParams {
  const void* q;
  int64_t q_stride_batch, q_stride_token, q_stride_head;
  const void* k_cache;
  const void* v_cache;
  const uint8_t* k_quant;
  const uint8_t* k_scale;  // (scale, zero) as one 32-bit word a token
  const uint8_t* page_bounds;
  const uint8_t* bounds_scale;  // (scale, zero) as one 32-bit word a page
  const int* channel_order;
  const int* prefix_channels;
  const int* page_table;
  const int* seq_lens;
  const int* head_token_budget;
  const float* top_p_per_head;
  int top_p_stride_batch, top_p_stride_head;
  unsigned long long* budget_counters;
  int* kept_indices;
  int* kept_counts;
  void* out;
  float* lse;
  double budget_fraction, top_p;
  float sm_scale;
  FusedSelector selector;
  int prunes;
  int query_tokens, group_size, kv_heads;
  int log2_page_size, max_pages, num_pages;
  int token_budget, capacity;  // tokens; items
  int dense_below, sink_tokens, recent_tokens;
  // Shared memory, bytes from the start of the dynamic part and elements.
  int scratch_at, pages_at, candidates_at, bitmap_at, state_at;
  int bitmap_words, slot_capacity;
};

// What one block of the cluster owns of a sequence with `items` tokens or pages.
__host__ __device__ inline int share_of_tokens(int tokens, int blocks) {
  return round_up(blocks_of(blocks, tokens), kBlockTokens);
}
__host__ __device__ inline int share_of_pages(int pages, int blocks) {
  return round_up(blocks_of(blocks, pages), kTileTokens);
}

template <typename T, int D, int RP>
struct FusedShared {
  uint4 q_codes[D / 8][RP];  // ordered channels 8w..8w+7 as fp16, in the order mma_codes4 unpacks them
  uint2 q_bounds[D / 2]
                [RP];  // channels 4w..4w+3: negative part against the minima, then positive part against the maxima
  uint4 q_rows[RP][D / 8];  // as the model made them
  float out_rows[RP][D];
  float2 out_stat[RP];
  float2 warp_stat[kWarps][RP];
  float2 score_stat[RP], weight_stat[RP];
  float score_norm[RP], weight_norm[RP];
  float gain[RP], q_sum[RP], q_sum_prefix[RP];
  float threshold[RP], captured[RP];
  alignas(16) float tile_weights[kWarps][kTileTokens][RP];
  alignas(16) float rescale[kWarps][RP];
  unsigned long long scan_totals[kWarps];
  unsigned long long warp_mass[kWarps][RP], warp_listed_mass[kWarps][RP];
  unsigned long long row_mass[RP], row_listed_mass[RP];  // read by the cluster
  int segment_size[RP][kWarps];                          // read by the cluster
  uint32_t scan_totals_small[kWarps];
  uint32_t group_counts[64];  // this block's histogram by groups of 32 bins; read by the cluster
  uint32_t group_parts[4][64];
  uint32_t published_above, published_boundary;  // read by the cluster
  uint32_t local_boundary;
  int bin, need, boundary_size;
  uint32_t boundary_key, ties_needed;
  uint32_t rank_greater[kMaxClusterSize], rank_equal[kMaxClusterSize];
  int rank_first[kMaxClusterSize + 1];  // candidates before each block
  int rank_ties[kMaxClusterSize];
  int rank_offset[kMaxClusterSize + 1];
  int published_kept;  // read by the cluster
  int kept_first[kMaxClusterSize + 1];
  unsigned long long mass_above, mass_captured;
  uint32_t mass_key;
  int order[D];
};

// kernels/fused.py holds the same numbers, to tell without a launch what fits.
template <int D, int RP, int kBytes>
constexpr int checked_bytes() {
  static_assert(sizeof(FusedShared<__half, D, RP>) == kBytes, "FIXED_BYTES in kernels/fused.py");
  return kBytes;
}

constexpr int fused_shared_bytes(int head_dim, int padded_rows) {
  if (head_dim == 64) {
    return padded_rows == 1   ? checked_bytes<64, 1, 3712>()
           : padded_rows == 4 ? checked_bytes<64, 4, 8512>()
                              : checked_bytes<64, 8, 14928>();
  }
  return padded_rows == 1   ? checked_bytes<128, 1, 4736>()
         : padded_rows == 4 ? checked_bytes<128, 4, 11840>()
                            : checked_bytes<128, 8, 21328>();
}

// Lays out the dynamic shared memory behind FusedShared and returns its size in bytes. kernels/fused.py holds the same
// sum.
inline int lay_out(FusedParams& p, int head_dim, int rows, int cluster_size) {
  const int page_size = 1 << p.log2_page_size, padded_rows = rows == 1 ? 1 : rows <= 4 ? 4 : 8;
  const int max_tokens = p.max_pages * page_size;
  const bool by_page = p.selector == FusedSelector::kQuest, by_token = p.selector == FusedSelector::kShadowPrefix;
  const int own_tokens = share_of_tokens(max_tokens, cluster_size);
  const int own_pages = share_of_pages(p.max_pages, cluster_size);
  const int own_items = by_page ? own_pages : by_token ? own_tokens : 0;
  const int own_candidates = by_page || by_token ? blocks_of(cluster_size, p.capacity) : 0;
  const int slots = by_page ? own_candidates * page_size : by_token ? own_candidates : own_tokens;
  p.slot_capacity = p.prunes ? round_up(slots, 4) : 0;
  p.bitmap_words = std::max({blocks_of(32, own_items), blocks_of(32, p.slot_capacity), kBoundaryList / 2});

  int end = fused_shared_bytes(head_dim, padded_rows);
  const auto take = [&](int bytes) {
    const int at = round_up(end, 16);
    end = at + bytes;
    return at;
  };
  p.scratch_at = take(std::max(kScratchLists + kWeightList * 4, kWarps * padded_rows * head_dim * 4));
  const int listed_tokens = by_page || by_token ? std::min(max_tokens, p.dense_below) : max_tokens;
  p.pages_at = take((by_page ? own_pages : by_token ? own_tokens / page_size : 0) * 4);
  p.candidates_at = take(std::max(own_candidates, share_of_tokens(listed_tokens, cluster_size) / page_size) * 8);
  p.bitmap_at = take(p.bitmap_words * 2 * 4);
  const int score_stride = by_token ? 1 : padded_rows;
  p.state_at = take(std::max(own_items * score_stride, p.slot_capacity * padded_rows) * 4);
  return end;
}

namespace {

using ScoreBins = FloatBins<79, kScoreBins - 1>;   // full resolution down to 2^-48 of the largest possible score
using WeightBins = FloatBins<100, kMassBins - 1>;  // down to 2^-27; 1.0 lands in bin 964
constexpr float kMassUnit = 1099511627776.0f;      // 2^40: masses are integers, so any order adds up to the same

#ifdef __CUDACC__
extern __shared__ __align__(16) char dynamic_shared[];
#endif

// Dense calls run the kernel of kFull.
template <typename T, int D, int RP, FusedSelector kSelector>
struct FusedDecode {
  static constexpr bool kByPage = kSelector == FusedSelector::kQuest;
  static constexpr bool kSelects = kByPage || kSelector == FusedSelector::kShadowPrefix;
  static constexpr int kWords = D / 8;  // 32-bit words of codes a row
  // Tokens scored by several rows: a first pass finds the rows' softmax norms, a second one reads the prefix again and
  // keeps one key a token. Keeping every row's logit instead takes RP times the shared memory, and so smaller shares or
  // fewer blocks a multiprocessor.
  static constexpr bool kTwoPasses = !kByPage && RP > 1;
  static constexpr int kScoreStride = kTwoPasses ? 1 : RP;
  static constexpr int kCopies =
      8 / RP;  // tiles that share one accumulator: its eight columns are RP query rows of each
  using Shared = FusedShared<T, D, RP>;

  const FusedParams& p;
  Shared& s;
  Cluster cluster;
  int sequence, head, rows, live;
  int warp, lane, g, t;
  int first, owned;
  int lead_words;  // of a row's codes in the page's leading block
  int unit_shift, slot_count;

  __device__ FusedDecode(const FusedParams& params)
      : p(params), s(*reinterpret_cast<Shared*>(dynamic_shared)), cluster(Cluster::current()) {
    const int unit = blockIdx.x / cluster.size;
    sequence = unit / p.kv_heads;
    head = unit - sequence * p.kv_heads;
    rows = p.query_tokens * p.group_size;
    warp = threadIdx.x >> 5;
    lane = threadIdx.x & 31;
    g = lane >> 2;
    t = lane & 3;
    live = min(max(p.seq_lens[sequence], 0), p.max_pages << p.log2_page_size);
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
  __device__ __forceinline__ float* warp_rows() const { return part<float>(p.scratch_at); }
  __device__ __forceinline__ float* weight_list() const { return part<float>(p.scratch_at + kScratchLists); }
  // This block's, read by the cluster; behind them those of the whole cluster.
  __device__ __forceinline__ uint32_t* boundary_keys() const { return part<uint32_t>(p.scratch_at + kScratchLists); }
  // Of this block's share: page * kv_heads + head for Quest, else the first row.
  __device__ __forceinline__ uint32_t* pages() const { return part<uint32_t>(p.pages_at); }
  // (first row, first position) of every 2^unit_shift slots.
  __device__ __forceinline__ uint2* candidates() const { return part<uint2>(p.candidates_at); }
  // Bitmaps.
  __device__ __forceinline__ uint32_t* chosen() const { return part<uint32_t>(p.bitmap_at); }
  __device__ __forceinline__ uint32_t* tied() const { return chosen() + p.bitmap_words; }
  // Base-2 logits: of items as [items][kScoreStride], then their keys; of candidates as [RP][slot_capacity]. Then the
  // slots of survivors.
  __device__ __forceinline__ float* scores() const { return part<float>(p.state_at); }
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
    return row * lead_words + (row - slot_in_page(row)) * (kWords - lead_words);
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
  // Makes whole pages candidates: `count` of them from logical page `begin`.
  __device__ __forceinline__ void list_pages(int begin, int count) {
#pragma unroll 1
    for (int i = tid(); i < count; i += kThreads) {
      candidates()[i] = make_uint2(page_block(begin + i) << p.log2_page_size, (begin + i) << p.log2_page_size);
    }
  }

  // The query rows as they are, and, where codes are read, as fp16 operands scaled by a power of two (so that bf16 fits
  // too). Every global load of the prologue is in flight before the first is used.
  __device__ void load_query(bool reads_codes, bool scores_items, int prefix) {
    constexpr int kValues = RP * D / kThreads > 0 ? RP * D / kThreads : 1;
    T* rows_out = reinterpret_cast<T*>(s.q_rows);
    T value[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int row = (i * kThreads + tid()) / D, d = tid() % D;
      value[i] = T(0.0f);
      if (row < rows) {
        const int token = row / p.group_size, group = row - token * p.group_size;
        value[i] = static_cast<const T*>(p.q)[sequence * p.q_stride_batch + token * p.q_stride_token +
                                              (head * p.group_size + group) * p.q_stride_head + d];
      }
    }
    int order = tid();
    if (reads_codes && p.channel_order != nullptr && tid() < D) order = p.channel_order[head * D + tid()];
    if (scores_items) {
      const int begin = kByPage ? first : first >> p.log2_page_size;
      const int count = kByPage ? owned : blocks_of(page_size(), owned);
#pragma unroll 1
      for (int i = tid(); i < count; i += kThreads) {
        pages()[i] = kByPage ? page_block(begin + i) : page_block(begin + i) << p.log2_page_size;
      }
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (i * kThreads + tid() < RP * D) rows_out[i * kThreads + tid()] = value[i];
    }
    if (tid() < D) s.order[tid()] = min(max(order, 0), D - 1);
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
        reinterpret_cast<__half*>(&s.q_bounds[d / 4][row])[at] = __float2half_rn(x > 0.0f ? 0.0f : x);
        reinterpret_cast<__half*>(&s.q_bounds[(D + d) / 4][row])[at] = __float2half_rn(x < 0.0f ? 0.0f : x);
      }
      if (lane == 0) {
        s.gain[row] = log2_scale() * __uint_as_float(static_cast<uint32_t>(127 + 24 - shift) << 23);
        s.q_sum[row] = log2_scale() * sum;
        s.q_sum_prefix[row] = log2_scale() * sum_prefix;
      }
    }
    __syncthreads();
  }

  // One block's softmax sums, two columns a thread, into `published`.
  __device__ void publish_sums(SoftmaxSum (&sum)[2], float2* published) {
    if (RP == 1) sum[0].merge(sum[1].peak, sum[1].z);
    constexpr int kNumColumns = RP == 1 ? 1 : 2;
#pragma unroll
    for (int k = 0; k < kNumColumns; ++k) {
      sum[k].merge_lanes(16);
      sum[k].merge_lanes(8);
      sum[k].merge_lanes(4);
      if (RP <= 4) sum[k].merge_lanes(2);
      if (RP <= 2) sum[k].merge_lanes(1);
      if (g == 0 && 2 * t + k < RP) s.warp_stat[warp][2 * t + k] = make_float2(sum[k].peak, sum[k].z);
    }
    __syncthreads();
    if (tid() < RP) {
      SoftmaxSum all;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) all.merge(s.warp_stat[w][tid()].x, s.warp_stat[w][tid()].y);
      published[tid()] = make_float2(all.peak, all.z);
    }
  }

  __device__ __forceinline__ SoftmaxSum merge_cluster(const float2* published, int row) {
    SoftmaxSum all;
    if (lane < cluster.size) {
      const float2 stat = cluster.read(published + row, lane);
      all.peak = stat.x;
      all.z = stat.y;
    }
#pragma unroll
    for (int mask = 8; mask > 0; mask >>= 1) all.merge_lanes(mask);
    return all;
  }

  __device__ void read_norms(const float2* published, float* norms) {
    if (warp < RP) {
      const SoftmaxSum all = merge_cluster(published, warp);
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

  // Scores of this block's tokens from the leading channels: their softmax sums, or, of two passes the second, their
  // keys. A warp takes 128 tokens at a time, eight tiles of 16.
  __device__ void score_tokens(bool makes_keys) {
    constexpr int kTiles = kBlockTokens / kTileTokens;
    constexpr int kScales = RP == 1 ? 4 : 2;
    const int words = lead_words;
    SoftmaxSum sum[2];
    float gain[2], zero_gain[2], norm[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      gain[k] = s.gain[row_of_column(k)];
      zero_gain[k] = s.q_sum_prefix[row_of_column(k)];
      norm[k] = s.score_norm[row_of_column(k)];
    }
    const int2 competing = competing_items();
    const int last_page = blocks_of(page_size(), owned) - 1;
    const auto row_of = [&](int token) {
      return pages()[min(token >> p.log2_page_size, last_page)] + (token & (page_size() - 1));
    };
#pragma unroll 1
    for (int base = warp * kBlockTokens; base < owned; base += kWarps * kBlockTokens) {
      float acc[RP][4] = {};
      uint32_t packed[RP][kScales], tile_word[kTiles];
#pragma unroll
      for (int u = 0; u < kTiles; ++u) tile_word[u] = lead_word(row_of(base + u * kTileTokens)) + g * lead_words + t;
#pragma unroll
      for (int st = 0; st < RP; ++st) {
#pragma unroll
        for (int e = 0; e < kScales; ++e) {
          const int copy = RP == 1 ? 2 * t + (e >> 1) : 2 * t / RP;
          packed[st][e] = load_scale(row_of(base + (st * kCopies + copy) * kTileTokens) + g + 8 * (e & 1));
        }
      }
#pragma unroll 1
      for (int w0 = 0; w0 < words; w0 += 4) {
        const bool on = w0 + t < words;
        uint32_t x[kTiles], y[kTiles];
#pragma unroll
        for (int u = 0; u < kTiles; ++u) {
          x[u] = on ? load_codes(tile_word[u] + w0) : 0;
          y[u] = on ? load_codes(tile_word[u] + w0 + 8 * lead_words) : 0;
        }
        const uint4 q = on ? s.q_codes[w0 + t][g % RP] : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int u = 0; u < kTiles; ++u) {
          const bool mine = g / RP == u % kCopies;
          mma_codes4(acc[u / kCopies], x[u], y[u],
                     make_uint4(mine ? q.x : 0, mine ? q.y : 0, mine ? q.z : 0, mine ? q.w : 0));
        }
      }
      float value[2][2 * RP];
#pragma unroll
      for (int st = 0; st < RP; ++st) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float logit[2];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const float2 scale = scale_and_zero(packed[st][RP == 1 ? 2 * k + half : half]);
            logit[k] = fmaf(scale.x, acc[st][2 * half + k] * gain[k], scale.y * zero_gain[k]);
            const int copy = RP == 1 ? 2 * t + k : 2 * t / RP;
            const int token = base + (st * kCopies + copy) * kTileTokens + g + 8 * half;
            value[k][2 * st + half] = finite_or_masked(logit[k], token < owned);
            if (RP == 1 && token < owned) scores()[token] = logit[k];
          }
          if (kTwoPasses && makes_keys) {
            float score = exp2_fast(logit[0] - norm[0]) + exp2_fast(logit[1] - norm[1]);
#pragma unroll
            for (int mask = 1; mask < RP / 2; mask <<= 1) score += __shfl_xor_sync(~0u, score, mask);
            const int token = base + (st * kCopies + 2 * t / RP) * kTileTokens + g + 8 * half;
            if (row_of_column(0) == 0 && token < owned) stored_key(token) = rank_key(score, token, competing);
          }
        }
      }
      if (kTwoPasses && makes_keys) continue;
      accumulate(sum[0], value[0]);
      accumulate(sum[1], value[1]);
    }
    if (!(kTwoPasses && makes_keys)) publish_sums(sum, s.score_stat);
  }

  // Scores of this block's pages from their 8-bit bounds; a warp takes 16 pages at a time.
  __device__ void score_pages() {
    constexpr int kChunks = D / 32;
    SoftmaxSum sum[2];
#pragma unroll 1
    for (int base = warp * kTileTokens; base < owned; base += kWarps * kTileTokens) {
      float acc[4] = {};
      uint4 x[kChunks], y[kChunks];
      const uint32_t block0 = pages()[min(base + g, owned - 1)], block1 = pages()[min(base + g + 8, owned - 1)];
      const uint4* bounds = reinterpret_cast<const uint4*>(p.page_bounds) + t;
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        x[j] = load_stream(bounds + block0 * (D / 8) + 4 * j);
        y[j] = load_stream(bounds + block1 * (D / 8) + 4 * j);
      }
      const uint32_t* scales = reinterpret_cast<const uint32_t*>(p.bounds_scale);
      const uint32_t packed[2] = {__ldg(scales + block0), __ldg(scales + block1)};
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const uint2* q = &s.q_bounds[4 * (4 * j + t)][g % RP];
        const bool mine = g < RP;
        const uint32_t xs[4] = {x[j].x, x[j].y, x[j].z, x[j].w}, ys[4] = {y[j].x, y[j].y, y[j].z, y[j].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) mma_codes8(acc, xs[i], ys[i], mine ? q[i * RP] : make_uint2(0, 0));
      }
      float value[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 scale = scale_and_zero(packed[half]);
        const int page = base + g + 8 * half;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const bool valid = page < owned && 2 * t + k < RP;
          const int row = row_of_column(k);
          const float logit = fmaf(scale.x, acc[2 * half + k] * s.gain[row], scale.y * s.q_sum[row]);
          value[k][half] = finite_or_masked(logit, valid);
          if (valid) scores()[page * RP + row] = logit;
        }
      }
      accumulate(sum[0], value[0]);
      accumulate(sum[1], value[1]);
    }
    publish_sums(sum, s.score_stat);
  }

  // Owned items in [begin, end) compete; those before are sinks, those behind the newest, and both are always taken.
  __device__ __forceinline__ int2 competing_items() const {
    const int newest = max(live - max(p.recent_tokens, p.query_tokens), 0);
    const int begin = kByPage ? (p.sink_tokens + page_size() - 1) >> p.log2_page_size : p.sink_tokens;
    const int end = kByPage ? newest >> p.log2_page_size : newest;
    return make_int2(begin - first, end - first);
  }

  __device__ __forceinline__ uint32_t rank_key(float score, int item, int2 competing) const {
    const uint32_t key = score < infinity() ? __float_as_uint(score) : kInfinityKey;
    return item < competing.x || item >= competing.y ? kForcedKey : key;
  }

  // Sortable score of one owned item: the sum over the rows of its softmax. It replaces the first of the item's logits.
  __device__ __forceinline__ uint32_t score_key(int item, int2 competing) const {
    float score = 0.0f;
#pragma unroll
    for (int r = 0; r < RP; ++r) score += exp2_fast(scores()[item * RP + r] - s.score_norm[r]);
    return rank_key(score, item, competing);
  }

  __device__ __forceinline__ uint32_t& stored_key(int item) const {
    return reinterpret_cast<uint32_t*>(scores())[item * kScoreStride];
  }

  // Histogram of this block's keys; `first_round` makes them, a later one refines the bin [low_key, low_key +
  // 2^log2_width).
  __device__ void count_keys(bool first_round, uint32_t low_key, int log2_width, int shift) {
    constexpr int kBatch = 8;  // loads in flight before the first atomic, which the compiler moves no load across
    const int2 competing = competing_items();
#pragma unroll 1
    for (int base = tid(); base < owned; base += kBatch * kThreads) {
      uint32_t key[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = base + u * kThreads;
        if (item < owned) key[u] = first_round && !kTwoPasses ? score_key(item, competing) : stored_key(item);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = base + u * kThreads;
        if (item >= owned) continue;
        if (first_round) {
          if (!kTwoPasses) stored_key(item) = key[u];
          atomicAdd(&histogram()[ScoreBins::of(key[u])], 1u);
        } else if ((key[u] - low_key) >> log2_width == 0) {
          atomicAdd(&histogram()[(key[u] - low_key) >> shift], 1u);
        }
      }
    }
  }

  // Bitmaps of this block's items above the boundary bin and inside it; short boundaries are listed key by key.
  __device__ void mark_items(uint32_t low_key, int log2_width, bool ranked) {
    constexpr int kBatch = 4;
    const int word_count = blocks_of(32, owned);
#pragma unroll 1
    for (int start = warp; start < word_count; start += kBatch * kWarps) {
      uint32_t key[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = (start + u * kWarps) * 32 + lane;
        key[u] = item < owned ? stored_key(item) : 0u;
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int word = start + u * kWarps;
        const bool valid = word * 32 + lane < owned;
        const bool inside = valid && key[u] >= low_key && (key[u] - low_key) >> log2_width == 0;
        const uint32_t above_bits = __ballot_sync(~0u, valid && !inside && key[u] > low_key);
        const uint32_t inside_bits = __ballot_sync(~0u, inside);
        if (lane == 0 && word < word_count) {
          chosen()[word] = above_bits;
          tied()[word] = inside_bits;
        }
        if (ranked && inside) boundary_keys()[atomicAdd(&s.local_boundary, 1u)] = key[u];
      }
    }
    __syncthreads();
  }

  // The `wanted` best items of the cluster, ties to the lower index, dealt out evenly into `candidates`.
  __device__ void select(int wanted) {
    uint32_t low_key = 0;
    int log2_width = 32, need = wanted, above = 0;
    bool ranked = false;  // the boundary bin is settled key by key
    for (;;) {
#pragma unroll 1
      for (int i = tid(); i < kScoreBins; i += kThreads) histogram()[i] = 0;
      __syncthreads();
      const int shift = max(0, log2_width - 11);
      count_keys(log2_width == 32, low_key, log2_width, shift);
      __syncthreads();
      {
        const uint4* mine = reinterpret_cast<const uint4*>(histogram() + 8 * tid());
        const uint4 a = mine[0], b = mine[1];
        uint32_t count = a.x + a.y + a.z + a.w + b.x + b.y + b.z + b.w;
        count += __shfl_xor_sync(~0u, count, 1);
        count += __shfl_xor_sync(~0u, count, 2);
        if ((lane & 3) == 0) s.group_counts[tid() >> 2] = count;
      }
      cluster.sync();
      {
        uint32_t count[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int c = (tid() >> 6) + 4 * i;
          if (c < cluster.size) count[i] = cluster.read(&s.group_counts[tid() & 63], c);
        }
        s.group_parts[tid() >> 6][tid() & 63] = count[0] + count[1] + count[2] + count[3];
      }
      __syncthreads();
      if (warp == 0) {
        // Lane l looks at groups 63 - 2l and 62 - 2l, then at bin 31 - l of the group where the count passes `need`.
        int high = 0, low = 0;
        for (int part = 0; part < 4; ++part) {
          high += s.group_parts[part][63 - 2 * lane];
          low += s.group_parts[part][62 - 2 * lane];
        }
        int through = warp_inclusive_scan(high + low);
        const int owner = __ffs(__ballot_sync(~0u, through >= need)) - 1;
        const int before = __shfl_sync(~0u, through - high - low, owner);
        const int in_high = __shfl_sync(~0u, high, owner);
        const bool is_high = before + in_high >= need;
        const int group = 63 - 2 * owner - (is_high ? 0 : 1);
        int left = need - before - (is_high ? 0 : in_high);
        int counts[kMaxClusterSize] = {}, count = 0;
#pragma unroll
        for (int c = 0; c < kMaxClusterSize; ++c) {
          if (c < cluster.size) counts[c] = cluster.read(&histogram()[group * 32 + 31 - lane], c);
        }
#pragma unroll
        for (int c = 0; c < kMaxClusterSize; ++c) count += counts[c];
        through = warp_inclusive_scan(count);
        const int pick = __ffs(__ballot_sync(~0u, through >= left)) - 1;
        left -= __shfl_sync(~0u, through - count, pick);
        const int bin = group * 32 + 31 - pick;
        int own = 0;
        for (int i = lane; i < 64; i += 32) own += i > group ? s.group_counts[i] : 0;
        own += group * 32 + lane > bin ? histogram()[group * 32 + lane] : 0;
        own = warp_sum(own);
        if (lane == 0) {
          s.bin = bin;
          s.need = left;
          s.boundary_size = 0;
          s.published_above = above + own;
          s.local_boundary = 0;
        }
        if (lane == pick) s.rank_equal[0] = count;
      }
      __syncthreads();
      const int bin = s.bin, in_bin = s.rank_equal[0];
      above = s.published_above;
      need = s.need;
      const bool first_round = log2_width == 32;
      low_key = first_round ? ScoreBins::first_key(bin) : low_key + (static_cast<uint32_t>(bin) << shift);
      log2_width = first_round ? ScoreBins::log2_width(bin) : shift;
      if (in_bin <= kBoundaryList || need == in_bin || log2_width == 0) {
        ranked = need < in_bin && in_bin <= kBoundaryList;
        if (!ranked && tid() == 0) s.published_boundary = histogram()[bin];
        break;
      }
      cluster.sync();  // the others still read this histogram
    }
    // Every block now publishes how many of its items lie above the boundary bin, and those inside it.
    mark_items(low_key, log2_width, ranked);
    if (ranked && tid() == 0) s.published_boundary = s.local_boundary;
    cluster.sync();
    settle_boundary(ranked, low_key, log2_width, need);
    deal_candidates(ranked, !ranked && log2_width > 0, wanted);
  }

  // Turns the boundary lists of all blocks into one key, and into how many ties and how many items each block
  // contributes.
  __device__ void settle_boundary(bool ranked, uint32_t low_key, int log2_width, int need) {
    uint32_t* all_keys = boundary_keys() + kBoundaryList;
    if (warp == 0) {
      const bool there = lane < cluster.size;
      const int above = there ? cluster.read(&s.published_above, lane) : 0;
      const int boundary = there ? cluster.read(&s.published_boundary, lane) : 0;
      const int through = warp_inclusive_scan(boundary);
      if (lane < kMaxClusterSize) {
        s.rank_offset[lane] = through - boundary;
        s.rank_greater[lane] = above;
        s.rank_equal[lane] = ranked ? 0 : boundary;
      }
      if (lane == kMaxClusterSize - 1) s.rank_offset[kMaxClusterSize] = through;
      if (lane == 0) {
        s.boundary_key = low_key;
        s.ties_needed = need;
      }
    }
    __syncthreads();
    if (ranked) {
      const int count = s.rank_offset[kMaxClusterSize];
      uint32_t key = 0;
      int owner = 0;
      if (tid() < count) {
#pragma unroll 1
        while (s.rank_offset[owner + 1] <= tid()) ++owner;
        key = cluster.read(&boundary_keys()[tid() - s.rank_offset[owner]], owner);
        all_keys[tid()] = key;
      }
      if (tid() >= count && tid() < round_up(count, 4))
        all_keys[tid()] = 0;  // no key of the bin: sorts last, never drawn
      __syncthreads();
      int greater = 0, equal = 0;
      if (tid() < count) {
#pragma unroll 2
        for (int i = 0; i < count; i += 4) {
          const uint4 other = *reinterpret_cast<const uint4*>(all_keys + i);
          greater += (other.x > key) + (other.y > key) + (other.z > key) + (other.w > key);
          equal += (other.x == key) + (other.y == key) + (other.z == key) + (other.w == key);
        }
        // Ties all write the same.
        if (greater < need && need <= greater + equal) {
          atomicExch(&s.boundary_key, key);
          atomicExch(&s.ties_needed, static_cast<uint32_t>(need - greater));
        }
      }
      __syncthreads();
      if (tid() < count) {
        if (key > s.boundary_key) atomicAdd(&s.rank_greater[owner], 1u);
        if (key == s.boundary_key) atomicAdd(&s.rank_equal[owner], 1u);
      }
      __syncthreads();
    }
    if (warp == 0) {
      const bool there = lane < kMaxClusterSize;
      const int equal = there ? s.rank_equal[lane] : 0;
      const int earlier = warp_inclusive_scan(equal) - equal;
      const int ties = min(max(static_cast<int>(s.ties_needed) - earlier, 0), equal);
      const int taken = (there ? static_cast<int>(s.rank_greater[lane]) : 0) + ties;
      const int through = warp_inclusive_scan(taken);
      if (there) {
        s.rank_ties[lane] = ties;
        s.rank_first[lane] = through - taken;
      }
    }
    __syncthreads();
  }

  // Sends the chosen items, in order, to the block whose even share they fall into. Of the items in the boundary bin,
  // those above the boundary key are chosen, and as many of its ties as this block's share; or all of them.
  __device__ void deal_candidates(bool ranked, bool whole_bin, int wanted) {
    const int share = blocks_of(cluster.size, wanted), word_count = blocks_of(32, owned);
    const uint32_t boundary = s.boundary_key;
    int ties_left = s.rank_ties[cluster.rank], position = s.rank_first[cluster.rank];
#pragma unroll 1
    for (int start = 0; start < word_count; start += kThreads) {
      const int word = start + tid();
      uint32_t bits = word < word_count ? chosen()[word] : 0;
      uint32_t ties = word < word_count ? tied()[word] : 0;
      if (whole_bin) {
        bits |= ties;
        ties = 0;
      } else if (ranked) {
#pragma unroll 1
        for (uint32_t left = ties; left != 0; left &= left - 1) {
          const uint32_t bit = left & -left, key = stored_key(word * 32 + __ffs(left) - 1);
          if (key > boundary) bits |= bit;
          if (key != boundary) ties ^= bit;
        }
      }
      uint32_t total;
      const int ties_before = block_exclusive_scan<uint32_t>(__popc(ties), s.scan_totals_small, total);
#pragma unroll 1
      for (int quota = ties_left - ties_before; quota > 0 && ties != 0; --quota) {
        bits |= ties & -ties;
        ties &= ties - 1;
      }
      ties_left -= total;
      int to = position + block_exclusive_scan<uint32_t>(__popc(bits), s.scan_totals_small, total);
      position += total;
      int owner = to / share;
      to -= owner * share;
#pragma unroll 1
      for (; bits != 0; bits &= bits - 1) {
        const int item = word * 32 + __ffs(bits) - 1;
        const uint32_t row =
            kByPage ? pages()[item] << p.log2_page_size : pages()[item >> p.log2_page_size] + slot_in_page(item);
        const int position = kByPage ? (first + item) << p.log2_page_size : first + item;
        cluster.write(&candidates()[to], owner, make_uint2(row, position));
        if (++to == share) {
          to = 0;
          ++owner;
        }
      }
    }
  }

  // Base-2 logits of this block's candidate slots from all channels; a warp takes 64 slots at a time, four tiles of 16.
  template <bool kWholeRows>
  __device__ void estimate() {
    constexpr int kTiles = 4;
    constexpr int kColumns = kCopies < kTiles ? kCopies : kTiles;
    constexpr int kSupertiles = kTiles / kColumns;
    constexpr int kScales = RP == 1 ? 4 : 2;
    constexpr int kChunks = D / 32;
    SoftmaxSum sum[2];
#pragma unroll 1
    for (int base = warp * kTiles * kTileTokens; base < slot_count; base += kWarps * kTiles * kTileTokens) {
      uint32_t words[kTiles][2][kChunks], packed[kSupertiles][kScales];
#pragma unroll
      for (int u = 0; u < kTiles; ++u) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t row = resolve(min(base + u * kTileTokens + g + 8 * half, slot_count - 1)).x;
          if (kWholeRows) {
            const uint32_t* codes = reinterpret_cast<const uint32_t*>(p.k_quant) + (row * kWords + kChunks * t);
            if (kChunks == 4) {
              const uint4 v = load_stream(codes);
              words[u][half][0] = v.x, words[u][half][1] = v.y;
              words[u][half][kChunks - 2] = v.z, words[u][half][kChunks - 1] = v.w;
            } else {
              const uint2 v = __ldg(reinterpret_cast<const uint2*>(codes));
              words[u][half][0] = v.x, words[u][half][1] = v.y;
            }
          } else {
            const uint32_t lead = lead_word(row), rest = rest_word(row) - lead_words;
#pragma unroll
            for (int j = 0; j < kChunks; ++j) {
              const int word = 4 * j + t;
              words[u][half][j] = load_codes((word < lead_words ? lead : rest) + word);
            }
          }
        }
      }
#pragma unroll
      for (int st = 0; st < kSupertiles; ++st) {
#pragma unroll
        for (int e = 0; e < kScales; ++e) {
          const int copy = RP == 1 ? 2 * (t & 1) + (e >> 1) : 2 * t / RP;
          const int slot = base + (st * kColumns + copy) * kTileTokens + g + 8 * (e & 1);
          packed[st][e] = load_scale(resolve(min(slot, slot_count - 1)).x);
        }
      }
      float acc[kSupertiles][4] = {};
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const uint4 q = s.q_codes[kWholeRows ? kChunks * t + j : 4 * j + t][g % RP];
#pragma unroll
        for (int u = 0; u < kTiles; ++u) {
          const bool mine = g / RP == u % kColumns;
          mma_codes4(acc[u / kColumns], words[u][0][j], words[u][1][j],
                     make_uint4(mine ? q.x : 0, mine ? q.y : 0, mine ? q.z : 0, mine ? q.w : 0));
        }
      }
      float value[2][2 * kSupertiles];
#pragma unroll
      for (int st = 0; st < kSupertiles; ++st) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int e = RP == 1 ? 2 * k + half : half;
            const int copy = RP == 1 ? 2 * (t & 1) + k : 2 * t / RP;
            const int slot = base + (st * kColumns + copy) * kTileTokens + g + 8 * half;
            const int row = row_of_column(k);
            const float2 scale = scale_and_zero(packed[st][e]);
            const float logit = fmaf(scale.x, acc[st][2 * half + k] * s.gain[row], scale.y * s.q_sum[row]);
            const bool column = RP > 1 || t < 2;
            const int position = slot < slot_count ? static_cast<int>(resolve(slot).y) : INT32_MAX;
            const bool seen = position <= live - p.query_tokens + row / p.group_size;
            value[k][2 * st + half] = seen && column ? logit : -infinity();
            if (column && slot < slot_count) estimates()[row * p.slot_capacity + slot] = value[k][2 * st + half];
          }
        }
      }
      accumulate(sum[0], value[0]);
      accumulate(sum[1], value[1]);
    }
    publish_sums(sum, s.weight_stat);
  }

  __device__ __forceinline__ float weight(float logit, float norm) const {
    return fminf(exp2_fast(logit - norm), 1.0f);
  }
  __device__ __forceinline__ unsigned long long mass_of(float w) const {
    return static_cast<unsigned long long>(w * kMassUnit);
  }

  // p of one query row, at least 0; 1 keeps everything.
  __device__ __forceinline__ double row_top_p(int row) const {
    if (p.top_p_per_head == nullptr) return p.top_p;
    const int query_head = head * p.group_size + row % p.group_size;
    const float given = p.top_p_per_head[sequence * p.top_p_stride_batch + query_head * p.top_p_stride_head];
    return isnan(given) ? 1.0 : fmin(fmax(static_cast<double>(given), 0.0), 1.0);
  }

  // Weights below (1 - p) / N of the total add up to less than what may be left out, so none of them is the threshold.
  __device__ __forceinline__ float floor_weight(double top_p, int total_slots) const {
    const float floor = static_cast<float>((1.0 - top_p) * 0.99) / total_slots;
    return floor < 0x1p-30f ? 0.0f : floor;
  }

  // Adds up this block's masses, row by row, and lists the weights that can be thresholds. The lists start at four
  // times the floor, which leaves them short; should they not reach p, or not fit, solve_row reads the estimates again.
  __device__ void list_weights(int total_slots) {
    constexpr int kSlots = RP <= 4 ? 4 : 2;  // a thread's loads in flight are RP times that
    float norm[RP], listed_from[RP];
    unsigned long long total[RP] = {}, listed_mass[RP] = {};
    int listed[RP] = {};
#pragma unroll
    for (int r = 0; r < RP; ++r) {
      norm[r] = s.weight_norm[r];
      listed_from[r] = r < rows ? 4.0f * floor_weight(row_top_p(r), total_slots) : 2.0f;  // no weight reaches 2
    }
#pragma unroll 1
    for (int base = tid(); base - lane < slot_count; base += kSlots * kThreads) {
#pragma unroll
      for (int u = 0; u < kSlots; ++u) {
        const int slot = base + u * kThreads;
#pragma unroll
        for (int r = 0; r < RP; ++r) {
          const float w = slot < slot_count ? weight(estimates()[r * p.slot_capacity + slot], norm[r]) : 0.0f;
          const unsigned long long mass = mass_of(w);
          total[r] += mass;
          const bool matters = slot < slot_count && w >= listed_from[r];
          const uint32_t bits = __ballot_sync(~0u, matters);
          if (bits == 0) continue;
          listed_mass[r] += matters ? mass : 0;
          const int at = listed[r] + __popc(bits & ((1u << lane) - 1));
          if (matters && at < kSegment) segment(r, warp)[at] = w;
          listed[r] += __popc(bits);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < RP; ++r) {
      total[r] = warp_sum(total[r]);
      listed_mass[r] = warp_sum(listed_mass[r]);
      if (lane == 0) {
        s.warp_mass[warp][r] = total[r];
        s.warp_listed_mass[warp][r] = listed_mass[r];
        s.segment_size[r][warp] = listed[r];
      }
    }
    __syncthreads();
    if (tid() < RP) {
      unsigned long long all = 0, all_listed = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        all += s.warp_mass[w][tid()];
        all_listed += s.warp_listed_mass[w][tid()];
      }
      s.row_mass[tid()] = all;
      s.row_listed_mass[tid()] = all_listed;
    }
  }

  static constexpr int kSegment = kWeightList / RP / kWarps;  // listed weights a row and warp
  __device__ __forceinline__ float* segment(int row, int of_warp) const {
    return weight_list() + (row * kWarps + of_warp) * kSegment;
  }

  // A bin's mass: two 32-bit sums, which the lists of a cluster are too short to overflow, or else one slower 64-bit
  // sum.
  __device__ __forceinline__ void add_mass(int bin, float w, bool wide) {
    const unsigned long long mass = mass_of(w);
    if (wide) {
      atomicAdd(&mass_histogram()[bin], mass);
    } else {
      atomicAdd(&histogram()[2 * bin], static_cast<uint32_t>(mass) & 0xffffu);
      atomicAdd(&histogram()[2 * bin + 1], static_cast<uint32_t>(mass >> 16));
    }
  }
  __device__ __forceinline__ unsigned long long mass_in_bin(int bin, bool wide) const {
    if (wide) return mass_histogram()[bin];
    return histogram()[2 * bin] + (static_cast<unsigned long long>(histogram()[2 * bin + 1]) << 16);
  }

  // Threshold of one query row: the largest weight whose mass, with everything above, reaches p. Runs in the row's own
  // block.
  __device__ void solve_row(int row, int slot_share, int total_slots) {
    const float norm = s.weight_norm[row];
    const double top_p = row_top_p(row);
    const float floor = floor_weight(top_p, total_slots);
    // Every warp adds up the blocks' masses, and knows the sizes of the segments that warps of its number made.
    unsigned long long total = 0, listed_mass = 0;
    int size = 0;
    if (lane < cluster.size) {
      total = cluster.read(&s.row_mass[row], lane);
      listed_mass = cluster.read(&s.row_listed_mass[row], lane);
      size = cluster.read(&s.segment_size[row][warp], lane);
    }
    total = warp_sum(total);
    listed_mass = warp_sum(listed_mass);
    for (int i = tid(); i < kMassBins; i += kThreads) mass_histogram()[i] = 0;
    if (!(top_p < 1.0) || isnan(norm) || total == 0) {
      publish_threshold(row, 0.0f, 1.0f);
      return;
    }
    unsigned long long need = static_cast<unsigned long long>(ceil(top_p * static_cast<double>(total)));
    if (need < 1) need = 1;
    const bool overflow = __syncthreads_or(size > kSegment) || listed_mass < need;
    // Shows `place` every weight that matters.
    const auto each_listed = [&](const auto& place) {
      if (!overflow) {
#pragma unroll 4
        for (int c = 0; c < cluster.size; ++c) {
          const int count = __shfl_sync(~0u, size, c);
          for (int i = lane; i < count; i += 32) place(cluster.read(segment(row, warp) + i, c));
        }
      } else {
#pragma unroll 1
        for (int i = tid(); i < total_slots; i += kThreads) {
          const int owner = i / slot_share;
          const float* estimate = estimates() + row * p.slot_capacity + (i - owner * slot_share);
          const float w = weight(cluster.read(estimate, owner), norm);
          if (w >= floor) place(w);
        }
      }
      __syncthreads();
    };
    each_listed([&](float w) { add_mass(WeightBins::of(__float_as_uint(w)), w, overflow); });
    uint32_t low_key = 0;
    int log2_width = 32;
    unsigned long long above = 0;
    for (;;) {
      // Thread i adds up bins 1023 - 4i .. 1020 - 4i and finds the one where the mass passes `need`.
      unsigned long long bin_mass[4], part = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) part += bin_mass[i] = mass_in_bin(kMassBins - 1 - 4 * tid() - i, overflow);
      unsigned long long all;
      unsigned long long before = above + block_exclusive_scan(part, s.scan_totals, all);
      if (before < need && before + part >= need) {
        int i = 0;
        while (before + bin_mass[i] < need) before += bin_mass[i++];
        s.bin = kMassBins - 1 - 4 * tid() - i;
        s.mass_above = before;
      }
      __syncthreads();
      const bool first_round = log2_width == 32;
      const int shift = max(0, log2_width - 10);
      const int bin = s.bin;
      above = s.mass_above;
      low_key = first_round ? WeightBins::first_key(bin) : low_key + (static_cast<uint32_t>(bin) << shift);
      log2_width = first_round ? WeightBins::log2_width(bin) : shift;
      if (tid() == 0) s.local_boundary = 0;
#pragma unroll 1
      for (int i = tid(); i < kMassBins; i += kThreads) mass_histogram()[i] = 0;
      __syncthreads();
      const int next_shift = max(0, log2_width - 10);
      each_listed([&](float w) {
        const uint32_t key = __float_as_uint(w);
        if (key < low_key || (key - low_key) >> log2_width != 0) return;
        const uint32_t at = atomicAdd(&s.local_boundary, 1u);
        if (at < kBoundaryList) boundary_list()[at] = w;
        add_mass((key - low_key) >> next_shift, w, overflow);
      });
      if (s.local_boundary <= kBoundaryList || log2_width == 0) break;
    }
    finish_row(row, low_key, above, need, total);
  }

  // Shares space with the bitmaps, which are idle while thresholds are sought.
  __device__ __forceinline__ float* boundary_list() { return reinterpret_cast<float*>(chosen()); }

  // All candidates for the threshold lie in one short list, or share one key.
  __device__ void finish_row(int row, uint32_t low_key, unsigned long long above, unsigned long long need,
                             unsigned long long total) {
    const int count = s.local_boundary;
    if (tid() == 0) s.mass_key = 0;
    __syncthreads();
    if (count > kBoundaryList) {
      const unsigned long long mass =
          above + static_cast<unsigned long long>(count) * mass_of(__uint_as_float(low_key));
      publish_threshold(row, __uint_as_float(low_key),
                        static_cast<float>(static_cast<double>(mass) / static_cast<double>(total)));
      return;
    }
    const float* list = boundary_list();
    unsigned long long reached = above;
    if (tid() < count) {
#pragma unroll 1
      for (int i = 0; i < count; ++i) reached += list[i] >= list[tid()] ? mass_of(list[i]) : 0;
      if (reached >= need) atomicMax(&s.mass_key, __float_as_uint(list[tid()]));
    }
    __syncthreads();
    if (tid() < count && __float_as_uint(list[tid()]) == s.mass_key) atomicExch(&s.mass_captured, reached);
    __syncthreads();
    publish_threshold(row, __uint_as_float(s.mass_key),
                      static_cast<float>(static_cast<double>(s.mass_captured) / static_cast<double>(total)));
    __syncthreads();
  }

  __device__ __forceinline__ void publish_threshold(int row, float threshold, float captured) {
    if (tid() < cluster.size) {
      cluster.write(&s.threshold[row], tid(), threshold);
      cluster.write(&s.captured[row], tid(), captured);
    }
  }

  // Lists this block's survivors: slots whose weight reaches any row's threshold, sinks and recent tokens.
  __device__ void list_survivors() {
    const int word_count = blocks_of(32, slot_count);
    constexpr int kBatch = 4;
    float threshold[RP], norm[RP];
#pragma unroll
    for (int r = 0; r < RP; ++r) {
      threshold[r] = r < rows ? s.threshold[r] : 2.0f;  // no weight reaches 2
      norm[r] = s.weight_norm[r];
    }
#pragma unroll 1
    for (int start = warp; start < word_count; start += kBatch * kWarps) {
      bool keep[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int slot = min((start + u * kWarps) * 32 + lane, slot_count - 1);
        const int position = resolve(slot).y;
        keep[u] = position < p.sink_tokens || position >= live - p.recent_tokens;
#pragma unroll
        for (int r = 0; r < RP; ++r) {
          keep[u] |= threshold[r] == 0.0f || weight(estimates()[r * p.slot_capacity + slot], norm[r]) >= threshold[r];
        }
        keep[u] &= position < live;
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int word = start + u * kWarps;
        const uint32_t bits = __ballot_sync(~0u, keep[u] && word * 32 + lane < slot_count);
        if (lane == 0 && word < word_count) chosen()[word] = bits;
      }
    }
    __syncthreads();
    int count = 0;
#pragma unroll 1
    for (int start = 0; start < word_count; start += kThreads) {
      const int word = start + tid();
      uint32_t bits = word < word_count ? chosen()[word] : 0, total;
      int to = count + block_exclusive_scan<uint32_t>(__popc(bits), s.scan_totals_small, total);
      count += total;
#pragma unroll 1
      for (; bits != 0; bits &= bits - 1) kept()[to++] = word * 32 + __ffs(bits) - 1;
    }
    if (tid() == 0) s.published_kept = count;
  }

  // Survivors before each block; returns their number.
  __device__ int share_survivors() {
    cluster.sync();
    if (warp == 0) {
      const int count = lane < cluster.size ? cluster.read(&s.published_kept, lane) : 0;
      const int through = warp_inclusive_scan(count);
      if (lane <= kMaxClusterSize) s.kept_first[lane] = through - count;
    }
    __syncthreads();
    return s.kept_first[kMaxClusterSize];
  }

  __device__ __forceinline__ uint2 survivor(int position) {
    int owner = 0;
#pragma unroll 1
    while (s.kept_first[owner + 1] <= position) ++owner;
    const int slot = cluster.read(kept() + (position - s.kept_first[owner]), owner);
    return entry_of(cluster.read(candidates() + (slot >> unit_shift), owner), slot);
  }

  // Exact attention over `count` entries from `start`, by tiles of 16 a warp; leaves the block's partial result
  // published.
  __device__ void attend(bool survivors, int start, int count) {
    constexpr int kLanesPerRow = D / 8;
    constexpr int kRowsPerLoad = 32 / kLanesPerRow;
    constexpr int kLoads = kTileTokens / kRowsPerLoad;
    constexpr int kChunks = D / 32;
    float peak[2] = {kEmptyPeak, kEmptyPeak}, z[2] = {};
    float o[RP][8] = {};
    const T* k_cache = static_cast<const T*>(p.k_cache);
    const T* v_cache = static_cast<const T*>(p.v_cache);
#pragma unroll 1
    for (int base = warp * kTileTokens; base < count; base += kWarps * kTileTokens) {
      uint2 entry = make_uint2(0, INT32_MAX);
      if (lane < kTileTokens && base + lane < count) {
        entry = survivors ? survivor(start + base + lane) : resolve(start + base + lane);
      }
      const uint32_t row0 = __shfl_sync(~0u, entry.x, g), row1 = __shfl_sync(~0u, entry.x, g + 8);
      const int position[2] = {static_cast<int>(__shfl_sync(~0u, entry.y, g)),
                               static_cast<int>(__shfl_sync(~0u, entry.y, g + 8))};
      uint4 k0[kChunks], k1[kChunks];
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        k0[j] = load_stream(k_cache + static_cast<int64_t>(row0) * D + 8 * (4 * j + t));
        k1[j] = load_stream(k_cache + static_cast<int64_t>(row1) * D + 8 * (4 * j + t));
      }
      float acc[4] = {};
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const uint4 q = g < RP ? s.q_rows[g % RP][4 * j + t] : make_uint4(0, 0, 0, 0);
        mma(acc, k0[j].x, k1[j].x, k0[j].y, k1[j].y, q.x, q.y, T());
        mma(acc, k0[j].z, k1[j].z, k0[j].w, k1[j].w, q.z, q.w, T());
      }
      uint4 v[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int slot = i * kRowsPerLoad + lane / kLanesPerRow;
        const uint32_t row = __shfl_sync(~0u, entry.x, slot);
        const bool there = static_cast<int>(__shfl_sync(~0u, entry.y, slot)) < live;
        v[i] = there ? load_stream(v_cache + static_cast<int64_t>(row) * D + 8 * (lane % kLanesPerRow))
                     : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int row = 2 * t + k;
        const int horizon = live - p.query_tokens + row / p.group_size;
        float logit[2], top = peak[k];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          logit[half] = position[half] <= horizon && row < RP ? acc[2 * half + k] * log2_scale() : -infinity();
          top = fmaxf(top, logit[half]);
        }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 4));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 8));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
        const float scale = exp2_fast(peak[k] - top);
        const float w0 = exp2_fast(logit[0] - top), w1 = exp2_fast(logit[1] - top);
        z[k] = z[k] * scale + w0 + w1;
        peak[k] = top;
        if (row < RP) {
          s.tile_weights[warp][g][row] = w0;
          s.tile_weights[warp][g + 8][row] = w1;
          if (g == 0) s.rescale[warp][row] = scale;
        }
      }
      __syncwarp();
#pragma unroll
      for (int r = 0; r < RP; ++r) {
        const float scale = s.rescale[warp][r];
#pragma unroll
        for (int e = 0; e < 8; ++e) o[r][e] *= scale;
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const uint32_t packed[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
        const float* weights = s.tile_weights[warp][i * kRowsPerLoad + lane / kLanesPerRow];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 x = unpack2(packed[e], T());
#pragma unroll
          for (int r = 0; r < RP; ++r) {
            o[r][2 * e] = fmaf(weights[r], x.x, o[r][2 * e]);
            o[r][2 * e + 1] = fmaf(weights[r], x.y, o[r][2 * e + 1]);
          }
        }
      }
      __syncwarp();
    }
#pragma unroll
    for (int r = 0; r < RP; ++r) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        o[r][e] += __shfl_xor_sync(~0u, o[r][e], 16);
        if (kRowsPerLoad == 4) o[r][e] += __shfl_xor_sync(~0u, o[r][e], 8);
      }
    }
    if (lane < kLanesPerRow) {
#pragma unroll
      for (int r = 0; r < RP; ++r) {
        float4* to = reinterpret_cast<float4*>(&warp_rows()[(warp * RP + r) * D + 8 * lane]);
        to[0] = make_float4(o[r][0], o[r][1], o[r][2], o[r][3]);
        to[1] = make_float4(o[r][4], o[r][5], o[r][6], o[r][7]);
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      z[k] += __shfl_xor_sync(~0u, z[k], 4);
      z[k] += __shfl_xor_sync(~0u, z[k], 8);
      z[k] += __shfl_xor_sync(~0u, z[k], 16);
      if (g == 0 && 2 * t + k < RP) s.warp_stat[warp][2 * t + k] = make_float2(peak[k], z[k]);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = tid(); i < RP * D; i += kThreads) {
      const int row = i / D;
      float top = kEmptyPeak, sum = 0.0f, z_all = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) top = fmaxf(top, s.warp_stat[w][row].x);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float scale = exp2_fast(s.warp_stat[w][row].x - top);
        sum += scale * warp_rows()[w * RP * D + i];
        z_all += scale * s.warp_stat[w][row].y;
      }
      s.out_rows[row][i % D] = sum;
      if (i % D == 0) s.out_stat[row] = make_float2(top, z_all);
    }
  }

  // Adds up the blocks' partial results; each block writes its share of the output.
  __device__ void write_output() {
    cluster.sync();
    float* factors = warp_rows();  // [RP][kMaxClusterSize]
    if (warp < RP) {
      const SoftmaxSum all = merge_cluster(s.out_stat, warp);
      const float top = __shfl_sync(~0u, all.peak, 0), z = __shfl_sync(~0u, all.z, 0);
      if (lane < cluster.size) {
        const float scale = exp2_fast(cluster.read(&s.out_stat[warp], lane).x - top);
        factors[warp * kMaxClusterSize + lane] = z == 0.0f ? 0.0f : scale / z;
      }
      if (lane == 0 && cluster.rank == 0 && warp < rows) {
        const float lse = top == infinity() ? top : (top + log2f(z)) * kLn2;
        p.lse[out_row(warp)] = z == 0.0f ? -infinity() : lse;
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = cluster.rank * kThreads + tid(); i < rows * D; i += cluster.size * kThreads) {
      const int row = i / D;
      float sum = 0.0f;
#pragma unroll 4
      for (int c = 0; c < cluster.size; ++c) {
        sum += factors[row * kMaxClusterSize + c] * cluster.read(&s.out_rows[row][i % D], c);
      }
      store(static_cast<T*>(p.out) + out_row(row) * D + i % D, sum);
    }
  }

  __device__ __forceinline__ int64_t out_row(int row) const {
    const int token = row / p.group_size, group = row % p.group_size;
    return (static_cast<int64_t>(sequence) * p.query_tokens + token) * p.kv_heads * p.group_size + head * p.group_size +
           group;
  }

  // Positions of this block's entries at their place in the list of all; the cluster pads the rest.
  __device__ void write_kept(bool survivors, int start, int count, int list_start, int total) {
    const int capacity = p.max_pages << p.log2_page_size;
    int* list = p.kept_indices + (static_cast<int64_t>(sequence) * p.kv_heads + head) * capacity;
#pragma unroll 1
    for (int i = tid(); i < count; i += kThreads) {
      const int position = survivors ? survivor(start + i).y : resolve(start + i).y;
      if (position < live) list[list_start + i] = position;
    }
#pragma unroll 1
    for (int i = total + cluster.rank * kThreads + tid(); i < capacity; i += cluster.size * kThreads) list[i] = -1;
    if (cluster.rank == 0 && tid() == 0) p.kept_counts[sequence * p.kv_heads + head] = total;
  }

  // capacity.h's histogram_bin, on the device.
  __device__ static int budget_bin(int tokens) {
    if (tokens < 16) return tokens;
    const int octave = 31 - __clz(tokens);
    return min(static_cast<int>(kHistogramBins) - 1, 16 + (octave - 4) * 8 + ((tokens >> (octave - 3)) & 7));
  }

  __device__ void count_budget(int candidate_tokens, int kept_tokens, bool estimated) {
    double mass = 1.0;
    if (estimated) {
      mass = 0.0;
#pragma unroll 1
      for (int r = 0; r < rows; ++r) mass += static_cast<double>(s.captured[r]);
      mass /= rows;
    }
    unsigned long long* row = p.budget_counters + head * kCounterColumns;
    atomicAdd(row + kCounterRows, 1ull);
    atomicAdd(row + kCounterLive, static_cast<unsigned long long>(live));
    atomicAdd(row + kCounterCandidates, static_cast<unsigned long long>(candidate_tokens));
    atomicAdd(row + kCounterKept, static_cast<unsigned long long>(kept_tokens));
    atomicAdd(row + kCounterMass, static_cast<unsigned long long>(rint(mass * 1048576.0)));
    atomicAdd(row + kCounterHeader + budget_bin(candidate_tokens), 1ull);
    atomicAdd(row + kCounterHeader + kHistogramBins + budget_bin(kept_tokens), 1ull);
  }

  __device__ void write_empty() {
    if (cluster.rank != 0) return;
#pragma unroll 1
    for (int i = tid(); i < rows * D; i += kThreads) {
      store(static_cast<T*>(p.out) + out_row(i / D) * D + i % D, 0.0f);
    }
    if (tid() < rows) p.lse[out_row(tid())] = -infinity();
  }

  __device__ int wanted_items(int items) const {
    int64_t budget = p.head_token_budget ? max(p.head_token_budget[head], 0)
                                         : max(static_cast<int64_t>(p.token_budget),
                                               static_cast<int64_t>(ceil(live * p.budget_fraction)));
    const int newest = max(live - max(p.recent_tokens, p.query_tokens), 0);
    int64_t forced;
    if (kByPage) {
      budget = (budget + page_size() - 1) >> p.log2_page_size;
      const int64_t sinks = (static_cast<int64_t>(p.sink_tokens) + page_size() - 1) >> p.log2_page_size;
      forced = sinks + items - (newest >> p.log2_page_size);
    } else {
      forced = static_cast<int64_t>(p.sink_tokens) + live - newest;
    }
    return static_cast<int>(
        min(min(max(budget, forced), static_cast<int64_t>(items)), static_cast<int64_t>(p.capacity)));
  }

  __device__ void run() {
    if (live == 0) {
      write_empty();
      if (p.kept_indices != nullptr) write_kept(false, 0, 0, 0, 0);
      return;
    }
    const bool dense = p.selector == FusedSelector::kDense || live <= p.dense_below || (!kSelects && !p.prunes);
    const bool selects = kSelects && !dense;
    const bool by_page = selects && kByPage;
    const int prefix = p.prefix_channels == nullptr ? D : min(max(p.prefix_channels[head], 0), D) & ~7;
    lead_words = prefix / 8;
    const int items = by_page ? blocks_of(page_size(), live) : live;
    const int share = by_page ? share_of_pages(items, cluster.size) : share_of_tokens(items, cluster.size);
    first = cluster.rank * share;
    owned = min(max(items - first, 0), share);
    const int wanted = selects ? wanted_items(items) : items;
    const bool scores_items = wanted < items;
    unit_shift = p.log2_page_size;
    slot_count = owned;
    int slot_share = share, total_slots = items;
    if (!selects) list_pages(first >> p.log2_page_size, blocks_of(page_size(), owned));
    load_query(!dense, scores_items, prefix);
    if (selects) {
      const int candidate_share = blocks_of(cluster.size, wanted);
      const int begin = cluster.rank * candidate_share;
      const int mine = min(max(wanted - begin, 0), candidate_share);
      if (!kByPage) unit_shift = 0;
      slot_count = mine << unit_shift;
      slot_share = candidate_share << unit_shift;
      total_slots = wanted << unit_shift;
      if (scores_items) {
        if (kByPage) {
          score_pages();
        } else {
          score_tokens(false);
        }
        cluster.sync();
        read_norms(s.score_stat, s.score_norm);
        if (kTwoPasses) score_tokens(true);
        select(wanted);
        cluster.sync();
      } else if (kByPage) {
        list_pages(begin, mine);
        __syncthreads();
      } else {
#pragma unroll 1
        for (int i = begin + tid(); i < begin + mine; i += kThreads) {
          const uint32_t row = (page_block(i >> p.log2_page_size) << p.log2_page_size) + slot_in_page(i);
          candidates()[i - begin] = make_uint2(row, i);
        }
        __syncthreads();
      }
    }
    // The page of the newest token is always a candidate: the tokens it lacks are not.
    const int missing = by_page ? items * page_size() - live : 0;
    const int candidate_tokens = total_slots - missing;

    int kept_tokens = candidate_tokens;
    const bool estimated = p.prunes && !dense;
    int start = 0, count = slot_count, list_start = cluster.rank * slot_share;
    if (estimated) {
      if (kSelector != FusedSelector::kShadowPrefix && prefix == D) {
        estimate<true>();
      } else {
        estimate<false>();
      }
      cluster.sync();
      read_norms(s.weight_stat, s.weight_norm);
      list_weights(total_slots);
      cluster.sync();
      for (int row = cluster.rank; row < rows; row += cluster.size) solve_row(row, slot_share, total_slots);
      cluster.sync();
      list_survivors();
      kept_tokens = share_survivors();
      const int even = blocks_of(cluster.size, kept_tokens);
      start = list_start = cluster.rank * even;
      count = min(max(kept_tokens - start, 0), even);
    }
    attend(estimated, start, count);
    write_output();
    if (p.kept_indices != nullptr) write_kept(estimated, start, count, list_start, kept_tokens);
    if (p.budget_counters != nullptr && cluster.rank == 0 && tid() == 0) {
      count_budget(candidate_tokens, kept_tokens, estimated);
    }
    if (cluster.size > 1) cluster.sync();  // peers may still read this block's shared memory
  }
};

// Blocks a multiprocessor, which caps the registers. Quest with one row is the only selector of which shared memory admits three at 32k
// tokens (H200, 32/32 heads, B 64: 0.93 ms); elsewhere a tighter cap would only spill.
template <int RP, FusedSelector kSelector>
constexpr int kMinBlocks = RP == 8                                         ? 1
                           : RP == 1 && kSelector == FusedSelector::kQuest ? 3
                                                                           : 2;

template <typename T, int D, int RP, FusedSelector kSelector>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<RP, kSelector>))
    fused_decode_kernel(const __grid_constant__ FusedParams p) {
  FusedDecode<T, D, RP, kSelector>(p).run();
}

}  // namespace
}  // namespace twilight
