// One launch a layer: candidate scores, exact top-k, 4-bit estimate, exact top-p, attention on the survivors, merge.
//
// Grid: a cluster of C blocks a (sequence, KV head). Each block owns an even share of the sequence while scoring. Of
// the candidates while estimating and of the survivors while attending it owns an even share too, handed over through
// distributed shared memory, or what its own tokens gave (FusedParams::evens_out).
#pragma once

#include <algorithm>

#include "capacity.h"
#include "fused_primitives.cuh"

namespace twilight {

enum class FusedSelector : int { kDense, kFull, kQuest, kShadowPrefix };

constexpr int kTileTokens = 16;       // rows of one tensor-core product
constexpr int kBlockTokens = 128;     // a block's share of a sequence is a multiple of this
constexpr int kScoreBins = 2048;      // of candidate scores
constexpr int kMassBins = 1024;       // of estimated weights, where a row is solved from all of them
constexpr int kBoundaryList = 256;    // keys that share the threshold's bin and are ranked one by one
constexpr int kScratchLists = 8192;   // bytes before the lists in scratch: the histograms
constexpr int kUnsharedSlots = 1024;  // a block with so few slots attends to its own survivors: evening out costs more
constexpr int kMaxClusterSize = 16;
constexpr int kStreamSlots = 3;                      // tiles of keys or of values that a warp holds or has on their way
constexpr int kMaxParts = kMaxClusterSize * kWarps;  // listing warps of a cluster

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
  // Whether blocks hand each other even shares of the candidates, and of long lists of survivors. A grid of one block a
  // multiprocessor keeps its own where they fit: an even share is not worth the barrier there.
  int evens_out;
  // Shared memory, bytes from the start of the dynamic part and elements.
  int scratch_at, pages_at, candidates_at, bitmap_at, state_at;
  int bitmap_words, slot_capacity;
  int list_capacity;  // weights a block lists for the rows it solves; a row with more is solved from all
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
  // Partial results that the cluster's blocks leave for the outputs written here: [blocks][RP * D / blocks].
  float out_parts[RP * D];
  float2 out_stat[kMaxClusterSize][RP];
  float2 warp_stat[kWarps][RP];
  float2 score_stat[RP], weight_stat[RP];
  float score_norm[RP], weight_norm[RP];
  float gain[RP], q_sum[RP], q_sum_prefix[RP];
  float threshold[RP], captured[RP];
  alignas(16) float rescale[kWarps][RP];
  unsigned long long scan_totals[kWarps];
  // What every listing warp of the cluster found for the rows solved here.
  unsigned long long part_mass[kMaxParts];
  int part_size[kMaxParts];
  int horizon[RP];    // the last position a row sees
  bool from_all[RP];  // rows whose lists do not settle them
  uint32_t found_size[RP];
  uint32_t scan_totals_small[kWarps];
  uint32_t group_counts[64];  // this block's histogram by groups of 32 bins; read by the cluster
  uint32_t group_total[64];
  uint32_t published_above, published_boundary;  // items above the boundary and inside it; read by the cluster
  uint32_t local_boundary;
  int bin, in_bin, need;
  uint32_t boundary_key, ties_needed;
  uint32_t rank_greater[kMaxClusterSize], rank_equal[kMaxClusterSize];
  int rank_first[kMaxClusterSize + 1];  // candidates before each block
  int rank_ties[kMaxClusterSize];
  int rank_offset[kMaxClusterSize + 1];
  int published_slots;              // read by the cluster
  int kept_count[kMaxClusterSize];  // of every block
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
    return padded_rows == 1   ? checked_bytes<64, 1, 3984>()
           : padded_rows == 4 ? checked_bytes<64, 4, 7104>()
                              : checked_bytes<64, 8, 11280>();
  }
  return padded_rows == 1   ? checked_bytes<128, 1, 5008>()
         : padded_rows == 4 ? checked_bytes<128, 4, 10432>()
                            : checked_bytes<128, 8, 17680>();
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
  const int own_candidates = !by_page && !by_token ? 0
                             : p.evens_out         ? blocks_of(cluster_size, p.capacity)
                                                   : std::min(own_items, p.capacity);
  const int slots = by_page ? own_candidates * page_size : by_token ? own_candidates : own_tokens;
  p.slot_capacity = p.prunes ? round_up(slots, 4) : 0;
  // Of 16,384 candidates about 1,700 weights a row are listed, by up to 32 warps and not evenly.
  const int candidate_tokens = by_page ? p.capacity * page_size : by_token ? p.capacity : max_tokens;
  p.list_capacity = padded_rows > 1 && candidate_tokens > 8192 ? 4096 : 2048;
  p.bitmap_words = std::max({blocks_of(32, own_items), blocks_of(32, p.slot_capacity), kBoundaryList / 2});

  int end = fused_shared_bytes(head_dim, padded_rows);
  const auto take = [&](int bytes) {
    const int at = round_up(end, 16);
    end = at + bytes;
    return at;
  };
  end = round_up(end, 128);  // streamed tiles: lines of global memory become whole lines here
  p.scratch_at = take(std::max(kScratchLists + p.list_capacity * 4, kWarps * padded_rows * head_dim * 4));
  const int listed_tokens = p.selector == FusedSelector::kFull ? max_tokens : 0;
  p.pages_at = take(by_page ? own_pages * 4 : by_token ? own_tokens / kTileTokens * 4 : 0);
  p.candidates_at = take(std::max(own_candidates, share_of_tokens(listed_tokens, cluster_size) / page_size) * 8);
  p.bitmap_at = take(p.bitmap_words * 2 * 4);
  const int score_stride = by_token ? blocks_of(2, padded_rows) : padded_rows;
  p.state_at = take(std::max(own_items * score_stride, p.slot_capacity * padded_rows) * 4);

  // A dense row streams its pages through all of this.
  if (p.dense_below > 0 || (!by_page && !by_token && !p.prunes)) {
    end = std::max(end, p.scratch_at + kStreamSlots * kWarps * kTileTokens * head_dim * 2);
  }
  return end;
}

