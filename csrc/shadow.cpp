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

float ShadowQuery::center_logit(int64_t r) const {
  if (shadow_->center == nullptr) return 0;
  const int64_t dim = shadow_->head_dim;
  float sum = 0;
  for (int64_t j = 0; j < dim; ++j) sum += q_[r * dim + j] * shadow_->center[h_ * dim + shadow_->channel(h_, j)];
  return sum;
}

// Copies n words; up to a register more may be overwritten with anything.
inline void copy_words(uint32_t* to, const uint32_t* from, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load<VecU>(from + i));
  if (i < n) store(to + i, load_first(from + i, static_cast<int>(n - i)));
}

// Tokens an entry stands for.
template <class Refs>
constexpr int64_t kTokensPerRef = std::is_same_v<Refs, RunRefs> ? kLanes : 1;

// Plain loads only, so that many cache misses are under way at once: gathers would wait for each other's lines, and
// arithmetic in between would fill the core's window.
template <class Refs>
void ShadowQuery::fill(Half half, Stage& stage, const Refs& refs, int64_t count, uint32_t* pairs) const {
  constexpr int64_t kTokens = kTokensPerRef<Refs>;
  const int64_t size = shadow_->page_size;
  const int64_t prefix = prefix_words_, tail = tail_words_;
  for (int64_t t = 0; t < count; t += kTokens) {
    const int64_t page = refs.page[t / kTokens], at = refs.slot[t / kTokens];
    const uint32_t* from = shadow_->codes.at<const uint32_t>(page, h_);
    if (half != kTail) copy_words(stage.prefix + t * prefix, from + at * prefix, kTokens * prefix);
    if (half != kPrefix) copy_words(stage.tail + t * tail, from + size * prefix + at * tail, kTokens * tail);
    if (half != kTail)
      std::memcpy(pairs + t, shadow_->scale.at<const uint32_t>(page, h_) + at, kTokens * sizeof(uint32_t));
  }
}

template <class Refs>
void ShadowQuery::list_lines(Half half, const Refs& refs, int64_t count, Ahead& ahead) const {
  constexpr int64_t kTokens = kTokensPerRef<Refs>;
  const int64_t size = shadow_->page_size, prefix = prefix_words_, tail = tail_words_;
  const auto add = [&](const uint32_t* from, int64_t words) {
    for (int64_t w = 0; w < words; w += 16) ahead.lines[ahead.count++] = from + w;
    if (words > 0) ahead.lines[ahead.count++] = from + words - 1;
  };
  for (int64_t t = 0; t < count; t += kTokens) {
    const int64_t page = refs.page[t / kTokens], at = refs.slot[t / kTokens];
    const uint32_t* from = shadow_->codes.at<const uint32_t>(page, h_);
    if (half != kTail) add(from + at * prefix, kTokens * prefix);
    if (half != kPrefix) add(from + size * prefix + at * tail, kTokens * tail);
    if (half != kTail) ahead.lines[ahead.count++] = shadow_->scale.at<const uint32_t>(page, h_) + at;
  }
}

template <int kRows, int kBlocks>
void ShadowQuery::multiply_rows(Half half, const Stage& stage, int64_t count, int64_t row, const Epilogue& epilogue,
                                Ahead& ahead) const {
  const uint32_t* codes = half == kTail ? stage.tail : stage.prefix;
  const int64_t words = half == kTail ? tail_words_ : prefix_words_, dim = shadow_->head_dim;
  const float* q = q_ + row * dim + (half == kTail ? 8 * prefix_words_ : 0);
  const VecI offsets = lane_index() * static_cast<int32_t>(words);
  const int64_t step = ceil_div(ahead.count, std::max<int64_t>(1, ceil_div(count, kBlocks * kLanes) * words));
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
      ahead.prefetch(step);
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
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) epilogue.write(r, i + b * kLanes, sum[r][b]);
  }
}

void ShadowQuery::multiply(Half half, const Stage& stage, const uint32_t* pairs, int64_t count, float* out,
                           int64_t out_stride, Ahead& ahead) const {
  for_row_blocks(rows_, [&](int64_t r, auto rows) {
    constexpr int kRows = decltype(rows)::value, kBlocks = kRows < 4 || kLanes == 16 ? 4 : 2;  // registers hold no more
    const Epilogue epilogue{pairs, totals_[half == kTail] + r, out + r * out_stride, out_stride, half == kTail};
    multiply_rows<kRows, kBlocks>(half, stage, count, r, epilogue, ahead);
  });
}

template <class Refs>
void ShadowQuery::one_by_one(Half half, const Refs& refs, int64_t count, uint32_t* pairs, float* out,
                             int64_t out_stride) const {
  const int64_t dim = shadow_->head_dim, size = shadow_->page_size;
  const int64_t begin = half == kTail ? prefix_words_ : 0, end = half == kPrefix ? prefix_words_ : dim / 8;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t ref = i / kTokensPerRef<Refs>, slot = refs.slot[ref] + i % kTokensPerRef<Refs>;
    const uint32_t pair = pairs[i] = shadow_->scale.at<const uint32_t>(refs.page[ref], h_)[slot];
    const VecF scale = (VecF)(VecU{} + (pair << 16)), zero = (VecF)(VecU{} + (pair & 0xffff0000u));
    const uint32_t* words = shadow_->codes.at<const uint32_t>(refs.page[ref], h_);
    for (int64_t r = 0; r < rows_; ++r) {
      float sum = half == kTail ? out[r * out_stride + i] : 0;
      for (int64_t w = begin; w < end; ++w) {
        const uint32_t word = w < prefix_words_ ? words[slot * prefix_words_ + w]
                                                : words[size * prefix_words_ + slot * tail_words_ + w - prefix_words_];
        for (int n = 0; n < 8; ++n)
          sum += q_[r * dim + 8 * w + n] * (static_cast<float>(word >> (4 * n) & 15) * scale[0] + zero[0]);
      }
      out[r * out_stride + i] = sum;
    }
  }
}

template <class Refs>
void ShadowQuery::logits(Half half, const Refs& refs, int64_t count, uint32_t* pairs, float* out,
                         int64_t out_stride) const {
  if (one_by_one_) return one_by_one(half, refs, count, pairs, out, out_stride);
  Stage stage;
  Ahead ahead;
  const auto from = [&](int64_t i) {
    const int64_t ref = i / kTokensPerRef<Refs>;
    return Refs{refs.page + ref, refs.slot + ref};
  };
  for (int64_t i = 0; i < count; i += kStage) {
    const int64_t n = std::min(kStage, count - i), next = i + n;
    fill(half, stage, from(i), round_up(n, kPad), pairs + i);
    ahead.count = ahead.issued = 0;
    list_lines(half, from(next), std::min(kStage, count - next), ahead);
    if (half != kTail) multiply(kPrefix, stage, pairs + i, n, out + i, out_stride, ahead);
    if (half != kPrefix) multiply(kTail, stage, pairs + i, n, out + i, out_stride, ahead);
  }
}

template void ShadowQuery::logits(Half, const TokenRefs&, int64_t, uint32_t*, float*, int64_t) const;
template void ShadowQuery::logits(Half, const RunRefs&, int64_t, uint32_t*, float*, int64_t) const;

}  // namespace twilight
