// Token scores from the leading channels of the K shadow; see select_tokens.cpp.
#pragma once

#include "shadow.h"
#include "softmax.h"

namespace twilight {

// Scores of all tokens that a selection leaves behind for the estimate of its candidates.
struct PrefixLogits {
  const float* logits = nullptr;  // [rows, stride]; null: none
  int64_t stride = 0;
  uint32_t* pairs = nullptr;       // (scale, zero) of each token
  const int32_t* items = nullptr;  // of each candidate
};

// Logits of a row's tokens 0 .. n - 1, or of those at `positions` in whole pages, from the leading channels, a part at
// a time; of its pages where `query` is of their means and `paging` says where those are.
void prefix_logits(const ShadowQuery& query, const Paging& paging, int64_t b, const int32_t* positions, int64_t part,
                   SoftmaxRows& softmax, uint32_t* pairs);

// Positions to estimate: null stands for 0 .. n - 1. In whole pages, all but the last full, every kLanes of them are a
// run.
struct PositionList {
  const int32_t* positions = nullptr;
  bool whole_pages = true;
};

// Logits of a list of positions from all channels, a part at a time, starting from `known` where there are any.
void full_logits(const ShadowQuery& query, const Paging& paging, int64_t b, const PositionList& list, int64_t part,
                 const PrefixLogits& known, SoftmaxRows& softmax);

}  // namespace twilight
