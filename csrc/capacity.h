// A call's token counts, the capacity of its lists, and the layout of budget_counters: the C++ twin of
// twilight_ops/capacity.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace twilight {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename N, typename M>
constexpr std::common_type_t<N, M> round_up(N n, M multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Tokens that the page table of one sequence may hold. Sums of two token counts then fit an int32.
constexpr int64_t kMaxTableTokens = int64_t{1} << 29;
// What an int32 position can be: the limit where there is no page table.
constexpr int64_t kMaxTokens = INT32_MAX;

// A selection's logits are multiples of 2 ** (1 / kLogitLevels). Positive fp32 patterns without this many of their last
// bits are bins: of candidate scores eight an octave, of weights 32.
constexpr float kLogitLevels = 128.0f;
constexpr int kScoreBinShift = 20, kWeightBinShift = 18;
constexpr int kLowestScoreBin = ((127 - 96) << 3) - 1;  // of all scores below 2^-96
// Estimated weights are added up as integers of this unit.
constexpr float kMassUnit = 0x1p31f;

// Token counts of one call, none beyond what its page table holds, so that no sum or product of them overflows. Made
// once, where a call comes in.
struct Limits {
  int64_t max_tokens, token_budget, sink_tokens, recent_tokens, dense_below;

  // The newest tokens are at least the query tokens.
  Limits(int64_t max_tokens, int64_t query_tokens, int64_t token_budget, int64_t sink_tokens, int64_t recent_tokens,
         int64_t dense_below = 0)
      : max_tokens(max_tokens),
        token_budget(std::min(token_budget, max_tokens)),
        sink_tokens(std::min(sink_tokens, max_tokens)),
        recent_tokens(std::min(std::max(recent_tokens, query_tokens), max_tokens)),
        dense_below(std::min(dense_below, max_tokens)) {}
};

inline int64_t candidate_tokens_capacity(const Limits& limits, double budget_fraction) {
  const int64_t fraction = static_cast<int64_t>(std::ceil(budget_fraction * static_cast<double>(limits.max_tokens)));
  return std::min(limits.max_tokens, std::max(limits.token_budget, fraction));
}

inline int64_t token_capacity(const Limits& limits, double budget_fraction) {
  const int64_t forced = limits.sink_tokens + limits.recent_tokens;
  return std::min(limits.max_tokens, std::max(candidate_tokens_capacity(limits, budget_fraction), forced));
}

inline int64_t page_capacity(const Limits& limits, int64_t page_size, double budget_fraction) {
  const int64_t tokens = candidate_tokens_capacity(limits, budget_fraction);
  const int64_t forced = ceil_div(limits.sink_tokens, page_size) + ceil_div(limits.recent_tokens, page_size) + 1;
  return std::min(limits.max_tokens / page_size, std::max(ceil_div(tokens, page_size), forced));
}

// Of the list of pages whose tokens are scored.
inline int64_t kept_pages_capacity(const Limits& limits, int64_t page_size, double budget_fraction,
                                   double page_fraction, int64_t min_scored_tokens) {
  const int64_t pages = limits.max_tokens / page_size;
  const int64_t share = static_cast<int64_t>(std::ceil(page_fraction * static_cast<double>(pages)));
  const int64_t least = ceil_div(std::min(min_scored_tokens, limits.max_tokens), page_size);
  return std::max({page_capacity(limits, page_size, budget_fraction), share, least});
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

// Itself below 16, then eight bins an octave.
constexpr int64_t histogram_bin(int64_t tokens) {
  if (tokens < 16) return tokens;
  int octave = 4;
  for (int step = 16; step > 0; step /= 2)
    if (tokens >> (octave + step)) octave += step;
  const int64_t bin = 16 + (octave - 4) * 8 + ((tokens >> (octave - 3)) & 7);
  return bin < kHistogramBins ? bin : kHistogramBins - 1;
}

}  // namespace twilight
