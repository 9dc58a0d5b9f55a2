// What every stage of the fused decode kernel is told: who a block and a thread are, the block's share of the sequence,
// where codes lie, candidates, softmax sums.
#pragma once

#include "shared.cuh"

namespace twilight {
namespace {

// Made once the length is known, and the same from then on. D channels, RP query rows padded to 1, 4, 8 or, of dense
// rows, 16, 24 or 32; Element is what the caches hold.
template <typename Value, int kHeadDim, int kPaddedRows, Selector kChosen, bool kTokensOfPages = false,
          typename Element = Value>
struct Context {
  using T = Value;
  using E = Element;
  static constexpr bool kIsFloat8 = sizeof(E) == 1;
  static constexpr int D = kHeadDim, RP = kPaddedRows;
  static constexpr Selector kSelector = kChosen;
  static constexpr bool kByPage = selects_pages(kSelector);
  static constexpr bool kByMean = kSelector == Selector::kPageMean;
  static constexpr bool kTwoLevels = kTokensOfPages;                    // tokens are scored of the best pages alone
  static constexpr bool kByWindow = kSelector == Selector::kStreaming;  // the first and the newest tokens
  static constexpr bool kByToken = kSelector == Selector::kShadowPrefix || kByWindow;
  static constexpr bool kSelects = kByPage || kByToken;
  static constexpr bool kOnlyDense = kSelector == Selector::kDense;
  static constexpr int kWords = D / 8;    // 32-bit words of codes a row
  static constexpr int kCopies = 8 / RP;  // tiles that share one accumulator: its eight columns are RP rows of each
  static constexpr int kColumns = RP <= kMaxRows ? 1 : RP / kMaxRows;  // products whose columns are the rows

  const FusedParams& p;
  const Cluster cluster;
  const int sequence, head, rows;
  const int live;  // tokens of the sequence
  const int warp, lane, g, t;

  __device__ Context(const FusedParams& params, Cluster blocks, int sequence, int head)
      : p(params),
        cluster(blocks),
        sequence(sequence),
        head(head),
        rows(p.query_tokens * p.group_size),
        live(min(max(p.seq_lens[sequence], 0), p.max_pages << p.log2_page_size)),
        warp(threadIdx.x >> 5),
        lane(threadIdx.x & 31),
        g(lane >> 2),
        t(lane & 3) {}

  __device__ __forceinline__ int tid() const { return threadIdx.x; }
  __device__ __forceinline__ int page_size() const { return 1 << p.log2_page_size; }
  __device__ __forceinline__ int row_of_column(int k) const { return (2 * t + k) % RP; }
  __device__ __forceinline__ float log2_scale() const { return p.sm_scale * kLog2e; }
  // What a stored key, or a stored value, is multiplied by.
  __device__ __forceinline__ float k_descale() const {
    return kIsFloat8 && p.k_descale != nullptr ? p.k_descale[head] : 1.0f;
  }
  __device__ __forceinline__ float v_descale() const {
    return kIsFloat8 && p.v_descale != nullptr ? p.v_descale[head] : 1.0f;
  }
  __device__ __forceinline__ uint32_t slot_in_page(uint32_t row) const { return row & (page_size() - 1); }
  // Physical page.
  __device__ __forceinline__ uint32_t page_of(int logical) const {
    const int page = __ldg(p.page_table + static_cast<int64_t>(sequence) * p.max_pages + logical);
    return min(max(page, 0), p.num_pages - 1);
  }
  // First row of a token's page. A row is a place among the pages' tokens.
  __device__ __forceinline__ uint32_t page_row(int token) const {
    return page_of(token >> p.log2_page_size) << p.log2_page_size;
  }
  // What a region has of this head: of page 0, of a page, and of a row of 16-byte chunks, which shuffles as one word.
  template <typename V>
  __device__ __forceinline__ const V* head_of(const ReadRegion& region) const {
    return reinterpret_cast<const V*>(region.data + static_cast<uint64_t>(region.head_stride) * head);
  }
  template <typename V>
  __device__ __forceinline__ const V* at(const ReadRegion& region, uint32_t page) const {
    return reinterpret_cast<const V*>(head_of<char>(region) + static_cast<uint64_t>(region.page_stride) * page);
  }
  __device__ __forceinline__ uint32_t chunk_of(const ReadRegion& region, uint32_t row) const {
    return (row >> p.log2_page_size) * (region.page_stride / 16) + slot_in_page(row) * (D * sizeof(E) / 16);
  }
  __device__ __forceinline__ const E* row_at(const ReadRegion& region, uint32_t chunk) const {
    return reinterpret_cast<const E*>(head_of<uint4>(region) + chunk);
  }
  __device__ __forceinline__ int64_t out_row(int row) const {
    const int token = row / p.group_size, group = row % p.group_size;
    return (static_cast<int64_t>(sequence) * p.query_tokens + token) * p.kv_heads * p.group_size + head * p.group_size +
           group;
  }
};

// What first scores items: of two levels pages, by their means.
template <class C>
__device__ __forceinline__ decltype(auto) first_level(const C& c) {
  if constexpr (C::kTwoLevels) {
    return Context<typename C::T, C::D, C::RP, Selector::kPageMean>(c.p, c.cluster, c.sequence, c.head);
  } else {
    return (c);
  }
}

// The block's tokens or pages of the sequence: `owned` from `first`.
struct Share {
  int first, owned;
};

template <class C>
__device__ __forceinline__ Share share_of(const C& c, int items, bool by_page) {
  const int share = by_page ? share_of_pages(items, c.cluster.size) : share_of_tokens(items, c.cluster.size);
  const int first = c.cluster.rank * share;
  return {first, min(max(items - first, 0), share)};
}

// Words of a row's codes that lead.
template <class C>
__device__ __forceinline__ int lead_words(const C& c) {
  if (c.p.prefix_channels == nullptr) return C::kWords;
  return min(max(c.p.prefix_channels[c.head], 0), C::D) / 8;
}

// Where codes lie: a page holds the `lead_words` leading words of all its rows, then their others.
template <class C>
struct Shadow {
  const C& c;
  const int lead_words;

