// Arguments of the fused decode kernel, and what its blocks keep in shared memory.
#pragma once

#include "capacity.h"
#include "fused_primitives.cuh"
#include "plan.h"

namespace twilight {

using FusedSelector = Selector;

constexpr int kScoreBins = 2048;      // of candidate scores
constexpr int kMassBins = 1024;       // of estimated weights, where a row is solved from all of them
constexpr int kRowBins = 1024;        // of the weights listed for the rows that a block solves, which divide them
constexpr int kUnsharedSlots = 1024;  // a block with so few slots attends to its own survivors: evening out costs more
constexpr int kMaxParts = kMaxClusterSize * kWarps;  // listing warps of a cluster

// What the kernel is told that no plan needs.
struct FusedTensors {
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
  const float* head_top_p;
  int top_p_stride_batch, top_p_stride_head;
  unsigned long long* budget_counters;
  int* kept_indices;
  int* kept_counts;
  void* out;
  float* lse;
  double top_p;
  float sm_scale;
};

struct FusedParams : FusedTensors, SharedLayout {
  double budget_fraction;
  FusedSelector selector;
  int prunes;
  int query_tokens, group_size, kv_heads;
  int log2_page_size, max_pages, num_pages;
  int token_budget, capacity;                   // tokens; items
  int dense_below, sink_tokens, recent_tokens;  // as Limits has them
};

inline FusedParams fused_params(const FusedTensors& tensors, const PlanRequest& r, const Plan& plan) {
  const Limits limits(r.max_pages * r.page_size, r.query_tokens, r.token_budget, r.sink_tokens, r.recent_tokens,
                      r.dense_below);
  FusedParams p{};
  static_cast<FusedTensors&>(p) = tensors;
  static_cast<SharedLayout&>(p) = plan.layout;
  p.budget_fraction = r.budget_fraction;
  p.selector = plan.selector;
  p.prunes = plan.prunes;
  p.query_tokens = r.query_tokens;
  p.group_size = r.group_size;
  p.kv_heads = r.kv_heads;
  p.log2_page_size = r.page_size == 16 ? 4 : r.page_size == 32 ? 5 : 6;
  p.max_pages = r.max_pages;
  p.num_pages = r.num_pages;
  p.token_budget = limits.token_budget;
  p.capacity = plan.capacity;
  p.dense_below = limits.dense_below;
  p.sink_tokens = limits.sink_tokens;
  p.recent_tokens = limits.recent_tokens;
  return p;
}

template <typename T, int D, int RP>
struct FusedShared {
  uint4 q_codes[D / 8][RP];  // ordered channels 8w..8w+7 as fp16, in the order mma_codes4 unpacks them
  uint2 q_bounds[D / 2]
                [RP];  // channels 4w..4w+3: negative part against the minima, then positive part against the maxima
  uint4 q_rows[RP][D / 8];  // as the model made them
  // Partial results that the cluster's blocks leave for the outputs written here: [blocks][RP * D / blocks].
  float out_parts[RP * D];
  float2 stat_parts[kMaxClusterSize][RP];  // softmax sums of every block: of scores, of weights, of the output
  float2 warp_stat[kWarps][RP];
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
  uint32_t own_above, own_inside;       // items above the boundary and inside it
  uint2 above_inside[kMaxClusterSize];  // of every block
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

template <int D>
constexpr bool kAsPlanned = sizeof(FusedShared<__half, D, 1>) == fused_shared_bytes(D, 1) &&
                            sizeof(FusedShared<__half, D, 4>) == fused_shared_bytes(D, 4) &&
                            sizeof(FusedShared<__half, D, 8>) == fused_shared_bytes(D, 8);
static_assert(kAsPlanned<64> && kAsPlanned<128>, "fused_shared_bytes in plan.h");

}  // namespace twilight
