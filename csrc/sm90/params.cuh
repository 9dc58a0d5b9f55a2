// Arguments of the fused decode kernel, and where its blocks keep what in shared memory.
#pragma once

#include <algorithm>

#include "../capacity.h"
#include "primitives.cuh"

namespace twilight {

enum class FusedSelector : int { kDense, kFull, kQuest, kShadowPrefix };

constexpr int kTileTokens = 16;       // rows of one tensor-core product
constexpr int kBlockTokens = 128;     // a block's share of a sequence is a multiple of this
constexpr int kScoreBins = 2048;      // of candidate scores
constexpr int kMassBins = 1024;       // of estimated weights, where a row is solved from all of them
constexpr int kBoundaryList = 256;    // keys that share the threshold's bin and are ranked one by one
constexpr int kScratchLists = 8192;   // bytes before the lists in scratch: the histograms
constexpr int kRowBins = 1024;        // of the weights listed for the rows that a block solves, which divide them
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
  int token_budget, capacity;                   // tokens; items
  int dense_below, sink_tokens, recent_tokens;  // as Limits has them
  // Whether blocks hand each other even shares of the candidates, and of long lists of survivors. A grid of one block a
  // multiprocessor keeps its own where the larger shared memory allows that: an even share is not worth the barrier
  // there.
  int evens_out;
  // Shared memory, bytes from the start of the dynamic part and elements.
  int scratch_at, pages_at, candidates_at, bitmap_at, state_at;
  int slot_capacity;
  int list_capacity;  // weights a block lists for the rows it solves; a row with more is solved from all
};

// What one block of the cluster owns of a sequence with `items` tokens or pages.
__host__ __device__ inline int share_of_tokens(int tokens, int blocks) {
  return round_up(blocks_of(blocks, tokens), kBlockTokens);
}
__host__ __device__ inline int share_of_pages(int pages, int blocks) {
  return round_up(blocks_of(blocks, pages), kTileTokens);
}

// sizeof(FusedShared), which kernel.cuh asserts. kernels/fused.py holds the same numbers, to tell without a
// launch what fits.
constexpr int fused_shared_bytes(int head_dim, int padded_rows) {
  if (head_dim == 64) return padded_rows == 1 ? 4064 : padded_rows == 4 ? 7152 : 11264;
  return padded_rows == 1 ? 5088 : padded_rows == 4 ? 10480 : 17664;
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
  const int bitmap_words = std::max(blocks_of(32, own_items), kBoundaryList / 2);

  int end = fused_shared_bytes(head_dim, padded_rows);
  const auto take = [&](int bytes) {
    const int at = round_up(end, 16);
    end = at + bytes;
    return at;
  };
  end = round_up(end, 128);  // streamed tiles: lines of global memory become whole lines here
  p.scratch_at = take(std::max(kScratchLists + p.list_capacity * 4, kWarps * padded_rows * head_dim * 4));
  p.pages_at = take(by_page ? own_pages * 4 : by_token ? own_tokens / kTileTokens * 4 : 0);
  const bool lists_pages = p.selector == FusedSelector::kFull;
  p.candidates_at = take((lists_pages ? own_tokens / page_size : own_candidates) * 8);
  p.bitmap_at = take(bitmap_words * 2 * 4);
  const int score_stride = by_token ? blocks_of(2, padded_rows) : padded_rows;
  p.state_at = take(std::max(own_items * score_stride, p.slot_capacity * padded_rows) * 4);

  // A dense row streams its pages through all of this.
  if (p.dense_below > 0 || (!by_page && !by_token && !p.prunes)) {
    end = std::max(end, p.scratch_at + kStreamSlots * kWarps * kTileTokens * head_dim * 2);
  }
  return end;
}

}  // namespace twilight