  __device__ __forceinline__ const uint32_t* codes() const { return c.template head_of<uint32_t>(c.p.k_quant); }
  __device__ __forceinline__ const uint32_t* scales() const { return c.template head_of<uint32_t>(c.p.k_scale); }
  // First word of a row's page, and of the row's leading and its other codes, counted from codes().
  __device__ __forceinline__ uint32_t page_word(uint32_t row) const {
    return (row >> c.p.log2_page_size) * (c.p.k_quant.page_stride / 4);
  }
  __device__ __forceinline__ uint32_t lead_word(uint32_t row) const {
    return page_word(row) + c.slot_in_page(row) * lead_words;
  }
  __device__ __forceinline__ uint32_t rest_word(uint32_t row) const {
    return page_word(row) + c.page_size() * lead_words + c.slot_in_page(row) * (C::kWords - lead_words);
  }
  // Counted from scales().
  __device__ __forceinline__ uint32_t scale_word(uint32_t row) const {
    return (row >> c.p.log2_page_size) * (c.p.k_scale.page_stride / 4) + c.slot_in_page(row);
  }
};

// A block's `count` candidate slots, a token each: (first row, first position) of every page of them, or of every one.
template <class C>
struct Candidates {
  const C& c;
  const View<uint2> units;
  const int count;

  __device__ __forceinline__ int unit_shift() const { return C::kByToken ? 0 : c.p.log2_page_size; }
  __device__ __forceinline__ uint2 entry_of(uint2 unit, int slot) const {
    const uint32_t offset = slot & ((1 << unit_shift()) - 1);
    return make_uint2(unit.x + offset, unit.y + offset);
  }
  // (row, position) of a slot.
  __device__ __forceinline__ uint2 resolve(int slot) const { return entry_of(units[slot >> unit_shift()], slot); }
};

// Survivors in the order of their slots, block by block.
struct Survivors {
  SurvivorState& s;
  const View<int> slots;
};

// What a block attends to: `count` entries of a list from `start`.
enum class Listed { kCandidates, kOwnSurvivors, kSharedSurvivors };
template <class C>
struct Entries {
  static constexpr bool kStreams = false, kFromHost = false;
  const Candidates<C>& candidates;
  const Survivors& survivors;
  Listed list;
  int start, count;

