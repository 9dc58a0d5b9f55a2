// twilight::attend_sparse. Rows (sequence, KV head) in parallel; a row reads each listed K and V once for all query
// heads of its group, in parts of 512 tokens whose results are merged in order.
#include "attend_sparse.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace twilight {

void AttendRow::start(const KVCache& cache, const Paging& paging, const Query& query, int64_t b, int64_t h,
                      int64_t capacity, void* out, float* lse, Arena& arena) {
  cache_ = &cache;
  paging_ = &paging;
  query_ = &query;
  b_ = b;
  h_ = h;
  length_ = paging.length(b);
  padded_rows_ = round_up(query.rows, kRowPad);
  out_ = out;
  lse_ = lse;
  const int64_t parts = ceil_div(capacity, kPartTokens);
  q_ = arena.take<float>(padded_rows_ * query.head_dim);
  states_ = arena.take<State>(parts * padded_rows_);
  partial_ = arena.take<float>(parts * padded_rows_ * query.head_dim);
  std::fill(q_, q_ + padded_rows_ * query.head_dim, 0.0f);
  shifts_ = arena.take<float>(query.rows);
  for (int64_t r = 0; r < query.rows; ++r) {
    float* q = q_ + r * query.head_dim;
    query.load(b, h, r, q);
    VecF shift = {};
    for (int64_t d = 0; d < query.head_dim && cache.k_shift != nullptr; d += kLanes)
      shift += load(q + d) * load(cache.k_shift + h * query.head_dim + d);
    shifts_[r] = reduce_add(shift);
    for (int64_t d = 0; d < query.head_dim && cache.k_descale != nullptr; ++d) q[d] *= cache.k_descale[h];
  }
}

void AttendRow::attend(int64_t part) {
  const int64_t dim = query_->head_dim, rows = query_->rows;
  const int64_t row_bytes = dim * cache_->kernels->element_size;
  Arena& arena = Arena::mine();
  Arena::Scope scope(arena);
  float* logits = arena.take<float>(padded_rows_ * kPartTokens);
  int32_t page[kPartTokens], slot[kPartTokens];
  const void *keys[kPartTokens], *values[kPartTokens];

  const Range range = part_of(count_, part, kPartTokens);
  const int64_t n = range.end - range.begin, padded = round_up(n, kLanes);
  const int32_t* listed = positions_ == nullptr ? nullptr : positions_ + range.begin;
  const auto position = [&](int64_t i) { return listed == nullptr ? range.begin + i : listed[i]; };
  TokenRefs{page, slot}.fill(*paging_, b_, listed, range.begin, n, padded);
  for (int64_t i = 0; i < padded; ++i) {
    keys[i] = cache_->k.at<const char>(page[i], h_) + slot[i] * row_bytes;
    values[i] = cache_->v.at<const char>(page[i], h_) + slot[i] * row_bytes;
  }
  cache_->kernels->dot(keys, n, dim, q_, rows, logits, kPartTokens);

  for (int64_t r = 0; r < padded_rows_; ++r) {
    float* l = logits + r * kPartTokens;
    if (r >= rows) {
      std::fill(l, l + padded, 0.0f);
      continue;
    }
    if (query_->caps()) query_->cap(l, n, shifts_[r]);
    std::fill(l + n, l + padded, -kInf);
    const int64_t horizon = query_->horizon(length_, r);
    if (horizon < length_ - 1)
      for (int64_t i = 0; i < n; ++i)
        if (position(i) > horizon) l[i] = -kInf;

    VecF peaks = splat(-kInf);
    VecI nan = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const VecF x = load(l + i);
      peaks = max(peaks, x);
      nan |= x != x;
    }
    const float peak = reduce_max(peaks);
    const VecF base = splat(peak == -kInf ? 0.0f : peak);
    VecF total = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const VecF e = exp(load(l + i) - base);
      total += e;
      store(l + i, e);
    }
    states_[part * padded_rows_ + r] = {peak, reduce_add(total), bits(nan) != 0};
  }

  float* out = partial_ + part * padded_rows_ * dim;
  std::fill(out, out + padded_rows_ * dim, 0.0f);
  const int64_t oldest_horizon = query_->horizon(length_, 0);
  bool all_visible = true;
  for (int64_t i = 0; i < n; ++i) all_visible &= position(i) <= oldest_horizon;
  if (all_visible) return cache_->kernels->accumulate(values, n, dim, logits, kPartTokens, rows, out);
  // What a query token does not see has weight 0, which would let a NaN through: its value is replaced by zeros.
  char* zeros = arena.take<char>(row_bytes);
  std::fill(zeros, zeros + row_bytes, char{0});
  const void* seen[kPartTokens];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t horizon = query_->horizon(length_, r);
    for (int64_t i = 0; i < n; ++i) seen[i] = position(i) <= horizon ? values[i] : zeros;
    cache_->kernels->accumulate(seen, n, dim, logits + r * kPartTokens, kPartTokens, 1, out + r * dim);
  }
}

