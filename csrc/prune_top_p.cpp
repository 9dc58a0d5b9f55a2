// twilight::prune_top_p. Rows (sequence, KV head) in parallel: each query row finds its lowest bin, then the group's
// sets are united.
#include "prune_top_p.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace twilight {
namespace {

constexpr int kHighestBin = 0x3f800000 >> kWeightBinShift;  // of 1

inline int64_t mass_of(float w) { return static_cast<int64_t>(w * kMassUnit); }

inline float as_float(uint32_t key) {
  float w;
  std::memcpy(&w, &key, 4);
  return w;
}

inline uint32_t bin_of(float w) {
  uint32_t key;
  std::memcpy(&key, &w, 4);
  return key >> kWeightBinShift;
}

// Sum of trunc(w * 2^31), of the upper 20 bits and the lower 11 because vectors convert to signed 32-bit integers only.
int64_t total_mass(const float* weights, int64_t n) {
  constexpr int64_t kFlush = 1024;  // additions before a 32-bit lane could overflow
  int64_t total = 0, i = 0;
  while (i + kLanes <= n) {
    const int64_t stop = std::min(n - kLanes, i + (kFlush - 1) * kLanes);
    VecI high = {}, low = {};
    for (; i <= stop; i += kLanes) {
      const VecF scaled = load(weights + i) * 0x1p20f;
      const VecI whole = __builtin_convertvector(scaled, VecI);
      high += whole;
      low += __builtin_convertvector((scaled - __builtin_convertvector(whole, VecF)) * 0x1p11f, VecI);
    }
    for (int lane = 0; lane < kLanes; ++lane) total += (static_cast<int64_t>(high[lane]) << 11) + low[lane];
  }
  for (; i < n; ++i) total += mass_of(weights[i]);
  return total;
}

// Copies the bit patterns of the weights of at least `cutoff`.
int64_t collect(const float* weights, int64_t n, float cutoff, uint32_t* keys) {
  int64_t count = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VecF w = load(weights + i);
    count += compress(keys + count, (VecU)w, bits(w >= cutoff));
  }
  for (; i < n; ++i)
    if (weights[i] >= cutoff) std::memcpy(keys + count++, weights + i, 4);
  return count;
}

}  // namespace

PruneOptions::PruneOptions(double top_p, const OptionalTensor& head_top_p, const Limits& limits)
    : top_p(top_p),
      per_head(data_or_null<float>(head_top_p)),
      batch_stride(0),
      head_stride(0),
      sink_tokens(limits.sink_tokens),
      recent_tokens(limits.recent_tokens) {
  if (per_head == nullptr) return;
  if (head_top_p->size(0) > 1) batch_stride = head_top_p->stride(0);
  if (head_top_p->size(1) > 1) head_stride = head_top_p->stride(1);
}

TopP top_p_row(const float* weights, int64_t n, double p, Arena& arena) {
  if (n == 0) return {0.0f, 0.0f, false};
  if (p >= 1.0) return {0.0f, 1.0f, true};
  const int64_t total = total_mass(weights, n);
  if (total == 0) return {0.0f, 1.0f, true};
  const int64_t need = std::max<int64_t>(1, static_cast<int64_t>(std::ceil(p * static_cast<double>(total))));

  // Weights of at most this mass can be left out even together: the cut is not below the bin of such a weight.
  const int64_t spare = std::max<int64_t>((total - need) / n, 1);
  const uint32_t lowest = bin_of(static_cast<float>(spare) / kMassUnit);
  Arena::Scope scope(arena);
  uint32_t* keys = arena.take<uint32_t>(n + kLanes);
  const int64_t count = collect(weights, n, as_float(lowest << kWeightBinShift), keys);
  int64_t* bins = arena.take<int64_t>(kHighestBin + 1 - lowest);
  std::fill(bins, bins + kHighestBin + 1 - lowest, int64_t{0});
  for (int64_t i = 0; i < count; ++i) bins[(keys[i] >> kWeightBinShift) - lowest] += mass_of(as_float(keys[i]));
  int64_t bin = kHighestBin - lowest, reached = bins[bin];
  while (reached < need) reached += bins[--bin];
  const float mass = static_cast<float>(static_cast<double>(reached) / static_cast<double>(total));
  return {as_float((lowest + bin) << kWeightBinShift), mass, false};
}