  // (row, position) of one.
  __device__ __forceinline__ uint2 at(int i) const {
    if (list == Listed::kCandidates) return candidates.resolve(start + i);
    if (list == Listed::kOwnSurvivors) return candidates.resolve(survivors.slots[start + i]);
    const int* first = survivors.s.first;
    const Cluster& cluster = candidates.c.cluster;
    int owner = 0;
#pragma unroll 1
    while (first[owner + 1] <= start + i) ++owner;
    const int slot = cluster.read(survivors.slots + (start + i - first[owner]), owner);
    return candidates.entry_of(cluster.read(candidates.units + (slot >> candidates.unit_shift()), owner), slot);
  }
};

// The same where K and V lie in host memory.
template <class C>
struct HostEntries : Entries<C> {
  static constexpr bool kFromHost = true;
};

// The cluster's blocks divide the lines of this sequence's page table among them, before the length is known.
__device__ __forceinline__ void prefetch_page_table(const FusedParams& p, Cluster cluster, int sequence) {
  constexpr int kLine = 32;  // entries
  const int* table = p.page_table + static_cast<int64_t>(sequence) * p.max_pages;
#pragma unroll 1
  for (int i = (threadIdx.x * cluster.size + cluster.rank) * kLine; i < p.max_pages;
       i += kThreads * cluster.size * kLine) {
    prefetch_line(table + i);
  }
}

// Makes whole pages candidates: `count` of them from logical page `begin`.
template <class C>
__device__ __forceinline__ void list_pages(const C& c, int begin, int count, View<uint2> units) {
#pragma unroll 1
  for (int i = c.tid(); i < count; i += kThreads) {
    units[i] = make_uint2(c.page_of(begin + i) << c.p.log2_page_size, (begin + i) << c.p.log2_page_size);
  }
}

template <int kBins, class C>
__device__ __forceinline__ void clear_histogram(const C& c, View<uint32_t> histogram) {
  constexpr int kVectors = kBins / 4;
  static_assert(kVectors % kThreads == 0, "whole vectors of every thread");
#pragma unroll
  for (int i = 0; i < kVectors; i += kThreads) histogram.as<uint4>()[i + c.tid()] = make_uint4(0, 0, 0, 0);
}

// Calls `work` with the rows of this warp.
template <class C, class Work>
__device__ __forceinline__ void for_own_rows(const C& c, const Work& work) {
#pragma unroll
  for (int i = 0; i < C::kColumns; ++i) {
    const int row = c.warp + i * kWarps;
    if (row < C::RP) work(row);
  }
}

// A lane's part of the sum of a row, and what up to kParts of them add up to.
template <class C>
__device__ __forceinline__ float2 part_of(const C& c, const float2 (*parts)[C::RP], int row, int count) {
  return c.lane < count ? parts[c.lane][row] : make_float2(kEmptyPeak, 0.0f);
}
template <int kParts>
__device__ __forceinline__ SoftmaxSum merge_parts(float2 part) {
  SoftmaxSum all;
  all.peak = part.x;
  all.z = part.y;
  all.template merge_lanes<kParts / 2, 1>();
  return all;
}

// Merges the warps' sums of a row, hands the result to every block of the cluster and returns it.
template <class C>
__device__ __forceinline__ SoftmaxSum publish_row_sum(const C& c, int row, float2 own, Sums<C::RP>& sums) {
  SoftmaxSum all = merge_parts<kWarps>(own);
  all.peak = __shfl_sync(~0u, all.peak, 0);
  all.z = __shfl_sync(~0u, all.z, 0);
  if (c.lane < c.cluster.size) {
    c.cluster.write(&sums.of_blocks[c.cluster.rank][row], c.lane, make_float2(all.peak, all.z));
  }
  return all;
}

// Hands every block of the cluster this one's softmax sums, two columns a thread.
template <class C>
__device__ void publish_sums(const C& c, SoftmaxSum (&sum)[2], Sums<C::RP>& sums) {
  constexpr int RP = C::RP, kNumColumns = RP == 1 ? 1 : 2;
  if (RP == 1) sum[0].merge(sum[1].peak, sum[1].z);
#pragma unroll
  for (int k = 0; k < kNumColumns; ++k) {
    sum[k].template merge_lanes<16, RP == 8 ? 4 : RP == 4 ? 2 : 1>();
    if (c.g == 0 && 2 * c.t + k < RP) sums.of_warps[c.warp][2 * c.t + k] = make_float2(sum[k].peak, sum[k].z);
  }
  sync_block("sums of warps written");
  if (c.warp < RP) publish_row_sum(c, c.warp, part_of(c, sums.of_warps, c.warp, kWarps), sums);
}

// What the rows' logits are lowered by, once the cluster has met.
template <class C>
__device__ void read_norms(const C& c, const Sums<C::RP>& sums, float* norms) {
  if (c.warp < C::RP) {
    const SoftmaxSum all = merge_parts<kMaxClusterSize>(part_of(c, sums.of_blocks, c.warp, c.cluster.size));
    if (c.lane == 0) norms[c.warp] = c.warp < c.rows ? all.norm() : infinity();
  }
  sync_block("norms known");
}

}  // namespace
}  // namespace twilight