namespace {

using ScoreBins = FloatBins<79, kScoreBins - 1>;   // full resolution down to 2^-48 of the largest possible score
using WeightBins = FloatBins<100, kMassBins - 1>;  // down to 2^-27; 1.0 lands in bin 964

#ifdef __CUDACC__
extern __shared__ __align__(16) char dynamic_shared[];
#endif

template <typename T, int D, int RP, FusedSelector kSelector>
struct FusedDecode {
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
  // Of this block's share: page * kv_heads + head of every page, or the first row of every tile of 16 tokens.
  __device__ __forceinline__ uint32_t* pages() const { return part<uint32_t>(p.pages_at); }
  __device__ __forceinline__ uint32_t* tiles() const { return part<uint32_t>(p.pages_at); }
  // (first row, first position) of every 2^unit_shift slots.
  __device__ __forceinline__ uint2* candidates() const { return part<uint2>(p.candidates_at); }
  // Bitmaps: of items (above the boundary, inside it), later of survivors.
  __device__ __forceinline__ uint2* marks() const { return part<uint2>(p.bitmap_at); }
  __device__ __forceinline__ uint32_t* chosen() const { return part<uint32_t>(p.bitmap_at); }
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
      // Entries behind the last repeat it, so that whole tiles, or whole steps of a warp, can be read.
      const int filled = kByPage ? round_up(owned, kTileTokens) : round_up(owned, kBlockTokens) / kTileTokens;
#pragma unroll 1
      for (int i = tid(); i < filled; i += kThreads) {
        if (kByPage) {
          pages()[i] = page_block(first + min(i, owned - 1));
        } else {
          const int token = first + (min(i * kTileTokens, owned - 1) & -kTileTokens);
          tiles()[i] = (page_block(token >> p.log2_page_size) << p.log2_page_size) + slot_in_page(token);
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

  // One block's softmax sums, two columns a thread, into `published`.
  __device__ void publish_sums(SoftmaxSum (&sum)[2], float2* published) {
    constexpr int kNumColumns = RP == 1 ? 1 : 2;
    if (RP == 1) sum[0].merge(sum[1].peak, sum[1].z);
#pragma unroll
    for (int k = 0; k < kNumColumns; ++k) {
      sum[k].template merge_lanes<16, RP == 8 ? 4 : RP == 4 ? 2 : 1>();
      if (g == 0 && 2 * t + k < RP) s.warp_stat[warp][2 * t + k] = make_float2(sum[k].peak, sum[k].z);
    }
    __syncthreads();
    if (warp < RP) {
      SoftmaxSum all;
      if (lane < kWarps) {
        all.peak = s.warp_stat[lane][warp].x;
        all.z = s.warp_stat[lane][warp].y;
      }
      all.template merge_lanes<kWarps / 2, 1>();
      if (lane == 0) published[warp] = make_float2(all.peak, all.z);
    }
  }

  __device__ __forceinline__ SoftmaxSum merge_cluster(const float2* published, int row) {
    SoftmaxSum all;
    if (lane < cluster.size) {
      const float2 stat = cluster.read(published + row, lane);
      all.peak = stat.x;
      all.z = stat.y;
    }
    all.template merge_lanes<kMaxClusterSize / 2, 1>();
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

  // Row of one of this block's tokens; of the last tile's for tokens behind it.
  __device__ __forceinline__ uint32_t token_row(int token) const {
    return tiles()[token / kTileTokens] + token % kTileTokens;
  }

  static constexpr int kTiles = kBlockTokens / kTileTokens;
  static constexpr int kScales = RP == 1 ? 4 : 2;
  // Eight tiles of tokens share RP accumulators; this thread's columns are of tile tile_of(st, k) of accumulator st.
  __device__ __forceinline__ int tile_of(int st, int k) const {
    return st * kCopies + (RP == 1 ? 2 * t + k : 2 * t / RP);
  }

  // Four words a row of the leading codes of 128 tokens. A thread behind a row's last word reads that: its queries are
  // 0.
  __device__ __forceinline__ void load_tiles(uint32_t (&x)[kTiles], uint32_t (&y)[kTiles], int base, int w0) const {
    const uint32_t* codes =
        reinterpret_cast<const uint32_t*>(p.k_quant) + g * lead_words + min(w0 + t, max(lead_words, 1) - 1);
    const uint32_t* later = codes + 8 * lead_words;
    const uint32_t* tile = tiles() + base / kTileTokens;
#pragma unroll
    for (int u = 0; u < kTiles; ++u) {
      const uint32_t word = lead_word(tile[u]);
      x[u] = __ldg(codes + word);
      y[u] = __ldg(later + word);
    }
  }
  __device__ __forceinline__ void load_tile_scales(uint32_t (&packed)[RP][kScales], int base) const {
#pragma unroll
    for (int st = 0; st < RP; ++st) {
#pragma unroll
      for (int e = 0; e < kScales; e += 2) {
        const uint32_t row = tiles()[base / kTileTokens + tile_of(st, e >> 1)];
        const uint32_t* scale = reinterpret_cast<const uint32_t*>(p.k_scale) + g + row;
        packed[st][e] = __ldg(scale);
        packed[st][e + 1] = __ldg(scale + 8);
      }
    }
  }
  __device__ __forceinline__ uint4 queries_of(int w0) const {
    return w0 + t < lead_words ? s.q_codes[w0 + t][g % RP] : make_uint4(0, 0, 0, 0);
  }
  // Tiles whose columns end up in one accumulator are added in several: a chain of products waits for each other.
  static constexpr int kSums = RP == 1 ? 4 : RP;
  __device__ __forceinline__ void multiply_tiles(float (&acc)[kSums][4], const uint32_t (&x)[kTiles],
                                                 const uint32_t (&y)[kTiles], uint4 q) const {
#pragma unroll
    for (int u = 0; u < kTiles; ++u) {
      const bool mine = g / RP == u % kCopies;
      mma_codes4(acc[RP == 1 ? u % kSums : u / kCopies], x[u], y[u],
                 make_uint4(mine ? q.x : 0, mine ? q.y : 0, mine ? q.z : 0, mine ? q.w : 0));
    }
  }
  // Of a tile's columns only its own are not zero, so that sums of tiles add up.
  template <int kCount>
  __device__ __forceinline__ void fold(float (&acc)[kCount][4]) const {
#pragma unroll
    for (int i = 1; i < kCount; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[0][c] += acc[i][c];
    }
  }

  // Logits are summed up relative to a fixed power, which spares the search for their maximum. Sums too large or too
  // small for that are found out, and made again.
  static constexpr float kReference = 32.0f;
  static constexpr float kLevelsPerUnit = 256.0f;
  static constexpr uint32_t kLevelBits = 0x4b400000u;  // 1.5 * 2^23, to which levels of 16 bits are added
  static constexpr float kLowestLevel = -128.0f;
  __device__ __forceinline__ bool norms_usable() const {
    bool usable = true;
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
      const float norm = s.score_norm[r];
      usable &= norm > kReference - 60.0f && norm < infinity() && norm != 0.0f;
    }
    return usable;
  }

  // Keeps the logits of 128 tokens, and adds them to the sums.
  template <bool kWhole>
  __device__ __forceinline__ void keep_logits(const float (&acc)[kSums][4], const uint32_t (&packed)[RP][kScales],
                                              int base, const float (&gain)[2], const float (&zero_gain)[2],
                                              float (&z)[2], uint32_t& outside) {
    constexpr float kLevelOffset = 12582912.0f + (kReference - kLowestLevel) * kLevelsPerUnit;
    const int first_token = base + tile_of(0, 0) * kTileTokens + g;
    uint32_t* levels = part<uint32_t>(p.state_at) + first_token * kScoreStride + row_of_column(0) / 2;
#pragma unroll
    for (int st = 0; st < RP; ++st) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t level[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int token = base + tile_of(st, k) * kTileTokens + g + 8 * half;
          const float2 scale = scale_and_zero(packed[st][RP == 1 ? 2 * k + half : half]);
          const float zero = kLevels ? fmaf(scale.y, zero_gain[k], -kReference) : scale.y * zero_gain[k];
          const float logit = fmaf(acc[st][2 * half + k], scale.x * gain[k], zero);
          float x = kLevels ? logit : logit - kReference;
          if (!kWhole && token >= owned) x = kLowestLevel - kReference;
          z[k] += exp2_fast(x);
          if (kLevels) {
            level[k] = __float_as_uint(fmaf(x, kLevelsPerUnit, kLevelOffset));
            outside |= level[k] ^ kLevelBits;
          } else if (kWhole || token < owned) {
            scores()[token] = logit;
          }
        }
        const int behind = st * kCopies * kTileTokens + 8 * half;  // the first token
        if (kLevels && (kWhole || first_token + behind < owned)) {
          levels[behind * kScoreStride] = __byte_perm(level[0], level[1], 0x5410);
        }
      }
    }
  }

  // Logits of this block's tokens from the leading channels, and their softmax sums. A warp takes 128 tokens at a time,
  // eight tiles of 16, four words of a row a step; the loads of a step precede the sums of the step before it.
  __device__ void score_tokens() {
    float gain[2], zero_gain[2], z[2] = {};
    uint32_t outside = 0;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      gain[k] = s.gain[row_of_column(k)];
      zero_gain[k] = s.q_sum_prefix[row_of_column(k)];
    }
    uint32_t x[kTiles], y[kTiles], packed[RP][kScales];
    float acc[kSums][4];
    int base = 0, words = -1;  // of the step whose codes are in x and y; none yet
    int next = warp * kBlockTokens, next_words = 0;
#pragma unroll 1
    while (words < 0 || base < owned) {
      if (words == 0) {
#pragma unroll
        for (int i = 0; i < 4 * kSums; ++i) acc[i / 4][i % 4] = 0.0f;
      }
      if (words >= 0) multiply_tiles(acc, x, y, queries_of(words));
      if (next < owned) load_tiles(x, y, next, next_words);
      const bool done = words >= 0 && next_words == 0;
      if (done) {
        if (RP == 1) fold(acc);
        if (base + kBlockTokens <= owned) {
          keep_logits<true>(acc, packed, base, gain, zero_gain, z, outside);
        } else {
          keep_logits<false>(acc, packed, base, gain, zero_gain, z, outside);
        }
      }
      if (next < owned && next_words == 0) load_tile_scales(packed, next);
      base = next;
      words = next_words;
      next_words += 4;
      if (next_words >= lead_words) {
        next_words = 0;
        next += kWarps * kBlockTokens;
      }
    }
    SoftmaxSum sum[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      sum[k].peak = kReference;
      sum[k].z = kLevels && outside >> 16 != 0 ? __int_as_float(0x7fffffff) : z[k];
    }
    publish_sums(sum, s.score_stat);
  }

  // The same for logits of any size, from those kept of one row.
  __device__ void sum_kept_logits() {
    SoftmaxSum sum[2];
#pragma unroll 1
    for (int i = tid(); i < owned; i += kThreads) {
      const float value[1] = {finite_or_masked(scores()[i], true)};
      accumulate(sum[0], value);
    }
    publish_sums(sum, s.score_stat);
  }

  // The same for several rows in two passes over the leading codes: their sums, then the tokens' keys.
  __device__ void score_tokens_twice(bool makes_keys) {
    SoftmaxSum sum[2];
    float gain[2], zero_gain[2], norm[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      gain[k] = s.gain[row_of_column(k)];
      zero_gain[k] = s.q_sum_prefix[row_of_column(k)];
      norm[k] = s.score_norm[row_of_column(k)];
    }
    const int2 competing = competing_items();
#pragma unroll 1
    for (int base = warp * kBlockTokens; base < owned; base += kWarps * kBlockTokens) {
      uint32_t x[kTiles], y[kTiles], packed[RP][kScales];
      float acc[kSums][4] = {};
      load_tile_scales(packed, base);
#pragma unroll 1
      for (int w0 = 0; w0 < lead_words; w0 += 4) {
        load_tiles(x, y, base, w0);
        multiply_tiles(acc, x, y, queries_of(w0));
      }
#pragma unroll
      for (int st = 0; st < RP; ++st) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int token = base + tile_of(st, 0) * kTileTokens + g + 8 * half;
          const float2 scale = scale_and_zero(packed[st][half]);
          float logit[2];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            logit[k] = fmaf(acc[st][2 * half + k], scale.x * gain[k], scale.y * zero_gain[k]);
            const float value[1] = {finite_or_masked(logit[k], token < owned)};
            if (!makes_keys) accumulate(sum[k], value);
          }
          if (!makes_keys) continue;
          float score = exp2_fast(logit[0] - norm[0]) + exp2_fast(logit[1] - norm[1]);
#pragma unroll
          for (int mask = 1; mask < RP / 2; mask <<= 1) score += __shfl_xor_sync(~0u, score, mask);
          if (row_of_column(0) == 0 && token < owned) stored_key(token) = rank_key(score, token, competing);
        }
      }
    }
    if (!makes_keys) publish_sums(sum, s.score_stat);
  }

  // Score of one owned token, from its codes; four threads share it.
  __device__ float exact_score(int token) const {
    const uint32_t row = token_row(token), lead = lead_word(row);
    const uint32_t packed = load_scale(row);
    float acc[RP] = {};
#pragma unroll 1
    for (int w = t; w < lead_words; w += 4) {
      const uint32_t codes = load_codes(lead + w);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        // As mma_codes4 sees a code: odd ones 16-fold, which their queries make up for.
        const float code = static_cast<float>(codes >> (4 * n - (n & 1) * 4) & (n & 1 ? 0xf0u : 0xfu)) * 0x1p-24f;
#pragma unroll
        for (int r = 0; r < RP; ++r) {
          const __half* q = reinterpret_cast<const __half*>(&s.q_codes[w][r]);
          acc[r] = fmaf(code, __half2float(q[(n & 3) * 2 + n / 4]), acc[r]);
        }
      }
    }
    const float2 scale = scale_and_zero(packed);
    float score = 0.0f;
