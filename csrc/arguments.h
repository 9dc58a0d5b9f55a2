// The flat arguments of the operators that more than one backend implements, in the order of their schemas, which
// twilight_ops/ops/ derives from groups.
#pragma once

#include "namespace.h"

#define TWILIGHT_APPEND_KV_ARGUMENTS                                                                                  \
  const Tensor &k, const Tensor &v, Tensor k_cache, Tensor v_cache, const Tensor &page_table, const Tensor &seq_lens, \
      const OptionalTensor &positions, OptionalTensor k_quant, OptionalTensor k_scale,                                \
      const OptionalTensor &channel_order, const OptionalTensor &prefix_channels, const OptionalTensor &k_center,     \
      OptionalTensor page_bounds, OptionalTensor bounds_scale, OptionalTensor page_means, OptionalTensor means_scale, \
      const OptionalTensor &k_descale, const OptionalTensor &v_descale, const OptionalTensor &k_shift

#define TWILIGHT_DECODE_ATTENTION_ARGUMENTS                                                                         \
  const Tensor &q, const Tensor &k_cache, const Tensor &v_cache, const Tensor &page_table, const Tensor &seq_lens,  \
      std::string selector_name, int64_t token_budget, double budget_fraction,                                      \
      const OptionalTensor &head_token_budget, double top_p, const OptionalTensor &head_top_p, int64_t sink_tokens, \
      int64_t recent_tokens, int64_t dense_below, double page_fraction, int64_t min_scored_tokens, double sm_scale, \
      const OptionalTensor &k_quant, const OptionalTensor &k_scale, const OptionalTensor &channel_order,            \
      const OptionalTensor &prefix_channels, const OptionalTensor &k_center, const OptionalTensor &page_bounds,     \
      const OptionalTensor &bounds_scale, const OptionalTensor &indices, const OptionalTensor &counts,              \
      int64_t tokens_per_index, OptionalTensor budget_counters, OptionalTensor kept_indices,                        \
      OptionalTensor kept_counts, const OptionalTensor &page_means, const OptionalTensor &means_scale,              \
      OptionalTensor out, const OptionalTensor &k_descale, const OptionalTensor &v_descale,                         \
      const OptionalTensor &k_shift, std::optional<double> softcap
