// Softmax over many items, cut into parts that threads may share; partial sums are added in the order of the parts.
#pragma once

#include "capacity.h"
#include "dot.h"
#include "parallel.h"

namespace twilight {

class SoftmaxRows {
 public:
  static constexpr int64_t kPartItems = 1024;

  // With `keep_logits` the exponentials do not replace the logits; with `by_level` they are of logits rounded as a
  // selection's are.
  void prepare(int64_t rows, int64_t capacity, bool keep_logits, bool by_level, Arena& arena) {
    rows_ = rows;
    by_level_ = by_level;
    const int64_t parts = ceil_div(capacity, kPartItems);
    // Not a multiple of 4096 bytes, or the same item of all rows would compete for one set of the cache.
    stride_ = parts * kPartItems + 80;
    values_ = arena.take<float>(round_up(rows, kRowPad) * stride_);
    logits_ = keep_logits ? arena.take<float>(round_up(rows, kRowPad) * stride_) : values_;
    peaks_ = arena.take<float>(parts * rows);
    totals_ = arena.take<float>(parts * rows);
    factors_ = arena.take<float>(parts * rows);
    broken_ = arena.take<uint8_t>(parts * rows);
  }

  void set_items(int64_t items) { items_ = items; }
  int64_t items() const { return items_; }
  int64_t rows() const { return rows_; }
  int64_t parts() const { return ceil_div(items_, kPartItems); }
  int64_t stride() const { return stride_; }
  float* logits(int64_t r) const { return logits_ + r * stride_; }
  float* row(int64_t r) const { return values_ + r * stride_; }

  // The logits of a part are in place: takes e^(logit - maximum of the part). NaN and +inf become +inf, stay out of
  // the maximum and the sum, and are noted.
  void exponentiate(int64_t part) {
    const Range range = part_of(items_, part, kPartItems);
    const int64_t end = round_up(range.end, kLanes);
    for (int64_t r = 0; r < rows_; ++r) {
      float *l = logits(r), *to = row(r);
      std::fill(l + range.end, l + end, -kInf);
      VecF peaks = splat(-kInf);
      VecI broken = {};
      for (int64_t i = range.begin; i < end; i += kLanes) {
        const VecF x = value(l + i);
        broken |= is_broken(x);
        peaks = max(peaks, x < kInf ? x : peaks);
      }
      const float peak = reduce_max(peaks);
      const bool any_broken = bits(broken) != 0;
      const VecF base = splat(peak == -kInf ? 0.0f : peak);
      VecF total = {};
      for (int64_t i = range.begin; i < end; i += kLanes) {
        const VecF x = value(l + i);
        VecF e = exp(x - base);
        if (any_broken) {
          const VecI out = is_broken(x);
          total += out ? VecF{} : e;
          e = out ? splat(kInf) : e;
        } else {
          total += e;
        }
        store(to + i, e);
      }
      peaks_[part * rows_ + r] = peak;
      broken_[part * rows_ + r] = any_broken;
      totals_[part * rows_ + r] = reduce_add(total);
    }
  }

  // Once all parts are done: what turns each part's exponentials into weights.
  void settle() {
    for (int64_t r = 0; r < rows_; ++r) {
      float peak = -kInf, total = 0;
      for (int64_t part = 0; part < parts(); ++part) peak = std::max(peak, peaks_[part * rows_ + r]);
      for (int64_t part = 0; part < parts(); ++part) {
        float& factor = factors_[part * rows_ + r];
        factor = peak == -kInf ? 1.0f : std::exp(peaks_[part * rows_ + r] - peak);
        total += factor * totals_[part * rows_ + r];
      }
      for (int64_t part = 0; part < parts(); ++part) factors_[part * rows_ + r] /= total == 0 ? 1.0f : total;
    }
  }

  float factor(int64_t part, int64_t r) const { return factors_[part * rows_ + r]; }
  bool is_part_broken(int64_t part, int64_t r) const { return broken_[part * rows_ + r]; }
  bool is_row_broken(int64_t r) const {
    for (int64_t part = 0; part < parts(); ++part)
      if (is_part_broken(part, r)) return true;
    return false;
  }

 private:
  VecF value(const float* logit) const {
    const VecF x = load(logit);
    if (!by_level_) return x;
    constexpr float kLevel = 0.693147180559945309f / kLogitLevels;
    const VecF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    return (x * (1.0f / kLevel) + magic - magic) * kLevel;
  }

  int64_t rows_ = 0, items_ = 0, stride_ = 0;
  bool by_level_ = false;
  float *logits_, *values_, *peaks_, *totals_, *factors_;
  uint8_t* broken_;
};

}  // namespace twilight