#pragma unroll
    for (int r = 0; r < RP; ++r) {
      acc[r] += __shfl_xor_sync(~0u, acc[r], 1);
      acc[r] += __shfl_xor_sync(~0u, acc[r], 2);
      const float logit = fmaf(acc[r], scale.x * s.gain[r], scale.y * s.q_sum_prefix[r]);
      score += exp2_fast(logit - s.score_norm[r]);
    }
    return score;
  }

  // Bounds are read in whole lines of 128 bytes, eight threads a line: half as many requests as of 64 bytes, which the
  // L2 cache serves no faster. So threads g and g ^ 1 share pages, each has the chunks of 16 bytes 8 l + 4 (g & 1) + t,
  // and the products of the two are added up. A tile of 16 pages is two products of 16 such halves of pages.
  static constexpr int kLines = D / 64;  // of a page
  struct PageBounds {
    uint4 chunks[2][2][kLines];  // of pages 8 m + 4 i + g / 2
    uint32_t scale[2];           // of pages 8 (g & 1) + 4 i + g / 2
  };
  __device__ __forceinline__ void load_bounds(PageBounds& page, int base) const {
    const uint4* bounds = reinterpret_cast<const uint4*>(p.page_bounds) + 4 * (g & 1) + t;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t block = pages()[base + 8 * m + 4 * i + g / 2];
#pragma unroll
        for (int l = 0; l < kLines; ++l) page.chunks[m][i][l] = load_stream(bounds + block * (D / 8) + 8 * l);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t block = pages()[base + 8 * (g & 1) + 4 * i + g / 2];
      page.scale[i] = __ldg(reinterpret_cast<const uint32_t*>(p.bounds_scale) + block);
    }
  }

  // Scores of this block's pages from their 8-bit bounds; a warp takes 16 pages at a time, and loads the next 16 before
  // it adds up these. Eight columns hold the queries of both halves of a page, or one half of eight rows at a time.
  __device__ void score_pages() {
    constexpr int kPasses = RP == 8 ? 2 : 1;
    SoftmaxSum sum[2];
    PageBounds page;
    uint2 q[kPasses][kLines][4];
    float gain[2], zero_gain[2];
#pragma unroll
    for (int h = 0; h < kPasses; ++h) {
#pragma unroll
      for (int l = 0; l < kLines; ++l) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = RP == 8 ? h : g / 4, word = 4 * (8 * l + 4 * half + t) + i;
          q[h][l][i] = RP == 8 || g % 4 < RP ? s.q_bounds[bounds_place(word)][g % RP] : make_uint2(0, 0);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      gain[k] = s.gain[row_of_column(k)];
      zero_gain[k] = s.q_sum[row_of_column(k)];
    }
    const bool second = g & 1;
    const bool mine = RP == 8 || t / 2 == (g & 1);  // columns of this thread's half
    int base = warp * kTileTokens;
    if (base < owned) load_bounds(page, base);
#pragma unroll 1
    for (; base < owned; base += kWarps * kTileTokens) {
      float acc[2][kPasses][4] = {};
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int l = 0; l < kLines; ++l) {
          const uint4 x = page.chunks[m][0][l], y = page.chunks[m][1][l];
          const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int h = 0; h < kPasses; ++h) mma_codes8(acc[m][h], xs[i], ys[i], q[h][l][i]);
          }
        }
      }
      const uint32_t packed[2] = {page.scale[0], page.scale[1]};
      if (base + kWarps * kTileTokens < owned) load_bounds(page, base + kWarps * kTileTokens);
      float value[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 scale = scale_and_zero(packed[i]);
        const int item = base + 8 * (g & 1) + 4 * i + g / 2;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          // Of this thread's pages the half it has, of the other's that it has too.
          const int c = 2 * i + k;
          const float first_pages = RP == 8 && second ? acc[0][kPasses - 1][c] : acc[0][0][c];
          const float other_pages = RP == 8 && second ? acc[1][kPasses - 1][c] : acc[1][0][c];
          const float own = second ? other_pages : first_pages, others = second ? first_pages : other_pages;
          const float product = own + __shfl_xor_sync(~0u, others, RP == 8 ? 4 : 6);
          const bool valid = item < owned && mine && (2 * t + k) % (RP == 8 ? 8 : 4) < RP;
          const float logit = fmaf(scale.x, product * gain[k], scale.y * zero_gain[k]);
          value[k][i] = finite_or_masked(logit, valid);
          if (valid) scores()[item * RP + row_of_column(k)] = logit;
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
    const uint32_t key = min(__float_as_uint(score), kInfinityKey);  // NaNs too
    const uint32_t distance = item - competing.x, span = max(competing.y - competing.x, 0);
    return distance < span ? key : kForcedKey;
  }

  // Sortable score of one owned item: the sum over the rows of its softmax. It replaces the first of the item's logits.
  __device__ __forceinline__ uint32_t score_key(int item, int2 competing, const float (&lowered)[RP]) const {
    float score = 0.0f;
    if (kLevels) {
      const uint32_t* levels = part<uint32_t>(p.state_at) + item * kScoreStride;
#pragma unroll
      for (int i = 0; i < kScoreStride; i += 2) {
        const uint2 four = *reinterpret_cast<const uint2*>(levels + i);
        const uint32_t pair[2] = {four.x, four.y};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float level = __uint_as_float(__byte_perm(pair[r / 2], kLevelBits, r & 1 ? 0x7632 : 0x7610));
          score += exp2_fast(fmaf(level, 1.0f / kLevelsPerUnit, lowered[2 * i + r]));
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < RP; ++r) score += exp2_fast(scores()[item * RP + r] + lowered[r]);
    }
    return rank_key(score, item, competing);
  }

  __device__ __forceinline__ uint32_t& stored_key(int item) const {
    return reinterpret_cast<uint32_t*>(scores())[item * kScoreStride];
  }

  // Histogram of this block's keys, of which `makes_keys` makes those; all, or those in [low_key, low_key +
  // 2^log2_width).
  __device__ void count_keys(bool makes_keys, uint32_t low_key, int log2_width, int shift) {
    constexpr int kBatch = 4;  // loads in flight before the first atomic, which the compiler moves no load across
    const int2 competing = competing_items();
    float lowered[RP];  // what turns a logit into a log-weight
#pragma unroll
    for (int r = 0; r < RP; ++r) {
      lowered[r] = (kLevels ? kLowestLevel - 12582912.0f / kLevelsPerUnit : 0.0f) - s.score_norm[r];
    }
    const auto count = [&](int base, bool whole) {
      uint32_t key[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = base + u * kThreads;
        if (whole || item < owned) key[u] = makes_keys ? score_key(item, competing, lowered) : stored_key(item);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = base + u * kThreads;
        if (!whole && item >= owned) continue;
        if (makes_keys) stored_key(item) = key[u];
        if (log2_width == 32) {
          atomicAdd(&histogram()[ScoreBins::of(key[u])], 1u);
        } else if ((key[u] - low_key) >> log2_width == 0) {
          atomicAdd(&histogram()[(key[u] - low_key) >> shift], 1u);
        }
      }
    };
    int base = tid();
#pragma unroll 1
    for (; base - tid() + kBatch * kThreads <= owned; base += kBatch * kThreads) count(base, true);
    if (base - tid() < owned) count(base, false);
  }

  // Bitmaps (above, inside) and numbers of this block's items above the boundary [low_key, low_key + width) and inside
  // it; a `ranked` boundary is listed item by item.
  __device__ void mark_items(uint32_t low_key, uint32_t width, bool ranked) {
    constexpr int kBatch = 4;
    const uint32_t end_key = low_key + width;
    int above = 0, inside = 0;
    const auto mark = [&](int start, bool whole) {
      uint32_t key[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = (start + u * kWarps) * 32 + lane;
        key[u] = whole || item < owned ? stored_key(item) : 0u;
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int word = start + u * kWarps, item = word * 32 + lane;
        const bool is_above = key[u] >= end_key, is_inside = key[u] - low_key < width && (whole || item < owned);
        const uint32_t above_bits = __ballot_sync(~0u, is_above), inside_bits = __ballot_sync(~0u, is_inside);
        above += is_above;
        inside += is_inside;
        if (lane == 0 && (whole || word * 32 < owned)) marks()[word] = make_uint2(above_bits, inside_bits);
        if (ranked && inside_bits != 0) {
          const uint32_t at = is_inside ? atomicAdd(&s.local_boundary, 1u) : kBoundaryList;
          if (at < kBoundaryList) boundary_keys()[at] = item;
        }
      }
    };
    int start = warp;
#pragma unroll 1
    for (; (start + (kBatch - 1) * kWarps + 1) * 32 <= owned; start += kBatch * kWarps) mark(start, true);
    if (start * 32 < owned) mark(start, false);
    above = warp_sum(above);
    inside = warp_sum(inside);
    if (lane == 0) {
      atomicAdd(&s.published_above, static_cast<uint32_t>(above));
      atomicAdd(&s.published_boundary, static_cast<uint32_t>(inside));
    }
    __syncthreads();
  }

  // Scores of the listed items: those kept, or, where these are only near, made again.
  __device__ void key_boundary(bool near) {
    const int count = min(static_cast<int>(s.local_boundary), kBoundaryList);
    const int2 competing = competing_items();
#pragma unroll 1
    for (int start = 0; start < count; start += kThreads / 4) {
      const int i = start + tid() / 4;
      const int item = i < count ? boundary_keys()[i] : 0;
      const uint32_t key = kLevels && near ? rank_key(exact_score(item), item, competing) : stored_key(item);
      __syncwarp();
      if (i < count && t == 0) boundary_keys()[i] = stored_key(item) = key;
    }
    __syncthreads();
  }

  // The bin of the cluster's histogram in which the `need` best items end: (bin, items in it, of which wanted).
  __device__ int3 find_bin(int need) {
    {
      const uint4* mine = reinterpret_cast<const uint4*>(histogram() + 8 * tid());
      const uint4 a = mine[0], b = mine[1];
      uint32_t count = a.x + a.y + a.z + a.w + b.x + b.y + b.z + b.w;
      count += __shfl_xor_sync(~0u, count, 1);
      count += __shfl_xor_sync(~0u, count, 2);
      if (t == 0) s.group_counts[tid() >> 2] = count;
    }
    cluster.sync();
    {
      // Four threads a group of bins, four blocks apart.
      uint32_t count = 0;
#pragma unroll 4
      for (int c = t; c < cluster.size; c += 4) count += cluster.read(&s.group_counts[tid() >> 2], c);
      count += __shfl_xor_sync(~0u, count, 1);
      count += __shfl_xor_sync(~0u, count, 2);
      if (t == 0) s.group_total[tid() >> 2] = count;
    }
    __syncthreads();
    if (warp == 0) {
      // Lane l looks at groups 63 - 2l and 62 - 2l, then at bin 31 - l of the group where the count passes `need`.
      const int high = s.group_total[63 - 2 * lane], low = s.group_total[62 - 2 * lane];
      int through = warp_inclusive_scan(high + low);
      const int owner = __ffs(__ballot_sync(~0u, through >= need)) - 1;
      const int before = __shfl_sync(~0u, through - high - low, owner);
      const int in_high = __shfl_sync(~0u, high, owner);
      const bool is_high = before + in_high >= need;
      const int group = 63 - 2 * owner - (is_high ? 0 : 1);
      int left = need - before - (is_high ? 0 : in_high), count = 0;
#pragma unroll 4
      for (int c = 0; c < cluster.size; ++c) count += cluster.read(&histogram()[group * 32 + 31 - lane], c);
      through = warp_inclusive_scan(count);
      const int pick = __ffs(__ballot_sync(~0u, through >= left)) - 1;
      left -= __shfl_sync(~0u, through - count, pick);
      if (lane == pick) s.in_bin = count;
      if (lane == 0) {
        s.bin = group * 32 + 31 - pick;
        s.need = left;
        s.local_boundary = s.published_above = s.published_boundary = 0;
      }
    }
    __syncthreads();
    return make_int3(s.bin, s.in_bin, s.need);
  }

  // The `wanted` best items of the cluster, ties to the lower index, dealt out evenly into `candidates`. The keys of
  // the first round are made from the logits, or stored already. Scores made from levels are only near the exact ones:
  // those that may end on either side of the boundary are made again; false where they are too many.
  __device__ bool select(int wanted, bool makes_keys, bool near) {
    uint32_t low_key = 0;
    int log2_width = 32, need = wanted, in_bin;
    for (;;) {
#pragma unroll 1
      for (int i = tid(); i < kScoreBins; i += kThreads) histogram()[i] = 0;
      __syncthreads();
      const int shift = max(0, log2_width - 11);
      count_keys(makes_keys && log2_width == 32, low_key, log2_width, shift);
      __syncthreads();
      const int3 found = find_bin(need);
      const bool first_round = log2_width == 32;
      in_bin = found.y;
      need = found.z;
      low_key = first_round ? ScoreBins::first_key(found.x) : low_key + (static_cast<uint32_t>(found.x) << shift);
      log2_width = first_round ? ScoreBins::log2_width(found.x) : shift;
      if (in_bin <= (near ? kBoundaryList / 2 : kBoundaryList) || need == in_bin || log2_width == 0) break;
      cluster.sync();  // the others still read this histogram
    }
    bool ranked = need < in_bin && in_bin <= kBoundaryList;
    uint32_t width = 1u << log2_width;
    if (near) {
      // A score is a level off at most, half for its logit's rounding and half for its norm's; twice that between two
      // scores, and some air.
      constexpr float kSlack = 2.6f * kLn2 / kLevelsPerUnit;
      ranked = low_key < kInfinityKey;  // forced items are all taken, and fill the last bin
      if (ranked) {
        const float low = __uint_as_float(low_key), end = __uint_as_float(low_key + width);
        low_key = __float_as_uint(low * (1.0f - kSlack));
        width = min(__float_as_uint(end * (1.0f + kSlack)) + 1, kInfinityKey) - low_key;
      }
    }
    mark_items(low_key, width, ranked);
    if (ranked) key_boundary(near);
    cluster.sync();
    if (!settle_boundary(ranked, low_key, wanted)) return false;
    deal_candidates(ranked, !ranked && (near || need == in_bin), wanted);
    return true;
  }

  // Turns the boundary lists of all blocks into one key, and into how many ties and how many items each block
  // contributes. False where the lists do not fit.
  __device__ bool settle_boundary(bool ranked, uint32_t low_key, int wanted) {
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
      const int need = wanted - warp_sum(above);
      if (lane == 0) {
        s.boundary_key = low_key;
        s.need = need;
        s.ties_needed = need;
      }
    }
    __syncthreads();
    const int need = s.need;
    if (ranked) {
      const int count = s.rank_offset[kMaxClusterSize];
      if (count > kBoundaryList) return false;
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
    return true;
  }

  // Sends the chosen items, in order, to the block whose even share they fall into, or keeps them. Of the items in the
  // boundary bin, those above the boundary key are chosen, and as many of its ties as this block's share; or all of
  // them.
  __device__ void deal_candidates(bool ranked, bool whole_bin, int wanted) {
    const int share = p.evens_out ? blocks_of(cluster.size, wanted) : INT32_MAX, word_count = blocks_of(32, owned);
    const uint32_t boundary = s.boundary_key;
    int ties_left = s.rank_ties[cluster.rank], position = p.evens_out ? s.rank_first[cluster.rank] : 0;
#pragma unroll 1
    for (int start = 0; start < word_count; start += kThreads) {
      const int word = start + tid();
      const uint2 marked = word < word_count ? marks()[word] : make_uint2(0, 0);
      uint32_t bits = marked.x, ties = marked.y;
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
      int owner = p.evens_out ? to / share : cluster.rank;
      if (p.evens_out) to -= owner * share;
#pragma unroll 1
      for (; bits != 0; bits &= bits - 1) {
        const int item = word * 32 + __ffs(bits) - 1;
        const uint32_t row = kByPage ? pages()[item] << p.log2_page_size : token_row(item);
        const int position = kByPage ? (first + item) << p.log2_page_size : first + item;
        cluster.write(&candidates()[to], owner, make_uint2(row, position));
        if (++to == share) {
          to = 0;
          ++owner;
        }
      }
    }
  }

  static constexpr int kEstimateTiles = 4;
  static constexpr int kChunks = D / 32;  // words of codes a row that one thread reads
  static constexpr int kEstimateColumns = kCopies < kEstimateTiles ? kCopies : kEstimateTiles;
  static constexpr int kEstimateSets = kEstimateTiles / kEstimateColumns;  // of tiles that share one accumulator
  // Candidates come by pages of whole tiles, or one by one.
  static constexpr bool kByTile = kSelector != FusedSelector::kShadowPrefix;
  // Of `at` items behind a tile of candidate slots, one of this block's; of the last one's behind that.
  __device__ __forceinline__ uint2 candidate(int tile, int at) const {
    if (!kByTile) return resolve(min(tile + at, slot_count - 1));
    const uint2 first_of_tile = resolve(min(tile, (slot_count - 1) & -kTileTokens));
    return make_uint2(first_of_tile.x + at, first_of_tile.y + at);
  }
  // Of a column of the products: the tile of four, the candidate in it.
  __device__ __forceinline__ int estimate_tile(int set, int k) const {
    return set * kEstimateColumns + (RP == 1 ? 2 * (t & 1) + k : 2 * t / RP);
  }
  // Codes of 64 candidate slots, of four tiles rows g and g + 8, and the scales of the slots whose products this thread
  // receives. With leading codes in whole quarters of a row a thread reads one quarter of each, else every fourth word.
  struct CandidateCodes {
    uint32_t words[kEstimateTiles][2][kChunks];
    uint32_t scale[kEstimateSets][kScales];
  };
  template <bool kQuarters>
  __device__ __forceinline__ void load_candidates(CandidateCodes& codes, int base) const {
    // A thread's first word is `begin` + slot in page * `stride` words behind the page's first.
    const bool leads = kChunks * t < lead_words;
    const int stride = leads ? lead_words : kWords - lead_words;
    const int begin = kChunks * t + (leads ? 0 : (page_size() - 1) * lead_words);
#pragma unroll
    for (int u = 0; u < kEstimateTiles; ++u) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t row = candidate(base + u * kTileTokens, g + 8 * half).x, slot = slot_in_page(row);
        uint32_t (&words)[kChunks] = codes.words[u][half];
        if (kQuarters) {
          const uint32_t* from =
              reinterpret_cast<const uint32_t*>(p.k_quant) + ((row - slot) * kWords + slot * stride + begin);
          if (kChunks == 4) {
            const uint4 v = load_stream(from);
            words[0] = v.x, words[1] = v.y;
            words[kChunks - 2] = v.z, words[kChunks - 1] = v.w;
          } else {
            const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
            words[0] = v.x, words[1] = v.y;
          }
        } else {
          const uint32_t lead = lead_word(row), rest = rest_word(row) - lead_words;
#pragma unroll
          for (int j = 0; j < kChunks; ++j) {
            const int word = 4 * j + t;
            words[j] = load_codes((word < lead_words ? lead : rest) + word);
          }
        }
      }
    }
