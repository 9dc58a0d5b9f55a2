// The fewest bins of weights that reach p, counted in integers; see prune_top_p.cpp.
#pragma once

#include "capacity.h"
#include "paged_kv.h"
#include "parallel.h"

namespace twilight {

struct TopP {
  float threshold;  // weights at or above it are kept
  float mass;       // share of the row's mass in its own set
  bool keep_all;
};

// p of each query head, and what is kept whatever its weight.
struct PruneOptions {
  double top_p;
  const float* per_head;  // null: top_p for all
  int64_t batch_stride, head_stride;
  int64_t sink_tokens, recent_tokens;

  PruneOptions(double top_p, const OptionalTensor& head_top_p, const Limits& limits);

  double p(int64_t b, int64_t head) const {
    if (per_head == nullptr) return top_p;
    const double p = per_head[b * batch_stride + head * head_stride];
    return std::isnan(p) ? 1.0 : std::min(std::max(p, 0.0), 1.0);
  }
};

// n weights in 0..1 of one row; `weights` is padded to kLanes with anything.
TopP top_p_row(const float* weights, int64_t n, double p, Arena& arena);

// The positions that any row keeps, ascending; positions null stands for 0 .. n - 1. `kept` has room for n + kLanes.
int64_t union_of_rows(const float* const* weights, const TopP* rows, int64_t num_rows, const int32_t* positions,
                      int64_t n, int64_t length, const PruneOptions& options, int32_t* kept);

}  // namespace twilight
