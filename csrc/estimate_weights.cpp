// twilight::estimate_weights. Rows (sequence, KV head) in parallel: exponentials of the live candidates' logits, their
// sums, then one query row at a time.
#include "estimate_weights.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace twilight {

void EstimateRow::start(const ShadowQuery& shadow_query, const Paging& paging, const Query& query, int64_t b,
                        int64_t capacity, Arena& arena) {
  shadow_query_ = &shadow_query;
  paging_ = &paging;
  query_ = &query;
  b_ = b;
  length_ = paging.length(b);
  softmax_.prepare(query.rows, capacity, /*keep_logits=*/false, /*by_level=*/false, arena);
}

void EstimateRow::run(int phase, int64_t part) {
  if (phase == 1) return softmax_.settle();
  const Range range = part_of(softmax_.items(), part, SoftmaxRows::kPartItems);
  full_logits(*shadow_query_, *paging_, b_, list_, part, known_, softmax_);
  if (query_->caps())
    for (int64_t r = 0; r < query_->rows; ++r)
      query_->cap(softmax_.logits(r) + range.begin, range.end - range.begin, shadow_query_->center_logit(r));
  // Only a token of this very step can be too new for one of its queries.
  for (int64_t r = 0; r < query_->rows; ++r) {
    const int64_t horizon = query_->horizon(length_, r);
    if (horizon >= length_ - 1) continue;
    float* l = softmax_.logits(r);
    for (int64_t i = range.begin; i < range.end; ++i)
      if (position(i) > horizon) l[i] = -kInf;
  }
  softmax_.exponentiate(part);
}

bool EstimateRow::weights(int64_t r) {
  if (softmax_.is_row_broken(r)) return false;
  float* w = softmax_.row(r);
  for (int64_t part = 0; part < softmax_.parts(); ++part) {
    const VecF factor = splat(softmax_.factor(part, r));
    const Range range = part_of(softmax_.items(), part, SoftmaxRows::kPartItems);
    for (int64_t i = range.begin; i < range.end; i += kLanes) {
      const VecF x = load(w + i) * factor;
      store(w + i, x > 1.0f ? splat(1.0f) : x);  // the factor may have been rounded up
    }
  }
  return true;
}

namespace {

struct EstimateCall {
  const Query& query;
  const Shadow& shadow;
  const Paging& paging;
  const GivenCandidates& candidates;
  int64_t slots;
  float* weights;
};

class EstimateOpRow : public EstimateRow {
 public:
  static constexpr int kPhases = EstimateRow::kPhases + 1;

  void prepare(const EstimateCall& call, int64_t row, Arena& arena) {
    call_ = &call;
    b_ = row / call.query.kv_heads;
    h_ = row % call.query.kv_heads;
    const int64_t length = call.paging.length(b_);
    shadow_query_.prepare(call.shadow, call.query, b_, h_, arena);
    if (!call.candidates.given) {
      start(shadow_query_, call.paging, call.query, b_, length, arena);
      return set_positions({nullptr, true}, length);
    }
    const int64_t listed = call.candidates.listed(row) * call.candidates.unit;
    start(shadow_query_, call.paging, call.query, b_, listed, arena);
    int32_t* positions = arena.take<int32_t>(listed);
    slots_ = arena.take<int32_t>(listed);
    int64_t live = 0;
    call.candidates.for_each(row, length, [&](int64_t slot, int64_t position) {
      slots_[live] = static_cast<int32_t>(slot);
      positions[live++] = static_cast<int32_t>(position);
    });
    // Only a list in ascending order has its partial page at the end.
    const bool ascending = std::is_sorted(positions, positions + live);
    set_positions({positions, call.candidates.unit > 1 && ascending}, live);
  }

  int64_t parts(int phase) const {
    return phase < EstimateRow::kPhases ? EstimateRow::parts(phase) : call_->query.rows;
  }

  void run(int phase, int64_t part) {
    if (phase < EstimateRow::kPhases) return EstimateRow::run(phase, part);
    const int64_t r = part;
    float* out = call_->weights + call_->query.out_row(b_, h_, r) * call_->slots;
    std::fill(out, out + call_->slots, 0.0f);
    const bool sound = weights(r);
    const float* w = softmax().row(r);
    const int64_t horizon = call_->query.horizon(call_->paging.length(b_), r);
    for (int64_t i = 0; i < softmax().items(); ++i) {
      const int64_t slot = slots_ == nullptr ? i : slots_[i];
      out[slot] = sound ? w[i] : (position(i) <= horizon ? NAN : 0.0f);
    }
  }

 private:
  const EstimateCall* call_;
  int64_t b_, h_;
  int32_t* slots_ = nullptr;
  ShadowQuery shadow_query_;
};

Tensor estimate_weights(const Tensor& q, const Tensor& k_quant, const Tensor& k_scale, const Tensor& channel_order,
                        const Tensor& prefix_channels, const OptionalTensor& k_center, const Tensor& page_table,
                        const Tensor& seq_lens, const OptionalTensor& indices, const OptionalTensor& counts,
                        int64_t tokens_per_index, double sm_scale, std::optional<double> softcap) {
  Checker check("estimate_weights", q);
  check.query(q);
  check.shadow(k_quant, k_scale, channel_order, prefix_channels, k_center);
  check.geometry();
  check.paging(page_table, seq_lens);
  check.candidates(indices, counts, tokens_per_index, k_scale.size(2));
  check.scale(sm_scale);
  check.softcap(softcap);
  check.no_gradients();

  const Shadow shadow = Shadow::of_keys(k_quant, k_scale, channel_order, prefix_channels, k_center);
  const Query query(q, shadow.kv_heads, sm_scale, softcap);
  const Paging paging(page_table, seq_lens, shadow.num_pages, shadow.page_size);
  const GivenCandidates candidates(indices, counts, tokens_per_index);
  const int64_t slots = indices.has_value() ? candidates.capacity * tokens_per_index : paging.max_tokens();
  Tensor weights =
      torch::stable::new_empty(q, {query.batch, query.query_tokens, query.heads, slots}, ScalarType::Float);
  const EstimateCall call{query, shadow, paging, candidates, slots, weights.mutable_data_ptr<float>()};
  run_rows<EstimateOpRow>(call, query.batch * query.kv_heads, 2 * paging.longest(query.batch));
  return weights;
}

}  // namespace
}  // namespace twilight

STABLE_TORCH_LIBRARY_IMPL(TWILIGHT_NAMESPACE, CPU, m) {
  m.impl("estimate_weights", TORCH_BOX(&twilight::estimate_weights));
}