#pragma unroll
    for (int set = 0; set < kEstimateSets; ++set) {
#pragma unroll
      for (int e = 0; e < kScales; ++e) {
        codes.scale[set][e] = load_scale(candidate(base + estimate_tile(set, e >> 1) * kTileTokens, g + 8 * (e & 1)).x);
      }
    }
  }

  // Base-2 logits of this block's candidate slots from all channels; a warp takes 64 slots at a time, four tiles of 16,
  // and loads the next 64 before it adds up these.
  template <bool kQuarters>
  __device__ void estimate() {
    constexpr int kEstimateSums = RP == 1 ? kEstimateTiles : kEstimateSets;
    constexpr int kStep = kWarps * kEstimateTiles * kTileTokens;
    SoftmaxSum sum[2];
    float gain[2], zero_gain[2];
    int horizon[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int row = row_of_column(k);
      gain[k] = s.gain[row];
      zero_gain[k] = s.q_sum[row];
      horizon[k] = s.horizon[row];
    }
    const bool column = RP > 1 || t < 2;
    CandidateCodes codes;
    int base = warp * kEstimateTiles * kTileTokens;
    if (base < slot_count) load_candidates<kQuarters>(codes, base);
#pragma unroll 1
    for (; base < slot_count; base += kStep) {
      float acc[kEstimateSums][4] = {};
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const uint4 q = s.q_codes[kQuarters ? kChunks * t + j : 4 * j + t][g % RP];
#pragma unroll
        for (int u = 0; u < kEstimateTiles; ++u) {
          const bool mine = g / RP == u % kEstimateColumns;
          mma_codes4(acc[u * kEstimateSums / kEstimateTiles], codes.words[u][0][j], codes.words[u][1][j],
                     make_uint4(mine ? q.x : 0, mine ? q.y : 0, mine ? q.z : 0, mine ? q.w : 0));
        }
      }
      uint32_t packed[kEstimateSets][kScales];
#pragma unroll
      for (int i = 0; i < kEstimateSets * kScales; ++i) {
        packed[i / kScales][i % kScales] = codes.scale[i / kScales][i % kScales];
      }
      if (base + kStep < slot_count) load_candidates<kQuarters>(codes, base + kStep);
      if (RP == 1) fold(acc);
      float value[2][2 * kEstimateSets];
#pragma unroll
      for (int set = 0; set < kEstimateSets; ++set) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int tile = base + estimate_tile(set, k) * kTileTokens, at = g + 8 * half;
            const float2 scale = scale_and_zero(packed[set][RP == 1 ? 2 * k + half : half]);
            const bool there = column && tile + at < slot_count;
            float logit = fmaf(scale.x, acc[set][2 * half + k] * gain[k], scale.y * zero_gain[k]);
            if (!there || static_cast<int>(candidate(tile, at).y) > horizon[k]) logit = -infinity();
            if (there) estimates()[row_of_column(k) * p.slot_capacity + tile + at] = logit;
            value[k][2 * set + half] = logit;
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

  // The mass of a weight, floor(w * 2^40), as its upper and its lower 20 bits: integers add up to the same in any
  // order.
  __device__ __forceinline__ uint2 split_mass(float w) const {
    const float high = fma_rz(w, 0x1p20f, 0x1p23f);
    const float low = fma_rz(fmaf(w, 0x1p20f, 0x1p23f - high), 0x1p20f, 0x1p23f);
    return make_uint2(__float_as_uint(high) - 0x4b000000u, __float_as_uint(low) - 0x4b000000u);
  }
  __device__ __forceinline__ unsigned long long joined_mass(uint2 mass) const {
    return (static_cast<unsigned long long>(mass.x) << 20) + mass.y;
  }
  __device__ __forceinline__ unsigned long long mass_of(float w) const { return joined_mass(split_mass(w)); }

  // Row r is solved by block r % cluster.size, as the (r / cluster.size)-th of its rows; kRowWarps warps of every block
  // list weights for it.
  static constexpr int kRowWarps = kWarps / RP;
  __device__ __forceinline__ int row_parts() const { return cluster.size * kRowWarps; }
  __device__ __forceinline__ int solved_rows() const { return blocks_of(cluster.size, RP); }
  __device__ __forceinline__ int part_capacity() const { return p.list_capacity / (solved_rows() * row_parts()); }

  // Adds up this block's masses, a warp one row, and sends the weights that can be thresholds to the row's solver. The
  // lists start at four times the floor, which leaves them short; should they not reach p, or not fit, the row is
  // solved from all estimates.
  __device__ void list_weights(int total_slots) {
    const int row = warp % RP, part = warp / RP, solver = row % cluster.size;
    const int index = (row / cluster.size * cluster.size + cluster.rank) * kRowWarps + part;
    const int capacity = part_capacity();
    const float norm = s.weight_norm[row];
    const float listed_from = row < rows ? 4.0f * floor_weight(row_top_p(row), total_slots) : 2.0f;  // above any weight
    const float* estimate = estimates() + row * p.slot_capacity;
    float* list = weight_list() + index * capacity;
    uint2 total = make_uint2(0, 0);
    int listed = 0;
    constexpr int kBatch = 4, kStep = 32 * kRowWarps;
#pragma unroll 1
    for (int base = part * 32 + lane; base - lane < slot_count; base += kBatch * kStep) {
      float w[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int slot = base + u * kStep;
        w[u] = slot < slot_count ? weight(estimate[slot], norm) : 0.0f;
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const uint2 mass = split_mass(w[u]);
        total.x += mass.x;
        total.y += mass.y;
        const bool matters = w[u] >= listed_from && base + u * kStep < slot_count;
        const uint32_t bits = __ballot_sync(~0u, matters);
        if (matters) {
          const int at = listed + __popc(bits & ((1u << lane) - 1));
          if (at < capacity) cluster.write(list + at, solver, w[u]);
        }
        listed += __popc(bits);
      }
    }
    const unsigned long long mass = warp_sum(joined_mass(total));
    if (lane == 0) {
      cluster.write(&s.part_mass[index], solver, mass);
      cluster.write(&s.part_size[index], solver, listed);
    }
  }

  // Bins of one row: an eighth of an octave each from 2^-31 up to 2, a quarter where a block solves eight rows.
  static constexpr int kLog2RowBins = RP == 8 ? 7 : 8;
  static constexpr int kRowBins = 1 << kLog2RowBins;
  static constexpr uint32_t kLowRowKey = 96u << 23;
  static_assert(RP * kRowBins * 8 <= kScratchLists || RP == 1, "bins of all rows of a block");
  __device__ __forceinline__ unsigned long long bin_mass(const uint32_t* bins, int bin) const {
    return joined_mass(*reinterpret_cast<const uint2*>(bins + 2 * bin));
  }

  // Shows `place` the listed weights of every `stride`-th part from `part`.
  template <typename Place>
  __device__ __forceinline__ void each_listed(int part, int end, int stride, const Place& place) const {
    const int capacity = part_capacity();
#pragma unroll 1
    for (; part < end; part += stride) {
      const int size = s.part_size[part];
#pragma unroll 1
      for (int i = lane; i < size; i += 32) place((weight_list() + part * capacity)[i]);
    }
  }

  // Thresholds of this block's rows: the largest weight whose mass, with everything above, reaches p. The block's warps
  // divide among its rows. Each round narrows a row down to one of its bins, then to 1/256 of that, until 32 lanes hold
  // what is left, or it is all the same.
  __device__ void solve_rows(int total_slots) {
    const int team = kWarps / solved_rows(), local = warp / team, member = warp - local * team;
    const int row = local * cluster.size + cluster.rank;
    const int first_part = local * row_parts(), end_part = first_part + row_parts();
    uint32_t* bins = histogram() + local * kRowBins * 2;  // upper and lower halves of each bin's mass
    uint32_t* found = chosen() + local * 32;              // the bitmaps are idle here
    unsigned long long total = 0;
    bool fits = true;
#pragma unroll 1
    for (int i = first_part + lane; i < end_part; i += 32) {
      total += s.part_mass[i];
      fits &= s.part_size[i] <= part_capacity();
    }
    total = warp_sum(total);
    fits = __all_sync(~0u, fits);
    unsigned long long need = 0;
    bool open = row < rows && total != 0 && !isnan(s.weight_norm[row % RP]);
    if (open) {
      const double top_p = row_top_p(row);
      open = top_p < 1.0;
      need = max(static_cast<unsigned long long>(ceil(top_p * static_cast<double>(total))), 1ull);
    }
    if (row < rows && member == 0) {
      if (!open) publish_threshold(row, 0.0f, 1.0f);
      if (lane == 0) s.from_all[row] = open && !fits;
    }
    open = open && fits;

    uint32_t low_key = kLowRowKey, width = 0;  // of the first round: all
    int shift = 28 - kLog2RowBins;
    unsigned long long above = 0;
    while (__syncthreads_or(open)) {
#pragma unroll 1
      for (int i = member * 32 + lane; i < kRowBins * 2; i += team * 32) bins[i] = 0;
      if (member == 0 && lane == 0) s.found_size[local] = 0;
      __syncthreads();
      if (open) {
        each_listed(first_part + member, end_part, team, [&](float w) {
          const uint32_t key = __float_as_uint(w);
          if (width != 0 && key - low_key >= width) return;
          const uint2 mass = split_mass(w);
          const uint32_t bin = width == 0 && key < low_key ? 0 : (key - low_key) >> shift;
          atomicAdd(&bins[2 * bin], mass.x);
          atomicAdd(&bins[2 * bin + 1], mass.y);
        });
      }
      __syncthreads();
      if (open) {
        // Every warp of the row finds the bin: lane l looks at the l-th share of them from above.
        constexpr int kShare = kRowBins / 32;
        unsigned long long part = 0;
#pragma unroll
        for (int i = 0; i < kShare; ++i) part += bin_mass(bins, kRowBins - 1 - kShare * lane - i);
        const unsigned long long before = above + warp_inclusive_scan(part) - part;
        const uint32_t reaches = __ballot_sync(~0u, before < need && before + part >= need);
        open = reaches != 0;
        if (!open && member == 0 && lane == 0) s.from_all[row] = true;
        if (open) {
          const int owner = __ffs(reaches) - 1;
          above = __shfl_sync(~0u, before, owner);
          int bin = kRowBins - 1 - kShare * owner;
#pragma unroll 1
          for (;; --bin) {
            const unsigned long long mass = bin_mass(bins, bin);
            if (above + mass >= need) break;
            above += mass;
          }
          const bool lowest = width == 0 && bin == 0;
          width = lowest ? low_key + (1u << shift) : 1u << shift;
          low_key = lowest ? 0 : low_key + (static_cast<uint32_t>(bin) << shift);
          shift = max(0, 32 - kLog2RowBins - __clz(width - 1));
          each_listed(first_part + member, end_part, team, [&](float w) {
            if (__float_as_uint(w) - low_key >= width) return;
            const uint32_t at = atomicAdd(&s.found_size[local], 1u);
            if (at < 32) found[at] = __float_as_uint(w);
          });
        }
      }
      __syncthreads();
      if (open) {
        const int count = s.found_size[local];
        open = count > 32 && width > 1;
        if (!open && member == 0) finish_row(row, low_key, count, found, above, need, total);
      }
    }
#pragma unroll 1
    for (int r = cluster.rank; r < rows; r += cluster.size) {
      if (s.from_all[r]) solve_row_from_all(r, total_slots);
    }
  }

  // One warp picks a row's threshold among `count` weights of which 32 are listed: more are all the same.
  __device__ void finish_row(int row, uint32_t low_key, int count, const uint32_t* found, unsigned long long above,
                             unsigned long long need, unsigned long long total) {
    if (count > 32) {
      above += count * mass_of(__uint_as_float(low_key));
    } else {
      const uint32_t key = lane < count ? found[lane] : 0;
      const unsigned long long mass = lane < count ? mass_of(__uint_as_float(key)) : 0;
      unsigned long long reached = above;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const unsigned long long other = __shfl_sync(~0u, mass, i);
        reached += __shfl_sync(~0u, key, i) >= key ? other : 0;
      }
      low_key = lane < count && reached >= need ? key : 0;
#pragma unroll
      for (int mask = 16; mask > 0; mask >>= 1) low_key = max(low_key, __shfl_xor_sync(~0u, low_key, mask));
      above = __shfl_sync(~0u, reached, __ffs(__ballot_sync(~0u, lane < count && key == low_key)) - 1);
    }
    publish_threshold(row, __uint_as_float(low_key),
                      static_cast<float>(static_cast<double>(above) / static_cast<double>(total)));
  }

  // The same from all estimates of the cluster, by the whole block.
  __device__ void solve_row_from_all(int row, int total_slots) {
    const float norm = s.weight_norm[row];
    const double top_p = row_top_p(row);
    const float floor = floor_weight(top_p, total_slots);
    const int parts = row_parts(), first_part = row / cluster.size * parts;
    unsigned long long total = 0;
    for (int i = 0; i < parts; ++i) total += s.part_mass[first_part + i];
    const unsigned long long need =
        max(static_cast<unsigned long long>(ceil(top_p * static_cast<double>(total))), 1ull);
    uint32_t low_key = 0;
    int log2_width = 32;
    unsigned long long above = 0;
    for (;;) {
#pragma unroll 1
      for (int i = tid(); i < kMassBins; i += kThreads) mass_histogram()[i] = 0;
      if (tid() == 0) s.local_boundary = 0;
      __syncthreads();
      const bool first_round = log2_width == 32;
      const int shift = max(0, log2_width - 10);
      // Of the first round every weight that can matter by its bin, then those of one bin, which are listed too.
#pragma unroll 1
      for (int owner = 0; owner < cluster.size; ++owner) {
        const int slots = cluster.read(&s.published_slots, owner);
#pragma unroll 1
        for (int i = tid(); i < slots; i += kThreads) {
          const float w = weight(cluster.read(estimates() + row * p.slot_capacity + i, owner), norm);
          const uint32_t key = __float_as_uint(w);
          if (first_round) {
            if (w >= floor) atomicAdd(&mass_histogram()[WeightBins::of(key)], mass_of(w));
          } else if (key >= low_key && (key - low_key) >> log2_width == 0) {
            const uint32_t at = atomicAdd(&s.local_boundary, 1u);
            if (at < kBoundaryList) boundary_list()[at] = w;
            atomicAdd(&mass_histogram()[(key - low_key) >> shift], mass_of(w));
          }
        }
      }
      __syncthreads();
      if (!first_round && (s.local_boundary <= kBoundaryList || log2_width == 0)) break;
      // Thread i adds up bins 1023 - 4i .. 1020 - 4i and finds the one where the mass passes `need`.
      unsigned long long bin_mass[4], part = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) part += bin_mass[i] = mass_histogram()[kMassBins - 1 - 4 * tid() - i];
      unsigned long long all;
      unsigned long long before = above + block_exclusive_scan(part, s.scan_totals, all);
      if (before < need && before + part >= need) {
        int i = 0;
        while (before + bin_mass[i] < need) before += bin_mass[i++];
        s.bin = kMassBins - 1 - 4 * tid() - i;
        s.mass_above = before;
      }
      __syncthreads();
      const int bin = s.bin;
      above = s.mass_above;
      low_key = first_round ? WeightBins::first_key(bin) : low_key + (static_cast<uint32_t>(bin) << shift);
      log2_width = first_round ? WeightBins::log2_width(bin) : shift;
      __syncthreads();
    }
    finish_row_from_all(row, low_key, above, need, total);
  }

  // Shares space with the bitmaps, which are idle while thresholds are sought.
  __device__ __forceinline__ float* boundary_list() { return reinterpret_cast<float*>(chosen()); }

  // All candidates for the threshold lie in one short list, or share one key.
  __device__ void finish_row_from_all(int row, uint32_t low_key, unsigned long long above, unsigned long long need,
                                      unsigned long long total) {
    const int count = s.local_boundary;
    if (tid() == 0) s.mass_key = 0;
    __syncthreads();
    if (count > kBoundaryList) {
      const unsigned long long mass =
          above + static_cast<unsigned long long>(count) * mass_of(__uint_as_float(low_key));
      if (warp == 0)
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
    if (warp == 0)
      publish_threshold(row, __uint_as_float(s.mass_key),
                        static_cast<float>(static_cast<double>(s.mass_captured) / static_cast<double>(total)));
    __syncthreads();
  }

  __device__ __forceinline__ void publish_threshold(int row, float threshold, float captured) {
    if (lane < cluster.size) {
      cluster.write(&s.threshold[row], lane, threshold);
      cluster.write(&s.captured[row], lane, captured);
    }
  }

  // Lists this block's survivors, slots whose weight reaches any row's threshold, sinks and recent tokens, and returns
  // how many they are.
  __device__ int list_survivors() {
    const int word_count = blocks_of(32, slot_count);
    constexpr int kBatch = 4;
    // A logit tells what its weight is: at least the threshold, below it, or so near that the weight itself must say.
    bool keeps_all = false;
    float low[RP], high[RP];
#pragma unroll
    for (int r = 0; r < RP; ++r) {
      const float norm = s.weight_norm[r], threshold = r < rows ? s.threshold[r] : 2.0f;  // no weight reaches 2
      const float logit = norm + __log2f(threshold), margin = 1e-4f + fabsf(norm) * 0x1p-21f;
      keeps_all |= threshold == 0.0f;
      low[r] = r < rows ? logit - margin : infinity();
      high[r] = r < rows ? logit + margin : infinity();
    }
#pragma unroll 1
    for (int start = warp; start < word_count; start += kBatch * kWarps) {
      bool keep[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int slot = min((start + u * kWarps) * 32 + lane, slot_count - 1);
        const int position = resolve(slot).y;
        bool near = false;
        keep[u] = keeps_all || position < p.sink_tokens || position >= live - p.recent_tokens;
#pragma unroll
        for (int r = 0; r < RP; ++r) {
          const float logit = estimates()[r * p.slot_capacity + slot];
          near |= logit >= low[r];
          keep[u] |= logit >= high[r];
        }
        if (near && !keep[u]) {
#pragma unroll 1
          for (int r = 0; r < rows; ++r) {
            keep[u] |= weight(estimates()[r * p.slot_capacity + slot], s.weight_norm[r]) >= s.threshold[r];
          }
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
      for (; bits != 0; bits &= bits - 1) {
        kept()[to++] = word * 32 + __ffs(bits) - 1;
      }
    }
    if (tid() < cluster.size) cluster.write(&s.kept_count[cluster.rank], tid(), count);
    __syncthreads();
    return count;
  }

  // Survivors before each block; returns how many there are in all.
  __device__ int count_survivors() {
    if (warp == 0) {
      const int count = lane < cluster.size ? s.kept_count[lane] : 0;
      const int through = warp_inclusive_scan(count);
      if (lane <= kMaxClusterSize) s.kept_first[lane] = through - count;
    }
    __syncthreads();
    return s.kept_first[kMaxClusterSize];
  }

  // What a block attends to: a run of its candidates or of the cluster's survivors, or whole pages as they stream in.
  enum class Entries { kCandidates, kOwnSurvivors, kSharedSurvivors, kStream };
  // (row, position) of one.
  __device__ __forceinline__ uint2 entry(Entries entries, int at) const {
    if (entries == Entries::kCandidates) return resolve(at);
    if (entries == Entries::kOwnSurvivors) return resolve(kept()[at]);
    int owner = 0;
#pragma unroll 1
    while (s.kept_first[owner + 1] <= at) ++owner;
    const int slot = cluster.read(kept() + (at - s.kept_first[owner]), owner);
    return entry_of(cluster.read(candidates() + (slot >> unit_shift), owner), slot);
  }

  // The tokens of a dense row come in tiles of 16, one after another to each warp: their keys, then their values, the
  // next two on their way while one is used.
  struct Stream {
    uint32_t rows;  // first rows of 32 of the warp's tiles, a lane each
    int started;    // tiles of keys and of values
    int slot;       // of the one that comes next
  };
  // 16 bytes of a tile. Their place in a row is permuted by row, so that no two of the eight threads that read at a
  // time meet in a bank, whether they read two rows of keys or four of values.
  __device__ __forceinline__ T* stream_place(int slot, int row, int chunk) const {
    const int place = chunk ^ (row & 6) ^ (row & 1) << 2;
    return part<T>(p.scratch_at) + ((slot * kWarps + warp) * kTileTokens + row) * D + place * 8;
  }
  __device__ __forceinline__ void start_next_tile(Stream& stream, int slot) {
    constexpr int kStep = kWarps * kTileTokens, kRowChunks = D / 8;
    const int tile = stream.started / 2, token = warp * kTileTokens + tile * kStep;  // of this block's
    if (token < owned) {
      if (stream.started % 64 == 0) {
        const int ahead = first + min(token + lane * kStep, owned - 1);
        stream.rows = (page_block(ahead >> p.log2_page_size) << p.log2_page_size) + slot_in_page(ahead & -kTileTokens);
      }
      const int row = lane / kRowChunks, chunk = lane % kRowChunks;
      const T* from = static_cast<const T*>(stream.started % 2 == 0 ? p.k_cache : p.v_cache) +
                      static_cast<int64_t>(__shfl_sync(~0u, stream.rows, tile % 32) + row) * D + chunk * 8;
#pragma unroll
      for (int i = 0; i < kTileTokens; i += 32 / kRowChunks) {
        start_copy(stream_place(slot, row + i, chunk), from + i * D, first + token + row + i < live);
      }
    }
    end_copies();
    ++stream.started;
  }
  __device__ __forceinline__ Stream begin_stream() {
    Stream stream = {};
#pragma unroll
    for (int slot = 0; slot < kStreamSlots; ++slot) start_next_tile(stream, slot);
    return stream;
  }
  // Once every lane has read what it needs of a tile, another takes its place.
  __device__ __forceinline__ void pass_tile(Stream& stream) {
    __syncwarp();
    start_next_tile(stream, stream.slot);
    stream.slot = stream.slot + 1 == kStreamSlots ? 0 : stream.slot + 1;
  }
  __device__ __forceinline__ void wait_for_tile() const {
    wait_copies<kStreamSlots - 1>();
    __syncwarp();
  }

  // Exact attention over `count` entries from `start`, or over what `stream` brings, by tiles of 16 a warp; hands every
  // block of the cluster its part of this one's result. Both products are of tokens or channels by query rows: a
  // thread's two columns are rows 2t and 2t + 1.
  template <bool kStreams>
  __device__ void attend(Entries entries, int start, int count, Stream stream) {
    constexpr int kQuarters = D / 32;  // loads of 8 channels a thread makes of a key
    constexpr int kHalves = D / 64;    // and of a value
    constexpr int kProducts = D / 16;
    float peak[2] = {kEmptyPeak, kEmptyPeak}, z[2] = {};
    float o[kProducts][4] = {};
#pragma unroll 1
    for (int base = warp * kTileTokens; base < count; base += kWarps * kTileTokens) {
      // Keys of tokens g and g + 8, values of 2t, 2t + 1, 2t + 8 and 2t + 9.
      uint4 keys[2][kQuarters], values[4][kHalves];
      int position[2];
      uint2 mine = make_uint2(0, INT32_MAX);  // (row, position) of the tile's token `lane`
      if (kStreams) {
        wait_for_tile();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          position[i] = first + base + g + 8 * i;
#pragma unroll
          for (int j = 0; j < kQuarters; ++j) {
            keys[i][j] = *reinterpret_cast<const uint4*>(stream_place(stream.slot, g + 8 * i, 4 * j + t));
          }
        }
        pass_tile(stream);
      } else {
        if (lane < kTileTokens && base + lane < count) mine = entry(entries, start + base + lane);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          position[i] = static_cast<int>(__shfl_sync(~0u, mine.y, g + 8 * i));
          const T* key =
              static_cast<const T*>(p.k_cache) + static_cast<int64_t>(__shfl_sync(~0u, mine.x, g + 8 * i)) * D;
#pragma unroll
          for (int j = 0; j < kQuarters; ++j) keys[i][j] = load_stream(key + 32 * j + 8 * t);
        }
      }
      float acc[4] = {};
#pragma unroll
      for (int j = 0; j < kQuarters; ++j) {
        const uint4 q = g < RP ? s.q_rows[g % RP][4 * j + t] : make_uint4(0, 0, 0, 0);
        mma(acc, keys[0][j].x, keys[1][j].x, keys[0][j].y, keys[1][j].y, q.x, q.y, T());
        mma(acc, keys[0][j].z, keys[1][j].z, keys[0][j].w, keys[1][j].w, q.z, q.w, T());
      }
      // There are no registers for keys and values at a time.
      if (!kStreams) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 2 * t + (i & 1) + 4 * (i & 2);
          const T* value = static_cast<const T*>(p.v_cache) + static_cast<int64_t>(__shfl_sync(~0u, mine.x, token)) * D;
          const bool there = static_cast<int>(__shfl_sync(~0u, mine.y, token)) < live;
#pragma unroll
          for (int j = 0; j < kHalves; ++j) {
            values[i][j] = there ? load_stream(value + 64 * j + 8 * g) : make_uint4(0, 0, 0, 0);
          }
        }
      }
      float weights[2][2], scale[2];  // of token g + 8 i and row 2t + k
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int row = 2 * t + k;
        const int horizon = row < RP ? s.horizon[row % RP] : -1;
        float logit[2], top = peak[k];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          logit[i] = position[i] <= horizon ? acc[2 * i + k] * log2_scale() : -infinity();
          top = fmaxf(top, logit[i]);
        }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 4));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 8));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
        scale[k] = exp2_fast(peak[k] - top);
        weights[0][k] = exp2_fast(logit[0] - top);
        weights[1][k] = exp2_fast(logit[1] - top);
        z[k] = z[k] * scale[k] + weights[0][k] + weights[1][k];
        peak[k] = top;
      }
      // Each weight as the sum of two of T, which keeps what rounding to one would lose.
      uint32_t upper[2], lower[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t packed = pack2(weights[i][0], weights[i][1], T());
        const float2 rounded = unpack2(packed, T());
        upper[i] = transpose8(packed);
        lower[i] = transpose8(pack2(weights[i][0] - rounded.x, weights[i][1] - rounded.y, T()));
      }
      if (kStreams) {
        wait_for_tile();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < kHalves; ++j) {
            const int token = 2 * t + (i & 1) + 4 * (i & 2);
            values[i][j] = *reinterpret_cast<const uint4*>(stream_place(stream.slot, token, 8 * j + g));
          }
        }
        pass_tile(stream);
      }