int64_t union_of_rows(const float* const* weights, const TopP* rows, int64_t num_rows, const int32_t* positions,
                      int64_t n, int64_t length, const PruneOptions& options, int32_t* kept) {
  const bool everything = std::any_of(rows, rows + num_rows, [](const TopP& row) { return row.keep_all; });
  const int32_t sinks = static_cast<int32_t>(std::min(options.sink_tokens, length));
  const int32_t recent = static_cast<int32_t>(length - std::min(options.recent_tokens, length));
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t lanes = std::min<int64_t>(kLanes, n - i);
    VecI position = lane_index() + static_cast<int32_t>(i);
    if (positions != nullptr) std::memcpy(&position, positions + i, lanes * sizeof(int32_t));
    VecI keep = (position < sinks) | (position >= recent);
    if (!everything)
      for (int64_t r = 0; r < num_rows; ++r) keep |= load(weights[r] + i) >= rows[r].threshold;
    const uint32_t mask = (everything ? ~0u : bits(keep)) & ((1u << lanes) - 1);
    count += compress(kept + count, position, mask);
  }
  if (positions != nullptr && !std::is_sorted(kept, kept + count)) std::sort(kept, kept + count);
  return count;
}

namespace {

struct PruneCall {
  const float* weights;  // [B, T, Hq, N]
  const int32_t* seq_lens;
  const GivenCandidates& candidates;
  const PruneOptions& options;
  int64_t query_tokens, heads, kv_heads, slots;
  int32_t *indices, *counts;
  float* mass;
};

class PruneRow {
 public:
  static constexpr int kPhases = 2;  // thresholds, union

  void prepare(const PruneCall& call, int64_t row, Arena& arena) {
    call_ = &call;
    row_ = row;
    b_ = row / call.kv_heads;
    h_ = row % call.kv_heads;
    group_ = call.heads / call.kv_heads;
    rows_ = call.query_tokens * group_;
    length_ = std::max(call.seq_lens[b_], 0);
    top_p_ = arena.take<TopP>(rows_);
    weights_ = arena.take<const float*>(rows_);
    kept_ = arena.take<int32_t>(call.slots + kLanes);
    live_ = std::min(length_, call.slots);
    if (call.candidates.given) {
      positions_ = arena.take<int32_t>(call.slots);
      slots_ = arena.take<int32_t>(call.slots);
      live_ = 0;
      call.candidates.for_each(row, length_, [&](int64_t slot, int64_t position) {
        slots_[live_] = static_cast<int32_t>(slot);
        positions_[live_++] = static_cast<int32_t>(position);
      });
    }
    padded_ = round_up(live_, kLanes);
    own_ = arena.take<float>(rows_ * padded_);
  }

  int64_t parts(int phase) const { return phase == 0 ? rows_ : 1; }

  void run(int phase, int64_t part) {
    if (phase == 0) return find_threshold(part);
    const int64_t count = union_of_rows(weights_, top_p_, rows_, positions_, live_, length_, call_->options, kept_);
    int32_t* out = call_->indices + row_ * call_->slots;
    std::copy(kept_, kept_ + count, out);
    std::fill(out + count, out + call_->slots, -1);
    call_->counts[row_] = static_cast<int32_t>(count);
  }

