// twilight::decode_attention. Rows (sequence, KV head) in parallel; a row selects, estimates, prunes and attends in one
// core's cache, or shares each of these phases with the other threads where there are few rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "attend_sparse.h"
#include "capacity.h"
#include "estimate_weights.h"
#include "plan.h"
#include "prune_top_p.h"
#include "selection.h"

namespace twilight {
namespace {

struct RowReport {
  int64_t live, candidates, kept;
  double mass;
  bool dense;
};

struct DecodeCall {
  const Query& query;
  const KVCache& cache;
  const Paging& paging;
  const std::optional<Shadow>& shadow;
  const std::optional<PageBounds>& bounds;
  const std::optional<Shadow>& means;
  const Paging& means_paging;
  Selector selector;
  bool prunes;
  const Budget& budget;
  const PageLevel& level;
  const PruneOptions& options;
  const GivenCandidates& candidates;
  int64_t dense_below, capacity;  // capacity: of the selector's list, in its units
  void* out;
  float* lse;
  int32_t *kept_indices, *kept_counts;  // or null
  RowReport* reports;
};

class DecodeRow {
 public:
  static constexpr int kSelect = 0;
  static constexpr int kList = kSelect + SelectionRow::kPhases;
  static constexpr int kEstimate = kList + 1;
  static constexpr int kThresholds = kEstimate + EstimateRow::kPhases;
  static constexpr int kUnite = kThresholds + 1;
  static constexpr int kAttend = kUnite + 1;
  static constexpr int kPhases = kAttend + AttendRow::kPhases;

  void prepare(const DecodeCall& call, int64_t row, Arena& arena) {
    call_ = &call;
    row_ = row;
    b_ = row / call.query.kv_heads;
    h_ = row % call.query.kv_heads;
    length_ = call.paging.length(b_);
    dense_ = call.selector == Selector::kDense || length_ <= call.dense_below;
    const bool by_page = selects_pages(call.selector);
    selects_ = !dense_ && (by_page || call.selector == Selector::kShadowPrefix);
    prunes_ = call.prunes && !dense_;

    const bool by_token = selects_ && !by_page;
    if (prunes_ || by_token) shadow_query_.prepare(*call.shadow, call.query, b_, h_, arena);
    int64_t capacity = length_;
    if (selects_) {
      unit_ = by_page ? call.paging.page_size : 1;
      const TopK top_k(call.budget, h_, length_, unit_, call.capacity);
      if (by_token) {
        selection_.start_tokens(top_k, call.budget, call.level, call.query, call.paging, b_, h_, prunes_, arena);
      } else {
        selection_.start(top_k, call.query.rows, /*keep_logits=*/false, arena);
      }
      capacity = std::min(length_, top_k.count * unit_);
      if (selection_.scores_items()) {
        if (by_token) {
          selection_.use_tokens(shadow_query_, call.paging, b_, arena);
        } else if (call.selector == Selector::kPageMean) {
          means_query_.prepare(*call.means, call.query, b_, h_, arena);
          selection_.use_tokens(means_query_, call.means_paging, b_, arena);
        } else {
          selection_.use_pages(*call.bounds, call.paging, call.query, b_, h_, arena);
        }
      }
    } else if (lists_window()) {
      window_ = TopK(call.budget, h_, length_, 1, call.capacity);
      capacity = window_.count;
    } else if (!dense_ && call.selector == Selector::kGiven) {
      capacity = call.candidates.listed(row) * call.candidates.unit;
    }
    list_ = arena.take<int32_t>(capacity + kLanes);
    attend_.start(call.cache, call.paging, call.query, b_, h_, capacity, call.out, call.lse, arena);
    if (!prunes_) return;
    estimate_.start(shadow_query_, call.paging, call.query, b_, capacity, arena);
    if (by_token) estimate_.set_known(selection_.prefix_logits());
    top_p_ = arena.take<TopP>(call.query.rows);
    weights_ = arena.take<const float*>(call.query.rows);
    kept_ = arena.take<int32_t>(capacity + kLanes);
  }

  int64_t parts(int phase) const {
    if (phase < kList) return selects_ ? selection_.parts(phase - kSelect) : 0;
    if (phase == kList) return 1;
    if (phase >= kAttend) return attend_.parts(phase - kAttend);
    if (phase == kUnite) return 1;
    if (!prunes_) return 0;
    return phase == kThresholds ? call_->query.rows : estimate_.parts(phase - kEstimate);
  }

  void run(int phase, int64_t part) {
    if (phase < kList) return selection_.run(phase - kSelect, part);
    if (phase == kList) return list_candidates();
    if (phase < kThresholds) return estimate_.run(phase - kEstimate, part);
    if (phase == kThresholds) return find_threshold(part);
    if (phase == kUnite) return unite();
    attend_.run(phase - kAttend, part);
  }

 private:
  bool lists_window() const { return !dense_ && call_->selector == Selector::kStreaming; }