#pragma unroll
      for (int j = 0; j < kProducts; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) o[j][c] *= scale[c & 1];
        // Row g of product j is channel 8g + j; row g + 8 the same of the other half, or four channels further.
        const int e = kHalves == 2 ? j : j + 4, h = kHalves - 1;
        const uint32_t a0 = channel_pair(values[0][0], values[1][0], j),
                       a2 = channel_pair(values[2][0], values[3][0], j);
        const uint32_t a1 = channel_pair(values[0][h], values[1][h], e),
                       a3 = channel_pair(values[2][h], values[3][h], e);
        mma(o[j], a0, a1, a2, a3, upper[0], upper[1], T());
        mma(o[j], a0, a1, a2, a3, lower[0], lower[1], T());
      }
    }
    if (kStreams) __syncthreads();  // partial results take the place of the tiles
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int row = 2 * t + k;
      if (row < RP) {
        float4* to = reinterpret_cast<float4*>(&warp_rows()[(warp * RP + row) * D + 8 * g]);
        if (kHalves == 2) {
          to[0] = make_float4(o[0][k], o[1][k], o[2][k], o[3][k]);
          to[1] = make_float4(o[4 % kProducts][k], o[5 % kProducts][k], o[6 % kProducts][k], o[7 % kProducts][k]);
          to[16] = make_float4(o[0][2 + k], o[1][2 + k], o[2][2 + k], o[3][2 + k]);
          to[17] = make_float4(o[4 % kProducts][2 + k], o[5 % kProducts][2 + k], o[6 % kProducts][2 + k],
                               o[7 % kProducts][2 + k]);
        } else {
          to[0] = make_float4(o[0][k], o[1][k], o[2][k], o[3][k]);
          to[1] = make_float4(o[0][2 + k], o[1][2 + k], o[2][2 + k], o[3][2 + k]);
        }
      }
      z[k] += __shfl_xor_sync(~0u, z[k], 4);
      z[k] += __shfl_xor_sync(~0u, z[k], 8);
      z[k] += __shfl_xor_sync(~0u, z[k], 16);
      if (g == 0 && row < RP) s.warp_stat[warp][row] = make_float2(peak[k], z[k]);
    }
    __syncthreads();
    if (kStreams) cluster.started();
    if (warp < RP) {
      SoftmaxSum all;
      const float2 own = lane < kWarps ? s.warp_stat[lane][warp] : make_float2(kEmptyPeak, 0.0f);
      all.peak = own.x;
      all.z = own.y;
      all.template merge_lanes<kWarps / 2, 1>();
      all.peak = __shfl_sync(~0u, all.peak, 0);
      all.z = __shfl_sync(~0u, all.z, 0);
      if (lane < kWarps) s.rescale[lane][warp] = exp2_fast(own.x - all.peak);
      if (lane < cluster.size) {
        cluster.write(&s.out_stat[cluster.rank][warp], lane, make_float2(all.peak, all.z));
      }
    }
    __syncthreads();
    const int slice = RP * D / cluster.size;