void AttendRow::merge() {
  const int64_t dim = query_->head_dim, parts = num_parts();
  Arena& arena = Arena::mine();
  Arena::Scope scope(arena);
  float* sum = arena.take<float>(dim);
  for (int64_t r = 0; r < query_->rows; ++r) {
    float peak = -kInf, total = 0;
    bool has_nan = false;
    for (int64_t part = 0; part < parts; ++part) {
      const State& state = states_[part * padded_rows_ + r];
      peak = std::max(peak, state.peak);
      has_nan |= state.has_nan;
    }
    std::fill(sum, sum + dim, 0.0f);
    for (int64_t part = 0; part < parts; ++part) {
      const State& state = states_[part * padded_rows_ + r];
      const float factor = peak == -kInf ? 1.0f : std::exp(state.peak - peak);
      total += factor * state.total;
      const float* from = partial_ + (part * padded_rows_ + r) * dim;
      for (int64_t d = 0; d < dim; ++d) sum[d] += factor * from[d];
    }
    const float inverse = total == 0 ? 0.0f : (cache_->v_descale == nullptr ? 1.0f : cache_->v_descale[h_]) / total;
    for (int64_t d = 0; d < dim; ++d) sum[d] = total == 0 ? 0.0f : sum[d] * inverse;
    const int64_t row = query_->out_row(b_, h_, r);
    const ElementKernels& kernels = element_kernels(query_->dtype);
    kernels.narrow(sum, dim, static_cast<char*>(out_) + row * dim * kernels.element_size);
    const float lse = peak + std::log(total);
    lse_[row] = peak == kInf && !has_nan ? kInf : query_->caps() ? lse : lse + shifts_[r];
  }
}

namespace {

struct AttendCall {
  const KVCache& cache;
  const Paging& paging;
  const Query& query;
  const GivenCandidates& candidates;
  void* out;
  float* lse;
};

class AttendOpRow : public AttendRow {
 public:
  void prepare(const AttendCall& call, int64_t row, Arena& arena) {
    const int64_t b = row / call.query.kv_heads, h = row % call.query.kv_heads, length = call.paging.length(b);
    int64_t count = length;
    int32_t* positions = nullptr;
    if (call.candidates.given) {
      positions = arena.take<int32_t>(call.candidates.listed(row) * call.candidates.unit);
      count = 0;
      call.candidates.for_each(row, length,
                               [&](int64_t, int64_t position) { positions[count++] = static_cast<int32_t>(position); });
    }
    start(call.cache, call.paging, call.query, b, h, count, call.out, call.lse, arena);
    set_positions(positions, count);
  }
};

std::tuple<Tensor, Tensor> attend_sparse(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                         const Tensor& page_table, const Tensor& seq_lens,
                                         const OptionalTensor& indices, const OptionalTensor& counts,
                                         int64_t tokens_per_index, double sm_scale, const OptionalTensor& k_descale,
                                         const OptionalTensor& v_descale, const OptionalTensor& k_shift,
                                         std::optional<double> softcap) {
  Checker check("attend_sparse", q);
  check.query(q);
  check.cache(k_cache, v_cache);
  check.geometry();
  check.paging(page_table, seq_lens);
  check.candidates(indices, counts, tokens_per_index, k_cache.size(2));
  check.scale(sm_scale);
  check.scales(k_descale, v_descale, k_shift, k_cache.scalar_type());
  check.softcap(softcap);
  check.no_gradients();

  const KVCache cache(k_cache, v_cache, k_descale, v_descale, k_shift);
  const Query query(q, cache.kv_heads, sm_scale, softcap);
  const Paging paging(page_table, seq_lens, cache.num_pages, cache.page_size);
  const GivenCandidates candidates(indices, counts, tokens_per_index);
  Tensor out = torch::stable::new_empty(q, {query.batch, query.query_tokens, query.heads, query.head_dim});
  Tensor lse = torch::stable::new_empty(q, {query.batch, query.query_tokens, query.heads}, ScalarType::Float);
  const AttendCall call{cache, paging, query, candidates, out.mutable_data_ptr(), lse.mutable_data_ptr<float>()};
  run_rows<AttendOpRow>(call, query.batch * query.kv_heads, 2 * paging.longest(query.batch));
  return {out, lse};
}

}  // namespace
}  // namespace twilight

STABLE_TORCH_LIBRARY_IMPL(TWILIGHT_NAMESPACE, CPU, m) { m.impl("attend_sparse", TORCH_BOX(&twilight::attend_sparse)); }