  // Turns what the selector chose into live positions; null stands for all of them.
  void list_candidates() {
    positions_ = nullptr;
    count_ = length_;
    if (selects_ && !selection_.takes_all()) {
      count_ = selection_.count();
      positions_ = selection_.list();
      if (unit_ > 1) expand_pages();
    } else if (lists_window()) {
      count_ = window_.count;
      positions_ = list_;
      std::iota(list_, list_ + window_.front, 0);
      std::iota(list_ + window_.front, list_ + count_, static_cast<int32_t>(length_ - count_ + window_.front));
    } else if (!dense_ && call_->selector == Selector::kGiven) {
      count_ = 0;
      call_->candidates.for_each(row_, length_,
                                 [&](int64_t, int64_t position) { list_[count_++] = static_cast<int32_t>(position); });
      positions_ = list_;
    }
    if (prunes_) estimate_.set_positions({positions_, positions_ == nullptr || (selects_ && unit_ > 1)}, count_);
  }

  void expand_pages() {
    int64_t at = 0;
    for (int64_t i = 0; i < selection_.count(); ++i) {
      const int64_t first = selection_.list()[i] * unit_, n = std::min(unit_, length_ - first);
      for (int64_t s = 0; s < n; ++s) list_[at + s] = static_cast<int32_t>(first + s);
      at += n;
    }
    positions_ = list_;
    count_ = at;
  }

  void find_threshold(int64_t r) {
    const int64_t head = h_ * call_->query.group + r % call_->query.group;
    const bool sound = estimate_.weights(r);
    weights_[r] = estimate_.softmax().row(r);
    top_p_[r] = sound ? top_p_row(weights_[r], count_, call_->options.p(b_, head), Arena::mine())
                      : TopP{0.0f, count_ == 0 ? 0.0f : 1.0f, true};
  }

  void unite() {
    RowReport& report = call_->reports[row_];
    report = {length_, count_, count_, 1.0, dense_};
    if (prunes_) {
      const int64_t rows = call_->query.rows;
      report.kept = union_of_rows(weights_, top_p_, rows, positions_, count_, length_, call_->options, kept_);
      report.mass = 0;
      for (int64_t r = 0; r < rows; ++r) report.mass += top_p_[r].mass;
      report.mass /= static_cast<double>(rows);
      positions_ = kept_;
    }
    attend_.set_positions(positions_, report.kept);
    if (call_->kept_counts != nullptr) write_kept(report.kept);
  }

  void write_kept(int64_t count) {
    const int64_t slots = call_->paging.max_tokens(), listed = std::min(count, slots);
    int32_t* out = call_->kept_indices + row_ * slots;
    for (int64_t i = 0; i < listed; ++i) out[i] = positions_ == nullptr ? static_cast<int32_t>(i) : positions_[i];
    if (!std::is_sorted(out, out + listed)) std::sort(out, out + listed);
    std::fill(out + listed, out + slots, -1);
    call_->kept_counts[row_] = static_cast<int32_t>(count);
  }