#pragma unroll 1
    for (int i = tid(); i < RP * D; i += kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum = fmaf(s.rescale[w][i / D], warp_rows()[w * RP * D + i], sum);
      const int writer = i / slice;
      cluster.write(&s.out_parts[cluster.rank * slice + i - writer * slice], writer, sum);
    }
    cluster.sync();
  }

  // Adds up the blocks' partial results for this block's part of the output. From here on no block needs another's
  // shared memory.
  __device__ void write_output() {
    float* factors = warp_rows();  // [RP][kMaxClusterSize]
    if (warp < RP) {
      SoftmaxSum all;
      const float2 own = lane < cluster.size ? s.out_stat[lane][warp] : make_float2(kEmptyPeak, 0.0f);
      all.peak = own.x;
      all.z = own.y;
      all.template merge_lanes<kMaxClusterSize / 2, 1>();
      const float top = __shfl_sync(~0u, all.peak, 0), z = __shfl_sync(~0u, all.z, 0);
      if (lane < cluster.size) factors[warp * kMaxClusterSize + lane] = z == 0.0f ? 0.0f : exp2_fast(own.x - top) / z;
      if (lane == 0 && cluster.rank == 0 && warp < rows) {
        const float lse = top == infinity() ? top : (top + log2f(z)) * kLn2;
        p.lse[out_row(warp)] = z == 0.0f ? -infinity() : lse;
      }
    }
    __syncthreads();
    const int slice = RP * D / cluster.size;
#pragma unroll 1
    for (int i = tid(); i < slice; i += kThreads) {
      const int at = cluster.rank * slice + i, row = at / D;
      if (row >= rows) break;
      float sum = 0.0f;
#pragma unroll 4
      for (int c = 0; c < cluster.size; ++c) sum += factors[row * kMaxClusterSize + c] * s.out_parts[c * slice + i];
      store(static_cast<T*>(p.out) + out_row(row) * D + at % D, sum);
    }
  }

  __device__ __forceinline__ int64_t out_row(int row) const {
    const int token = row / p.group_size, group = row % p.group_size;
    return (static_cast<int64_t>(sequence) * p.query_tokens + token) * p.kv_heads * p.group_size + head * p.group_size +
           group;
  }

  // Positions of this block's entries at their place in the list of all; the cluster pads the rest.
  __device__ void write_kept(Entries entries, int start, int count, int list_start, int total) {
    const int capacity = p.max_pages << p.log2_page_size;
    int* list = p.kept_indices + (static_cast<int64_t>(sequence) * p.kv_heads + head) * capacity;
#pragma unroll 1
    for (int i = tid(); i < count; i += kThreads) {
      const int position = entries == Entries::kStream ? list_start + i : entry(entries, start + i).y;
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

  __device__ __forceinline__ void exchange_norms() {
    cluster.sync();
    read_norms(s.score_stat, s.score_norm);
  }

  // What the common case leaves out is made up for where it shows: logits beyond the range of the sums, or of a level;
  // more tokens around the boundary than a list holds.
  __device__ void select_tokens(int wanted) {
    score_tokens();
    exchange_norms();
    bool usable = norms_usable(), near = kLevels;
#pragma unroll 1
    while (!usable || !select(wanted, !kLevels || near, near)) {
      near = false;
      cluster.sync();  // the others still read what is written again
      if (!usable) {
        kLevels ? score_tokens_twice(false) : sum_kept_logits();
        exchange_norms();
        usable = true;
      }
      if (kLevels) {
        score_tokens_twice(true);
        __syncthreads();
      }
    }
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
    cluster.start();
    if (live == 0) {
      write_empty();
      if (p.kept_indices != nullptr) write_kept(Entries::kCandidates, 0, 0, 0, 0);
      return;
    }
    const bool dense = kOnlyDense || live <= p.dense_below || (!kSelects && !p.prunes);
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
    int first_slot = first, total_slots = items;
    Stream stream = {};
    if (dense) {
      stream = begin_stream();
    } else if (!selects) {
      list_pages(first >> p.log2_page_size, blocks_of(page_size(), owned));
    }
    load_query(!dense, scores_items, prefix);
    if (!dense) cluster.started();
    if (selects) {
      if (!kByPage) unit_shift = 0;
      const int candidate_share = blocks_of(cluster.size, wanted);
      int begin = cluster.rank * candidate_share, mine = min(max(wanted - begin, 0), candidate_share);
      if (scores_items) {
        if (kByPage) {
          score_pages();
          exchange_norms();
          select(wanted, true, false);
        } else {
          select_tokens(wanted);
        }
        if (p.evens_out) {
          cluster.sync();
        } else {
          begin = s.rank_first[cluster.rank];
          mine = (cluster.rank + 1 < cluster.size ? s.rank_first[cluster.rank + 1] : wanted) - begin;
          __syncthreads();
        }
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
      first_slot = begin << unit_shift;
      slot_count = mine << unit_shift;
      total_slots = wanted << unit_shift;
    }
    if (tid() == 0) s.published_slots = slot_count;
    // The page of the newest token is always a candidate: the tokens it lacks are not.
    const int missing = by_page ? items * page_size() - live : 0;
    const int candidate_tokens = total_slots - missing;

    int kept_tokens = candidate_tokens;
    const bool estimated = p.prunes && !dense;
    int start = 0, count = slot_count, list_start = first_slot;
    Entries entries = dense ? Entries::kStream : Entries::kCandidates;
    if (estimated) {
      if (lead_words % kChunks == 0) {
        estimate<true>();
      } else {
        estimate<false>();
      }
      cluster.sync();
      read_norms(s.weight_stat, s.weight_norm);
      list_weights(total_slots);
      cluster.sync();
      solve_rows(total_slots);
      cluster.sync();
      const int own_survivors = list_survivors();
      if (cluster.size > 1 && p.evens_out && p.slot_capacity > kUnsharedSlots) {
        entries = Entries::kSharedSurvivors;
        cluster.sync();
        kept_tokens = count_survivors();
        const int even = blocks_of(cluster.size, kept_tokens);
        start = list_start = cluster.rank * even;
        count = min(max(kept_tokens - start, 0), even);
      } else {
        entries = Entries::kOwnSurvivors;
        start = 0;
        count = own_survivors;
      }
    }
    if (dense) {
      attend<true>(entries, 0, owned, stream);
    } else {
      attend<false>(entries, start, count, stream);
    }
    write_output();
    if (entries == Entries::kOwnSurvivors) {
      kept_tokens = count_survivors();
      list_start = s.kept_first[cluster.rank];
    }
    if (p.kept_indices != nullptr) write_kept(entries, start, count, list_start, kept_tokens);
    if (p.budget_counters != nullptr && cluster.rank == 0 && tid() == 0) {
      count_budget(candidate_tokens, kept_tokens, estimated);
    }
    // Only this list is made of what another block holds.
    if (p.kept_indices != nullptr && entries == Entries::kSharedSurvivors) cluster.sync();
  }
};

// Blocks a multiprocessor, which caps the registers.
template <int RP, FusedSelector kSelector>
constexpr int kMinBlocks = RP == 8 ? 1 : 2;

template <typename T, int D, int RP, FusedSelector kSelector>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<RP, kSelector>))
    fused_decode_kernel(const __grid_constant__ FusedParams p) {
  FusedDecode<T, D, RP, kSelector>(p).run();
}

}  // namespace
}  // namespace twilight