 private:
  void find_threshold(int64_t r) {
    const int64_t head = h_ * group_ + r % group_;
    const int64_t index = (b_ * call_->query_tokens + r / group_) * call_->heads + head;
    const float* from = call_->weights + index * call_->slots;
    float* w = own_ + r * padded_;
    bool broken = false;
    for (int64_t i = 0; i < live_; ++i) {
      const float x = from[slots_ == nullptr ? i : slots_[i]];
      broken |= std::isnan(x);
      w[i] = x > 0 ? std::min(x, 1.0f) : 0.0f;
    }
    weights_[r] = w;
    top_p_[r] = broken ? TopP{0.0f, 1.0f, true} : top_p_row(w, live_, call_->options.p(b_, head), Arena::mine());
    call_->mass[index] = live_ == 0 ? 0.0f : top_p_[r].mass;
  }

  const PruneCall* call_;
  int64_t row_, b_, h_, group_, rows_, length_, live_, padded_;
  TopP* top_p_;
  const float** weights_;
  float* own_;
  int32_t *positions_ = nullptr, *slots_ = nullptr, *kept_;
};

std::tuple<Tensor, Tensor, Tensor> prune_top_p(const Tensor& weights, const Tensor& seq_lens,
                                               const OptionalTensor& indices, const OptionalTensor& counts,
                                               int64_t tokens_per_index, int64_t num_kv_heads, double top_p,
                                               const OptionalTensor& head_top_p, int64_t sink_tokens,
                                               int64_t recent_tokens) {
  Checker check("prune_top_p", weights);
  check.tensor("weights", weights, {"B", "T", "Hq", "N"}, {ScalarType::Float});
  const int64_t batch = weights.size(0), query_tokens = weights.size(1), heads = weights.size(2),
                slots = weights.size(3);
  if (query_tokens < 1) check.fail("weights", "at least 1 query token", std::to_string(query_tokens));
  check.at_least("num_kv_heads", num_kv_heads, 1);
  if (heads < 1 || heads % num_kv_heads != 0)
    check.fail("num_kv_heads", "a divisor of num_qo_heads = " + std::to_string(heads), std::to_string(num_kv_heads));
  check.bind("Hkv", num_kv_heads);
  check.tensor("seq_lens", seq_lens, {"B"}, {ScalarType::Int});
  check.candidates(indices, counts, tokens_per_index, 0);
  if (indices.has_value() && indices->size(2) * tokens_per_index != slots)
    check.fail("weights",
               "C * tokens_per_index = " + std::to_string(indices->size(2) * tokens_per_index) + " slots a row",
               std::to_string(slots));
  check.top_p(top_p, head_top_p);
  check.at_least("sink_tokens", sink_tokens, 0);
  check.at_least("recent_tokens", recent_tokens, 0);
  check.no_gradients();

  const GivenCandidates candidates(indices, counts, tokens_per_index);
  const Limits limits(kMaxTokens, query_tokens, /*token_budget=*/1, sink_tokens, recent_tokens);
  const PruneOptions options(top_p, head_top_p, limits);
  Tensor kept = torch::stable::new_empty(weights, {batch, num_kv_heads, slots}, ScalarType::Int);
  Tensor kept_counts = torch::stable::new_empty(weights, {batch, num_kv_heads}, ScalarType::Int);
  Tensor mass = torch::stable::new_empty(weights, {batch, query_tokens, heads}, ScalarType::Float);
  const PruneCall call{weights.const_data_ptr<float>(),
                       seq_lens.const_data_ptr<int32_t>(),
                       candidates,
                       options,
                       query_tokens,
                       heads,
                       num_kv_heads,
                       slots,
                       kept.mutable_data_ptr<int32_t>(),
                       kept_counts.mutable_data_ptr<int32_t>(),
                       mass.mutable_data_ptr<float>()};
  run_rows<PruneRow>(call, batch * num_kv_heads, slots / 4);
  return {kept, kept_counts, mass};
}

}  // namespace
}  // namespace twilight

STABLE_TORCH_LIBRARY_IMPL(TWILIGHT_NAMESPACE, CPU, m) { m.impl("prune_top_p", TORCH_BOX(&twilight::prune_top_p)); }
