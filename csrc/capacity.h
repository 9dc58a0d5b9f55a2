// How many candidates a call may return, and the layout of budget_counters: the C++ twin of twilight_ops/capacity.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace twilight {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t candidate_tokens_capacity(int64_t max_tokens, int64_t token_budget, double budget_fraction) {
  const int64_t fraction = static_cast<int64_t>(std::ceil(budget_fraction * static_cast<double>(max_tokens)));
  return std::min(max_tokens, std::max(token_budget, fraction));
}

inline int64_t token_capacity(int64_t max_pages, int64_t page_size, int64_t query_tokens, int64_t token_budget,
                              double budget_fraction, int64_t sink_tokens, int64_t recent_tokens) {
  const int64_t max_tokens = max_pages * page_size;
  const int64_t forced = sink_tokens + std::max(recent_tokens, query_tokens);
  return std::min(max_tokens, std::max(candidate_tokens_capacity(max_tokens, token_budget, budget_fraction), forced));
}

inline int64_t page_capacity(int64_t max_pages, int64_t page_size, int64_t query_tokens, int64_t token_budget,
                             double budget_fraction, int64_t sink_tokens, int64_t recent_tokens) {
  const int64_t tokens = candidate_tokens_capacity(max_pages * page_size, token_budget, budget_fraction);
  const int64_t recent = std::max(recent_tokens, query_tokens);
  const int64_t forced = ceil_div(sink_tokens, page_size) + ceil_div(recent, page_size) + 1;
  return std::min(max_pages, std::max(ceil_div(tokens, page_size), forced));
}

enum CounterColumn : int64_t {
  kCounterRows,
  kCounterLive,
  kCounterCandidates,
  kCounterKept,
  kCounterMass,
  kCounterDense
};
constexpr int64_t kCounterHeader = 8;
constexpr int64_t kHistogramBins = 160;
constexpr int64_t kCounterColumns = kCounterHeader + 2 * kHistogramBins;
constexpr double kCounterMassUnit = 1048576.0;

inline int64_t histogram_bin(int64_t tokens) {
  if (tokens < 16) return tokens;
  int64_t octave = 4;
  while (tokens >> (octave + 1)) ++octave;
  return std::min(kHistogramBins - 1, 16 + (octave - 4) * 8 + ((tokens >> (octave - 3)) & 7));
}

}  // namespace twilight
