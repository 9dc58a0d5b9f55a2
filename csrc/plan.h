// How the fused decode kernel is launched: whether it serves a call, with how many blocks, how they share candidates,
// and where things lie in a block's shared memory. Plain C++: the operator, the kernel, its emulator and Python
// (twilight_ops/launch_plan.py) read the same plan.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "capacity.h"

namespace twilight {

enum class Selector : int { kDense, kFull, kQuest, kPageMean, kShadowPrefix, kStreaming, kGiven };
// By Selector, as decode_attention's argument names them.
constexpr std::array<const char*, 7> kSelectorNames = {"dense",         "full",      "quest", "page_mean",
                                                       "shadow_prefix", "streaming", "given"};
constexpr bool selects_pages(Selector selector) {
  return selector == Selector::kQuest || selector == Selector::kPageMean;
}

// The selector of a checked name.
template <typename Name>
Selector selector_named(const Name& name) {
  return static_cast<Selector>(std::find(kSelectorNames.begin(), kSelectorNames.end(), name) - kSelectorNames.begin());
}

// The kernel's measures that the plan needs.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxRows = 8;        // query rows of a KV head: the columns of one tensor-core product
constexpr int kMaxDenseRows = 32;  // where the selector that runs is kDense: of four
constexpr int kTileTokens = 16;    // rows of one tensor-core product
constexpr int kBlockTokens = 128;  // a block's share of a sequence is a multiple of this
constexpr int kMaxClusterSize = 16;
constexpr int kScoreBins = 1 << (31 - kScoreBinShift);
// Bins of weights that have any mass, 2^-31 to 1, and some above.
constexpr int kWeightBins = 1024, kLowestWeightBin = (127 - 31) << (23 - kWeightBinShift);
// Tiles of keys or of values that a warp holds or has on their way: more where each takes longer to use.
constexpr int stream_slots(int padded_rows) { return padded_rows <= kMaxRows ? 3 : 5; }

constexpr int blocks_of(int size, int items) { return (items + size - 1) / size; }

// What one block of the cluster owns of a sequence with `items` tokens or pages.
constexpr int share_of_tokens(int tokens, int blocks) { return round_up(blocks_of(blocks, tokens), kBlockTokens); }
constexpr int share_of_pages(int pages, int blocks) { return round_up(blocks_of(blocks, pages), kTileTokens); }

// Tiles of so many pages, in whole steps of a warp.
constexpr int tiles_of_pages(int pages, int page_size) {
  return round_up(pages * page_size, kBlockTokens) / kTileTokens;
}

// Query rows that a kernel was compiled for.
constexpr int padded_rows(int rows) { return rows == 1 ? 1 : rows <= 4 ? 4 : round_up(rows, 8); }

// sizeof(FusedShared), the part of shared memory that depends on nothing else; the kernel asserts it.
constexpr int fused_shared_bytes(int head_dim, int padded_rows) {
  if (padded_rows > kMaxRows) return head_dim == 64 ? 1840 + 692 * padded_rows : 1840 + 1076 * padded_rows;
  if (head_dim == 64) return padded_rows == 1 ? 3136 : padded_rows == 4 ? 6192 : 10288;
  return padded_rows == 1 ? 4160 : padded_rows == 4 ? 9520 : 16688;
}

template <class Region>
int64_t page_words(const Region& k, const Region& v, const Region& codes, const Region& scales) {
  return std::max(std::max(k.page_stride, v.page_stride) / 16, std::max(codes.page_stride, scales.page_stride) / 4);
}

struct DeviceLimits {
  int multiprocessors;
  int shared_per_block;  // bytes
};

// Shapes and settings of a call of decode_attention, and the GPU's limits. Tokens are as the caller gave them.
struct PlanRequest {
  Selector selector;
  int prunes;           // whether top_p is below 1 or given by head
  double softcap;       // 0: none
  int64_t dtype_bits;   // of q, K and V
  int64_t bounds_bits;  // of page_bounds, 0 without them
  int64_t head_dim, query_tokens, group_size, kv_heads, batch;
  int64_t page_size, max_pages, num_pages;
  int64_t page_words;  // from a page to the next, of 16 bytes in K and V or of 4 in the shadow, the most of them
  int64_t token_budget, sink_tokens, recent_tokens, dense_below;
  double budget_fraction, page_fraction;
  int64_t min_scored_tokens;
  DeviceLimits device;
  // What a test decides itself; 0 leaves it to the plan.
  int64_t cluster_size;

  Limits limits() const {
    return {max_pages * page_size, query_tokens, token_budget, sink_tokens, recent_tokens, dense_below};
  }
  // Whether pages can be left out: the longest sequence has more than the least tokens.
  bool two_levels() const {
    return selector == Selector::kShadowPrefix && page_fraction < 1.0 && max_pages * page_size > min_scored_tokens;
  }
  int64_t kept_pages() const {
    return kept_pages_capacity(limits(), page_size, budget_fraction, page_fraction, min_scored_tokens);
  }
  // Where no row can be long enough for anything else, all of them are dense.
  Selector running_selector() const {
    const Limits of_rows = limits();
    return of_rows.max_tokens <= of_rows.dense_below ? Selector::kDense : selector;
  }
  int64_t rows() const { return query_tokens * group_size; }
  int64_t units() const { return batch * kv_heads; }
};

// What lies where in a block's dynamic shared memory, behind FusedShared.
struct SharedLayout {
  int scratch_at, pages_at, candidates_at, state_at;  // bytes
  int slot_capacity;
};

struct Plan {
  char reason[160];   // why the kernel does not serve the call, "" where it does: what follows is set only then
  Selector selector;  // that runs
  int prunes;
  int capacity;      // of the selector's list, in its units
  int cluster_size;  // blocks a (sequence, KV head)
  int grid;          // blocks
  int shared_bytes;  // a block
  SharedLayout layout;
};

Plan plan_fused_decode(const PlanRequest& request);

}  // namespace twilight