  const DecodeCall* call_;
  int64_t row_, b_, h_, length_, unit_ = 1;
  bool dense_, selects_, prunes_;
  ShadowQuery shadow_query_, means_query_;
  SelectionRow selection_;
  TopK window_;  // of sinks and the newest tokens
  EstimateRow estimate_;
  AttendRow attend_;
  TopP* top_p_;
  const float** weights_;
  int32_t *list_, *kept_;
  const int32_t* positions_ = nullptr;
  int64_t count_ = 0;
};

void add_to_counters(const RowReport* reports, int64_t batch, int64_t kv_heads, int64_t* counters) {
  for (int64_t row = 0; row < batch * kv_heads; ++row) {
    const RowReport& report = reports[row];
    if (report.live == 0) continue;
    int64_t* out = counters + row % kv_heads * kCounterColumns;
    out[kCounterRows] += 1;
    out[kCounterLive] += report.live;
    out[kCounterCandidates] += report.candidates;
    out[kCounterKept] += report.kept;
    out[kCounterDense] += report.dense;
    out[kCounterMass] += std::llrint(report.mass * kCounterMassUnit);
    out[kCounterHeader + histogram_bin(report.candidates)] += 1;
    out[kCounterHeader + kHistogramBins + histogram_bin(report.kept)] += 1;
  }
}

std::tuple<Tensor, Tensor> decode_attention(TWILIGHT_DECODE_ATTENTION_ARGUMENTS) {
  Checker check("decode_attention", q);
  check.query(q);
  check.cache(k_cache, v_cache);
  check.geometry();
  check.paging(page_table, seq_lens);
  check.one_of("selector", selector_name, kSelectorNames);
  const Selector selector = selector_named(selector_name);
  check.budget(token_budget, budget_fraction, sink_tokens, recent_tokens, head_token_budget);
  check.top_p(top_p, head_top_p);
  check.scale(sm_scale);
  check.at_least("dense_below", dense_below, 0);
  check.level(page_fraction, min_scored_tokens);
  const bool by_level = page_fraction < 1.0;
  if (by_level && selector != Selector::kShadowPrefix)
    check.fail("page_fraction", "1, unless selector is \"shadow_prefix\"", number(page_fraction));
  const bool prunes = selector != Selector::kDense && (top_p < 1.0 || head_top_p.has_value());
  if (prunes || selector == Selector::kShadowPrefix) {
    check.shadow(k_quant, k_scale, channel_order, prefix_channels, k_center);
  } else {
    check.shadow_if_any(k_quant, k_scale, channel_order, prefix_channels, k_center);
  }
  if (selector == Selector::kQuest) check.given("page_bounds", page_bounds, "a tensor, because selector is \"quest\"");
  if (page_bounds.has_value()) {
    check.bounds(*page_bounds, bounds_scale);
  } else {
    check.absent("bounds_scale", bounds_scale, "None, because page_bounds is None");
  }
  check.means(page_means, means_scale,
              selector == Selector::kPageMean ? "a tensor, because selector is \"page_mean\""
              : by_level                      ? "a tensor, because page_fraction is below 1"
                                              : nullptr);
  if (selector == Selector::kGiven) {
    check.given("indices", indices, "a tensor, because selector is \"given\"");
  } else {
    check.absent("indices", indices, "None, unless selector is \"given\"");
  }
  check.candidates(indices, counts, tokens_per_index, k_cache.size(2));
  if (budget_counters.has_value())
    check.tensor("budget_counters", *budget_counters, {"Hkv", kCounterColumns}, {ScalarType::Long});
  check.together("kept_counts", kept_counts, "kept_indices", kept_indices);
  if (kept_indices.has_value()) {
    check.tensor("kept_indices", *kept_indices, {"B", "Hkv", k_cache.size(2) * page_table.size(1)}, {ScalarType::Int});
    check.tensor("kept_counts", *kept_counts, {"B", "Hkv"}, {ScalarType::Int});
  }
  check.scales(k_descale, v_descale, k_shift, k_cache.scalar_type());
  check.softcap(softcap);
  if (out.has_value()) check.tensor("out", *out, {"B", "T", "Hq", "D"}, {q.scalar_type()});
  check.no_gradients();

  const KVCache cache(k_cache, v_cache, k_descale, v_descale, k_shift);
  const Query query(q, cache.kv_heads, sm_scale, softcap);
  const Paging paging(page_table, seq_lens, cache.num_pages, cache.page_size);
  std::optional<Shadow> shadow;
  if (k_quant.has_value()) shadow = Shadow::of_keys(*k_quant, *k_scale, *channel_order, *prefix_channels, k_center);
  std::optional<PageBounds> bounds;
  if (page_bounds.has_value()) bounds.emplace(*page_bounds, bounds_scale);
  std::optional<Shadow> means;
  if (page_means.has_value())
    means = Shadow::of_means(*page_means, *means_scale, channel_order, by_level ? prefix_channels : std::nullopt);
  const Paging means_paging = paging.of_means();
  const Limits limits(paging.max_tokens(), query.query_tokens, token_budget, sink_tokens, recent_tokens, dense_below);
  const Budget budget(limits, budget_fraction, head_token_budget);
  const PageLevel level(means, means_paging, paging, limits, budget_fraction, page_fraction, min_scored_tokens);
  const PruneOptions options(top_p, head_top_p, limits);
  const GivenCandidates given(indices, counts, tokens_per_index);
  const int64_t list_capacity = selects_pages(selector) ? page_capacity(limits, paging.page_size, budget_fraction)
                                                        : token_capacity(limits, budget_fraction);

  // An operator may not return what it writes.
  Tensor attended = out.has_value()
                        ? torch::stable::new_empty(q, {0})
                        : torch::stable::new_empty(q, {query.batch, query.query_tokens, query.heads, query.head_dim});
  Tensor lse = torch::stable::new_empty(q, {query.batch, query.query_tokens, query.heads}, ScalarType::Float);
  Arena& arena = Arena::mine();
  Arena::Scope scope(arena);
  const int64_t rows = query.batch * query.kv_heads;
  const DecodeCall call{query,
                        cache,
                        paging,
                        shadow,
                        bounds,
                        means,
                        means_paging,
                        selector,
                        prunes,
                        budget,
                        level,
                        options,
                        given,
                        limits.dense_below,
                        list_capacity,
                        out.has_value() ? out->mutable_data_ptr() : attended.mutable_data_ptr(),
                        lse.mutable_data_ptr<float>(),
                        kept_indices.has_value() ? kept_indices->mutable_data_ptr<int32_t>() : nullptr,
                        kept_counts.has_value() ? kept_counts->mutable_data_ptr<int32_t>() : nullptr,
                        arena.take<RowReport>(rows)};
  const bool reads_all = selector == Selector::kDense || selector == Selector::kFull;
  run_rows<DecodeRow>(call, rows, paging.longest(query.batch) * (reads_all ? 2 : 1));
  if (budget_counters.has_value())
    add_to_counters(call.reports, query.batch, query.kv_heads, budget_counters->mutable_data_ptr<int64_t>());
  return {attended, lse};
}

}  // namespace
}  // namespace twilight

STABLE_TORCH_LIBRARY_IMPL(TWILIGHT_NAMESPACE, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&twilight::decode_attention));
}
