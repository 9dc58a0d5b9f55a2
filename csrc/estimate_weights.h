// Estimated attention weights of one row's candidates; see estimate_weights.cpp.
#pragma once

#include "select_tokens.h"

namespace twilight {

class EstimateRow {
 public:
  static constexpr int kPhases = 2;  // exponentials of the logits, their sums

  void start(const ShadowQuery& shadow_query, const Paging& paging, const Query& query, int64_t b, int64_t capacity,
             Arena& arena);

  // The live candidates, ascending or not.
  void set_positions(const PositionList& list, int64_t count) {
    list_ = list;
    softmax_.set_items(count);
  }

  // Logits of the leading channels that a selection has computed already.
  void set_known(const PrefixLogits& known) { known_ = known; }

  int64_t parts(int phase) const { return phase == 0 ? softmax_.parts() : 1; }
  void run(int phase, int64_t part);

  // Turns query row r's exponentials into weights; false where a logit is NaN or +inf, and there are none.
  bool weights(int64_t r);

  SoftmaxRows& softmax() { return softmax_; }
  int64_t position(int64_t i) const { return list_.positions == nullptr ? i : list_.positions[i]; }

 private:
  const Paging* paging_;
  const Query* query_;
  int64_t b_, length_;
  PositionList list_;
  SoftmaxRows softmax_;
  const ShadowQuery* shadow_query_;
  PrefixLogits known_;
};

}  // namespace twilight
