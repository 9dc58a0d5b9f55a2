#include "shadow.h"

#include "dot.h"

namespace twilight {

void ShadowQuery::prepare(const Shadow& shadow, const Query& query, int64_t b, int64_t h, Arena& arena) {
  shadow_ = &shadow;
  h_ = h;
  rows_ = query.rows;
  const int64_t dim = shadow.head_dim, padded = round_up(rows_, kRowPad);
  prefix_words_ = shadow.prefix_words(h);
  tail_words_ = dim / 8 - prefix_words_;

  q_ = arena.take<float>(padded * dim);
  for (float*& totals : totals_) {
    totals = arena.take<float>(padded);
    std::fill(totals, totals + padded, 0.0f);
  }
  std::fill(q_ + rows_ * dim, q_ + padded * dim, 0.0f);
  float* natural = arena.take<float>(dim);
  one_by_one_ = false;
  for (int64_t r = 0; r < rows_; ++r) {
    query.load(b, h, r, natural);
    for (int64_t j = 0; j < dim; ++j) {
      const float x = natural[shadow.channel(h, j)];
      q_[r * dim + j] = x;
      totals_[j < 8 * prefix_words_ ? 0 : 1][r] += x;
      if (!std::isfinite(x)) one_by_one_ = true;
    }
  }
}

// Copies n words; up to a register more may be overwritten with anything.
inline void copy_words(uint32_t* to, const uint32_t* from, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load<VecU>(from + i));
  if (i < n) store(to + i, load_first(from + i, static_cast<int>(n - i)));
}

// Plain loads only, so that many cache misses are under way at once: gathers would wait for each other's lines, and arithmetic in
// between would fill the core's window. Software prefetch, in one go or between the multiplications, measured slower.
void ShadowQuery::fill(Half half, Stage& stage, const TokenRefs& refs, int64_t count, uint32_t* pairs) const {
  const int64_t size = shadow_->page_size, page_words = size * shadow_->head_dim / 8;
  const int64_t prefix = prefix_words_, tail = tail_words_;
  for (int64_t i = 0; i < count; i += kLanes) {
    const VecI page = load<VecI>(refs.page + i), slot = load<VecI>(refs.slot + i);
    const bool run = bits((page == splat(page[0])) & (slot - lane_index() == splat(slot[0]))) == kAllLanes;
    // A run of tokens that follow each other in a page is copied as one.
    const int64_t tokens = run ? kLanes : 1;
    for (int64_t t = i; t < i + kLanes; t += tokens) {
      const int64_t block = refs.page[t] * shadow_->kv_heads + h_, at = refs.slot[t];
      const uint32_t* from = shadow_->codes + block * page_words;
      if (half != kTail) copy_words(stage.prefix + t * prefix, from + at * prefix, tokens * prefix);
      if (half != kPrefix) copy_words(stage.tail + t * tail, from + size * prefix + at * tail, tokens * tail);
      if (half == kTail) continue;
      const uint32_t* own = shadow_->scale + block * size + at;
      if (run) {
        store(pairs + t, load<VecU>(own));
      } else {
        pairs[t] = *own;
      }
    }
  }
}

template <int kRows, int kBlocks>
void ShadowQuery::multiply(Half half, const Stage& stage, const uint32_t* pairs, int64_t count, int64_t first_row,
                           float* out, int64_t out_stride) const {
  const int64_t dim = shadow_->head_dim, words = half == kTail ? tail_words_ : prefix_words_;
  const uint32_t* codes = half == kTail ? stage.tail : stage.prefix;
  const float* q = q_ + first_row * dim + (half == kTail ? 8 * prefix_words_ : 0);
  const float* totals = totals_[half == kTail] + first_row;
  const VecI offsets = lane_index() * static_cast<int32_t>(words);
  for (int64_t i = 0; i < count; i += kBlocks * kLanes) {
    VecF sum[kRows][kBlocks];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) sum[r][b] = VecF{};
    for (int64_t w = 0; w < words; ++w) {
      VecU word[kBlocks];
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) word[b] = gather(codes + (i + b * kLanes) * words + w, offsets);
#pragma GCC unroll 8
      for (int n = 0; n < 8; ++n) {
        VecF code[kBlocks];
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) code[b] = nibble(word[b], n);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const VecF factor = splat(q[r * dim + 8 * w + n]);
#pragma GCC unroll 4
          for (int b = 0; b < kBlocks; ++b) sum[r][b] += factor * code[b];
        }
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const VecU pair = load<VecU>(pairs + i + b * kLanes);
      const VecF scale = (VecF)(pair << 16), zero = (VecF)(pair & 0xffff0000u);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        float* to = out + (first_row + r) * out_stride + i + b * kLanes;
        const VecF logit = scale * sum[r][b] + zero * totals[r];
        store(to, half == kTail ? load(to) + logit : logit);
      }
    }
  }
}

void ShadowQuery::multiply_all(Half half, const Stage& stage, const uint32_t* pairs, int64_t count, float* out,
                               int64_t out_stride) const {
  constexpr int kBlocks = kLanes == 16 ? 4 : 2;  // of four rows, as many as there are registers for
  for (int64_t r = 0; r < rows_; r += 4) {
    switch (rows_ - r) {
      case 1:
        multiply<1, 4>(half, stage, pairs, count, r, out, out_stride);
        break;
      case 2:
        multiply<2, 4>(half, stage, pairs, count, r, out, out_stride);
        break;
      default:
        multiply<4, kBlocks>(half, stage, pairs, count, r, out, out_stride);
    }
  }
}

void ShadowQuery::one_by_one(Half half, const TokenRefs& refs, int64_t count, uint32_t* pairs, float* out,
                             int64_t out_stride) const {
  const int64_t dim = shadow_->head_dim, size = shadow_->page_size;
  const int64_t begin = half == kTail ? prefix_words_ : 0, end = half == kPrefix ? prefix_words_ : dim / 8;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = refs.page[i] * shadow_->kv_heads + h_, slot = refs.slot[i];
    const uint32_t pair = pairs[i] = shadow_->scale[block * size + slot];
    const VecF scale = (VecF)(VecU{} + (pair << 16)), zero = (VecF)(VecU{} + (pair & 0xffff0000u));
    const uint32_t* words = shadow_->codes + block * size * dim / 8;
    for (int64_t r = 0; r < rows_; ++r) {
      float sum = half == kTail ? out[r * out_stride + i] : 0;
      for (int64_t w = begin; w < end; ++w) {
        const uint32_t word = w < prefix_words_
                                  ? words[slot * prefix_words_ + w]
                                  : words[size * prefix_words_ + slot * tail_words_ + w - prefix_words_];
        for (int n = 0; n < 8; ++n)
          sum += q_[r * dim + 8 * w + n] * (static_cast<float>(word >> (4 * n) & 15) * scale[0] + zero[0]);
      }
      out[r * out_stride + i] = sum;
    }
  }
}

void ShadowQuery::logits(Half half, const TokenRefs& refs, int64_t count, uint32_t* pairs, float* out,
                         int64_t out_stride) const {
  if (one_by_one_) return one_by_one(half, refs, count, pairs, out, out_stride);
  Stage stage;
  for (int64_t i = 0; i < count; i += kStage) {
    const int64_t n = std::min(kStage, count - i);
    fill(half, stage, {refs.page + i, refs.slot + i}, round_up(n, kPad), pairs + i);
    if (half != kTail) multiply_all(kPrefix, stage, pairs + i, n, out + i, out_stride);
    if (half != kPrefix) multiply_all(kTail, stage, pairs + i, n, out + i, out_stride);
  }
}

}  // namespace twilight
