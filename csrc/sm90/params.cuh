// Arguments of the fused decode kernel, and where its blocks keep what in shared memory.
#pragma once

#include "../capacity.h"
#include "../plan.h"
#include "../region.h"
#include "primitives.cuh"

namespace twilight {

constexpr int kUnsharedSlots = 1024;  // a block with so few slots attends to its own survivors: evening out costs more
constexpr int kMaxParts = kMaxClusterSize * kWarps;  // counting warps of a cluster

// What the kernel is told that no plan needs.
struct FusedTensors {
  const void* q;
  int64_t q_stride_batch, q_stride_token, q_stride_head;
  ReadRegion k_cache, v_cache;
  ReadRegion k_quant, k_scale;           // (scale, zero) as one 32-bit word a token
  ReadRegion page_bounds, bounds_scale;  // (scale, zero) as one 32-bit word a page
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
  ReadRegion page_means, means_scale;  // (scale, zero) as one 32-bit word a page
  void* out;
  float* lse;
  const float* k_descale;  // of Float8 alone; null: 1
  const float* v_descale;
  const float* k_shift;  // null: 0
  double top_p;
  float sm_scale;
  int in_host_memory;  // K and V
};

struct FusedParams : FusedTensors, SharedLayout {
  double budget_fraction, page_fraction;
  Selector selector;
  int prunes;
  int query_tokens, group_size, kv_heads;
  int log2_page_size, max_pages, num_pages;
  int token_budget, capacity;                   // tokens; items
  int two_levels, page_capacity, least_pages;   // pages whose tokens are scored
  int dense_below, sink_tokens, recent_tokens;  // as Limits has them
};

inline FusedParams fused_params(const FusedTensors& tensors, const PlanRequest& r, const Plan& plan) {
  const Limits limits = r.limits();
  FusedParams p{};
  static_cast<FusedTensors&>(p) = tensors;
  static_cast<SharedLayout&>(p) = plan.layout;
  p.budget_fraction = r.budget_fraction;
  p.page_fraction = r.page_fraction;
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
  p.two_levels = plan.selector == Selector::kShadowPrefix && r.two_levels();
  p.page_capacity = r.kept_pages();
  p.least_pages = p.two_levels ? static_cast<int>(ceil_div(r.min_scored_tokens, r.page_size)) : 0;
  p.dense_below = limits.dense_below;
  p.sink_tokens = limits.sink_tokens;
  p.recent_tokens = limits.recent_tokens;
  return p;
}

}  // namespace twilight
