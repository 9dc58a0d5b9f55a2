// twilight::select_tokens. Rows (sequence, KV head) in parallel; a row scores all its tokens, then ranks them.
#include "select_tokens.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "selection.h"

namespace twilight {

namespace {

// Positions of one part of a softmax, as places in memory.
template <class Refs>
struct PartRefs {
  static constexpr int64_t kTokens = SoftmaxRows::kPartItems;
  static_assert(kTokens % ShadowQuery::kPad == 0);

  PartRefs(const Paging& paging, int64_t b, const int32_t* positions, Range range)
      : refs{page, slot}, count(range.end - range.begin) {
    refs.fill(paging, b, positions == nullptr ? nullptr : positions + range.begin, range.begin, count,
              round_up(count, ShadowQuery::kPad));
  }

  int32_t page[kTokens], slot[kTokens];
  Refs refs;
  int64_t count;
};

}  // namespace

void prefix_logits(const ShadowQuery& query, const Paging& paging, int64_t b, const int32_t* positions, int64_t part,
                   SoftmaxRows& softmax, uint32_t* pairs) {
  const Range range = part_of(softmax.items(), part, SoftmaxRows::kPartItems);
  const auto score = [&](const auto& items) {
    query.logits(ShadowQuery::kPrefix, items.refs, items.count, pairs + range.begin, softmax.logits(0) + range.begin,
                 softmax.stride());
  };
  if (paging.page_size == 1) return score(PartRefs<TokenRefs>(paging, b, positions, range));
  score(PartRefs<RunRefs>(paging, b, positions, range));
}

void full_logits(const ShadowQuery& query, const Paging& paging, int64_t b, const PositionList& list, int64_t part,
                 const PrefixLogits& known, SoftmaxRows& softmax) {
  const Range range = part_of(softmax.items(), part, SoftmaxRows::kPartItems);
  const int64_t count = range.end - range.begin;
  uint32_t pairs[SoftmaxRows::kPartItems];
  float* out = softmax.logits(0) + range.begin;
  if (list.whole_pages) {
    const PartRefs<RunRefs> tokens(paging, b, list.positions, range);
    return query.logits(ShadowQuery::kBoth, tokens.refs, count, pairs, out, softmax.stride());
  }
  const PartRefs<TokenRefs> tokens(paging, b, list.positions, range);
  if (known.logits == nullptr)
    return query.logits(ShadowQuery::kBoth, tokens.refs, count, pairs, out, softmax.stride());

  for (int64_t i = 0; i < count; i += kLanes) {
    VecI item = {};
    std::memcpy(&item, known.items + range.begin + i, std::min<int64_t>(kLanes, count - i) * sizeof(int32_t));
    store(pairs + i, gather(known.pairs, item));
    for (int64_t r = 0; r < softmax.rows(); ++r)
      store(out + r * softmax.stride() + i,
            gather(reinterpret_cast<const uint32_t*>(known.logits + r * known.stride), item));
  }
  query.logits(ShadowQuery::kTail, tokens.refs, count, pairs, out, softmax.stride());
}

namespace {

struct SelectTokensCall {
  const Query& query;
  const Shadow& shadow;
  const Paging& paging;
  const Budget& budget;
  const PageLevel& level;
  int64_t capacity;
  int32_t *indices, *counts;
};

class SelectTokensRow : public SelectionRow {
 public:
  void prepare(const SelectTokensCall& call, int64_t row, Arena& arena) {
    const int64_t kv_heads = call.query.kv_heads, b = row / kv_heads, h = row % kv_heads;
    const TopK tokens(call.budget, h, call.paging.length(b), 1, call.capacity);
    start_tokens(tokens, call.budget, call.level, call.query, call.paging, b, h, /*keep_logits=*/false, arena);
    write_to(call.indices + row * call.capacity, call.counts + row, call.capacity);
    if (!scores_items()) return;
    query_.prepare(call.shadow, call.query, b, h, arena);
    use_tokens(query_, call.paging, b, arena);
  }

 private:
  ShadowQuery query_;
};

std::tuple<Tensor, Tensor> select_tokens(const Tensor& q, const Tensor& k_quant, const Tensor& k_scale,
                                         const Tensor& channel_order, const Tensor& prefix_channels,
                                         const OptionalTensor& k_center, const Tensor& page_table,
                                         const Tensor& seq_lens, int64_t token_budget, double budget_fraction,
                                         const OptionalTensor& head_token_budget, double sm_scale, int64_t sink_tokens,
                                         int64_t recent_tokens, const OptionalTensor& page_means,
                                         const OptionalTensor& means_scale, double page_fraction,
                                         int64_t min_scored_tokens) {
  Checker check("select_tokens", q);
  check.query(q);
  check.shadow(k_quant, k_scale, channel_order, prefix_channels, k_center);
  check.geometry();
  check.paging(page_table, seq_lens);
  check.budget(token_budget, budget_fraction, sink_tokens, recent_tokens, head_token_budget);
  check.scale(sm_scale);
  check.level(page_fraction, min_scored_tokens);
  check.means(page_means, means_scale, page_fraction < 1.0 ? "a tensor, because page_fraction is below 1" : nullptr);
  check.no_gradients();

  const Shadow shadow = Shadow::of_keys(k_quant, k_scale, channel_order, prefix_channels);
  const Query query(q, shadow.kv_heads, sm_scale);
  std::optional<Shadow> means;
  if (page_means.has_value()) means = Shadow::of_means(*page_means, *means_scale, channel_order, prefix_channels);
  const Paging paging(page_table, seq_lens, shadow.num_pages, shadow.page_size), means_paging = paging.of_means();
  const Limits limits(paging.max_tokens(), query.query_tokens, token_budget, sink_tokens, recent_tokens);
  const Budget budget(limits, budget_fraction, head_token_budget);
  const int64_t capacity = token_capacity(limits, budget_fraction);
  Tensor indices = torch::stable::new_empty(q, {query.batch, query.kv_heads, capacity}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(q, {query.batch, query.kv_heads}, ScalarType::Int);
  const PageLevel level(means, means_paging, paging, limits, budget_fraction, page_fraction, min_scored_tokens);
  const SelectTokensCall call{query,
                              shadow,
                              paging,
                              budget,
                              level,
                              capacity,
                              indices.mutable_data_ptr<int32_t>(),
                              counts.mutable_data_ptr<int32_t>()};
  run_rows<SelectTokensRow>(call, query.batch * query.kv_heads, paging.longest(query.batch));
  return {indices, counts};
}

}  // namespace
}  // namespace twilight

STABLE_TORCH_LIBRARY_IMPL(TWILIGHT_NAMESPACE, CPU, m) { m.impl("select_tokens", TORCH_BOX(&twilight::select_tokens)); }
