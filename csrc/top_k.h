// The ranking shared by select_pages and select_tokens: sum of softmaxes over the group, then a choice of items by
// bins of their scores.
#pragma once

#include "capacity.h"
#include "region.h"
#include "softmax.h"

namespace twilight {

// What decides the length of a selection.
struct Budget {
  Limits limits;
  double budget_fraction;
  const int32_t* head_token_budget;  // [Hkv] or null

  Budget(const Limits& limits, double budget_fraction, const OptionalTensor& head_token_budget)
      : limits(limits), budget_fraction(budget_fraction), head_token_budget(data_or_null<int32_t>(head_token_budget)) {}

  int64_t tokens(int64_t h, int64_t length) const {
    if (head_token_budget != nullptr) return std::max(head_token_budget[h], 0);
    return std::max(limits.token_budget,
                    static_cast<int64_t>(std::ceil(static_cast<double>(length) * budget_fraction)));
  }
};

// One row's items, each of `unit` tokens: which are taken whatever they score, and how many in all.
struct TopK {
  int64_t items, front, back, count;  // 0..front and back..items are forced

  TopK() = default;
  // At least `least` items.
  TopK(const Budget& budget, int64_t h, int64_t length, int64_t unit, int64_t capacity, int64_t least = 0)
      : items(ceil_div(length, unit)),
        front(std::min(items, ceil_div(std::min(budget.limits.sink_tokens, length), unit))) {
    const int64_t newest = length - std::min(length, budget.limits.recent_tokens);
    back = std::max(front, newest / unit);
    const int64_t wanted = std::max(ceil_div(std::min(budget.tokens(h, length), length), unit), least);
    count = std::min({std::max(wanted, front + items - std::min(items, back)), items, capacity});
  }

  // The same of `left` items, among which are those that are forced.
  TopK of(int64_t left) const {
    TopK out = *this;
    out.items = left;
    out.back -= items - left;
    out.count = std::min(count, left);
    return out;
  }

  bool takes_all() const { return count == items; }

  // Scores the items [part * kPartItems ..]: scores[i] = sum over rows of softmax.
  static void add_rows(const SoftmaxRows& softmax, int64_t part, float* scores);

  // Writes the `count` taken items in ascending order; `out` has room for a register more.
  void choose(const float* scores, int32_t* out, Arena& arena) const;
};

}  // namespace twilight
