// twilight::select_pages. Rows (sequence, KV head) in parallel; a row scores its pages by bounds or means, then ranks
// them.
#include "select_pages.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "selection.h"

namespace twilight {

void PageScorer::prepare(const PageBounds& bounds, const Paging& paging, const Query& query, int64_t b, int64_t h,
                         Arena& arena) {
  bounds_ = &bounds;
  paging_ = &paging;
  b_ = b;
  h_ = h;
  rows_ = query.rows;
  finite_ = true;
  const int64_t dim = bounds.head_dim, padded = round_up(rows_, kRowPad);
  q_ = arena.take<float>(padded * 2 * dim);
  total_ = arena.take<float>(padded);
  std::fill(q_, q_ + padded * 2 * dim, 0.0f);
  float* natural = arena.take<float>(dim);
  for (int64_t r = 0; r < rows_; ++r) {
    query.load(b, h, r, natural);
    total_[r] = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const float x = natural[d];
      q_[r * 2 * dim + d] = x > 0 ? 0 : x;
      q_[r * 2 * dim + dim + d] = x < 0 ? 0 : x;
      total_[r] += x;
      finite_ = finite_ && std::isfinite(x);
    }
  }
}

void PageScorer::score(int64_t part, SoftmaxRows& softmax) const {
  const Range range = part_of(softmax.items(), part, SoftmaxRows::kPartItems);
  constexpr int64_t kBlock = 64;
  const int64_t length = 2 * bounds_->head_dim;
  const bool coded = bounds_->scale.data != nullptr;
  const void* rows[kBlock];
  uint32_t pairs[kBlock];
  float decoded[512];  // one page's bounds, for queries with Inf or NaN: 0 * Inf must not arise from a code of 0
  for (int64_t begin = range.begin; begin < range.end; begin += kBlock) {
    const int64_t n = std::min(kBlock, range.end - begin);
    for (int64_t i = 0; i < round_up(n, kLanes); ++i) {
      const int64_t page = paging_->page(b_, begin + std::min(i, n - 1));
      rows[i] = bounds_->bounds.at<const char>(page, h_);
      if (coded) pairs[i] = *bounds_->scale.at<const uint32_t>(page, h_);
    }
    if (coded && !finite_) {
      for (int64_t i = 0; i < n; ++i) {
        const VecF scale = (VecF)(VecU{} + (pairs[i] << 16)), zero = (VecF)(VecU{} + (pairs[i] & 0xffff0000u));
        for (int64_t d = 0; d < length; ++d) decoded[d] = static_cast<const uint8_t*>(rows[i])[d] * scale[0] + zero[0];
        for (int64_t r = 0; r < rows_; ++r) {
          float sum = 0;
          for (int64_t d = 0; d < length; ++d) sum += q_[r * length + d] * decoded[d];
          softmax.logits(r)[begin + i] = sum;
        }
      }
      continue;
    }
    bounds_->kernels->dot(rows, n, length, q_, rows_, softmax.logits(0) + begin, softmax.stride());
    if (!coded) continue;
    for (int64_t i = 0; i < n; i += kLanes) {
      const VecU pair = load<VecU>(pairs + i);
      const VecF scale = (VecF)(pair << 16), zero = (VecF)(pair & 0xffff0000u);
      for (int64_t r = 0; r < rows_; ++r) {
        float* l = softmax.logits(r) + begin + i;
        store(l, scale * load(l) + zero * total_[r]);
      }
    }
  }
}

namespace {

struct SelectPagesCall {
  const Query& query;
  const std::optional<PageBounds>& bounds;  // or
  const std::optional<Shadow>& means;
  const Paging &paging, &means_paging;
  const Budget& budget;
  int64_t capacity;
  int32_t *indices, *counts;
};

class SelectPagesRow : public SelectionRow {
 public:
  void prepare(const SelectPagesCall& call, int64_t row, Arena& arena) {
    const int64_t kv_heads = call.query.kv_heads, b = row / kv_heads, h = row % kv_heads;
    start(TopK(call.budget, h, call.paging.length(b), call.paging.page_size, call.capacity), call.query.rows,
          /*keep_logits=*/false, arena);
    write_to(call.indices + row * call.capacity, call.counts + row, call.capacity);
    if (takes_all()) return;
    if (call.bounds.has_value()) return use_pages(*call.bounds, call.paging, call.query, b, h, arena);
    means_query_.prepare(*call.means, call.query, b, h, arena);
    use_tokens(means_query_, call.means_paging, b, arena);
  }

 private:
  ShadowQuery means_query_;
};

std::tuple<Tensor, Tensor> select_pages(const Tensor& q, const OptionalTensor& page_bounds,
                                        const OptionalTensor& bounds_scale, const Tensor& page_table,
                                        const Tensor& seq_lens, int64_t page_size, int64_t token_budget,
                                        double budget_fraction, const OptionalTensor& head_token_budget,
                                        double sm_scale, int64_t sink_tokens, int64_t recent_tokens,
                                        const OptionalTensor& page_means, const OptionalTensor& means_scale,
                                        const OptionalTensor& k_quant, const OptionalTensor& k_scale,
                                        const OptionalTensor& channel_order, const OptionalTensor& prefix_channels,
                                        const OptionalTensor& k_center) {
  Checker check("select_pages", q);
  check.query(q);
  const bool by_mean = page_means.has_value() || means_scale.has_value();
  if (by_mean) {
    check.absent("page_bounds", page_bounds, "None, because page_means is given");
    check.absent("bounds_scale", bounds_scale, "None, because page_means is given");
    check.means(page_means, means_scale);
  } else {
    check.given("page_bounds", page_bounds, "a tensor");
    check.bounds(*page_bounds, bounds_scale);
  }
  check.bind("S", page_size);
  check.geometry();
  check.paging(page_table, seq_lens);
  check.shadow_if_any(k_quant, k_scale, channel_order, prefix_channels, k_center);
  check.budget(token_budget, budget_fraction, sink_tokens, recent_tokens, head_token_budget);
  check.scale(sm_scale);
  check.no_gradients();

  const Tensor& pages = by_mean ? *page_means : *page_bounds;
  const Query query(q, pages.size(1), sm_scale);
  std::optional<PageBounds> bounds;
  std::optional<Shadow> means;
  if (by_mean) {
    means = Shadow::of_means(*page_means, *means_scale, channel_order, std::nullopt);
  } else {
    bounds.emplace(*page_bounds, bounds_scale);
  }
  const Paging paging(page_table, seq_lens, pages.size(0), page_size), means_paging = paging.of_means();
  const Limits limits(paging.max_tokens(), query.query_tokens, token_budget, sink_tokens, recent_tokens);
  const Budget budget(limits, budget_fraction, head_token_budget);
  const int64_t capacity = page_capacity(limits, page_size, budget_fraction);
  Tensor indices = torch::stable::new_empty(q, {query.batch, query.kv_heads, capacity}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(q, {query.batch, query.kv_heads}, ScalarType::Int);
  const SelectPagesCall call{query,
                             bounds,
                             means,
                             paging,
                             means_paging,
                             budget,
                             capacity,
                             indices.mutable_data_ptr<int32_t>(),
                             counts.mutable_data_ptr<int32_t>()};
  run_rows<SelectPagesRow>(call, query.batch * query.kv_heads, paging.longest(query.batch) / page_size);
  return {indices, counts};
}

}  // namespace
}  // namespace twilight

STABLE_TORCH_LIBRARY_IMPL(TWILIGHT_NAMESPACE, CPU, m) { m.impl("select_pages", TORCH_BOX(&twilight::select_pages)); }
