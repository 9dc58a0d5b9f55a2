// Arguments of the fused decode kernel, and where its blocks keep what in shared memory.
#pragma once

#include "../capacity.h"
#include "../plan.h"
#include "primitives.cuh"

namespace twilight {

constexpr int kUnsharedSlots = 1024;  // a block with so few slots attends to its own survivors: evening out costs more
constexpr int kMaxParts = kMaxClusterSize * kWarps;  // counting warps of a cluster

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
  const uint8_t* page_means;
  const uint8_t* means_scale;  // (scale, zero) as one 32-bit word a page
  void* out;
  float* lse;
  const float* k_descale;  // of Float8 alone; null: 1
  const float* v_descale;
  const float* k_shift;  // null: 0
  double top_p;
  float sm_scale;
};

struct FusedParams : FusedTensors, SharedLayout {
  double budget_fraction, page_fraction;
  Selector selector;
  int prunes;
  int query_tokens, group_size, kv_heads;
  int log2_page_size, max_pages, num_pages;
  int token_budget, capacity;                   // tokens; items
  int page_capacity;                            // pages whose tokens are scored
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
  p.page_capacity = kept_pages_capacity(limits, r.page_size, r.budget_fraction, r.page_fraction);
  p.dense_below = limits.dense_below;
  p.sink_tokens = limits.sink_tokens;
  p.recent_tokens = limits.recent_tokens;
  return p;
}

}  // namespace twilight
