#include "dot.h"

namespace twilight {
namespace {

constexpr int64_t kAhead = 32;  // rows between a prefetch and its use

// Into the second level, which takes more lines at a time than the first.
inline void prefetch(const void* line) { __builtin_prefetch(line, /*for writing=*/0, /*locality=*/2); }

// A tile of kRows query rows by kLanes / kRows rows of the cache fills kLanes accumulators, which one transposing sum
// reduces.
template <class E, int kRows>
void dot_rows(const void* const* rows, int64_t count, int64_t length, const float* q, float* out, int64_t out_stride) {
  constexpr int kTokens = kLanes / kRows;
  for (int64_t i = 0; i < count; i += kTokens) {
    const void* const* ahead = rows + (i + kAhead < count ? i + kAhead : i);
    VecF sum[kLanes];
#pragma GCC unroll 16
    for (int a = 0; a < kLanes; ++a) sum[a] = VecF{};
    const E* row[kTokens];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) row[t] = static_cast<const E*>(rows[i + t]);
    for (int64_t d = 0; d < length; d += kLanes) {
      if (d * sizeof(E) % 64 == 0)  // not all at once: full buffers would stop the arithmetic
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) prefetch(static_cast<const E*>(ahead[t]) + d);
      VecF k[kTokens];
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) k[t] = load_float(row[t] + d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const VecF x = load(q + r * length + d);
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) sum[r * kTokens + t] += x * k[t];
      }
    }
    const VecF sums = sum_each(sum);
    for (int r = 0; r < kRows; ++r)
      std::memcpy(out + r * out_stride + i, reinterpret_cast<const float*>(&sums) + r * kTokens,
                  kTokens * sizeof(float));
  }
}

template <class E, int kRows, int kWidth>
int64_t accumulate_columns(const void* const* rows, int64_t count, int64_t length, int64_t column, const float* weights,
                           int64_t weight_stride, float* out) {
  for (; column + kWidth * kLanes <= length; column += kWidth * kLanes) {
    VecF sum[kRows][kWidth];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kWidth; ++c) sum[r][c] = load(out + r * length + column + c * kLanes);
    for (int64_t i = 0; i < count; ++i) {
      const E* row = static_cast<const E*>(rows[i]) + column;
      if (i + kAhead < count)
        for (int64_t line = 0; line < static_cast<int64_t>(kWidth * kLanes * sizeof(E)); line += 64)
          prefetch(reinterpret_cast<const char*>(static_cast<const E*>(rows[i + kAhead]) + column) + line);
      VecF v[kWidth];
#pragma GCC unroll 8
      for (int c = 0; c < kWidth; ++c) v[c] = load_float(row + c * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const VecF w = splat(weights[r * weight_stride + i]);
#pragma GCC unroll 8
        for (int c = 0; c < kWidth; ++c) sum[r][c] += w * v[c];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kWidth; ++c) store(out + r * length + column + c * kLanes, sum[r][c]);
  }
  if constexpr (kWidth > 1)
    column = accumulate_columns<E, kRows, kWidth / 2>(rows, count, length, column, weights, weight_stride, out);
  return column;
}

template <int kRows>
constexpr int accumulate_width() {
  // As many accumulators as leave registers for the operands.
  return (kLanes == 16 ? 16 : 8) / kRows > 8 ? 8 : (kLanes == 16 ? 16 : 8) / kRows;
}

template <class E>
void dot(const void* const* rows, int64_t count, int64_t length, const float* q, int64_t num_rows, float* out,
         int64_t out_stride) {
  for_row_blocks(num_rows, [&](int64_t r, auto block) {
    dot_rows<E, decltype(block)::value>(rows, count, length, q + r * length, out + r * out_stride, out_stride);
  });
}

template <class E>
void accumulate(const void* const* rows, int64_t count, int64_t length, const float* weights, int64_t weight_stride,
                int64_t num_rows, float* out) {
  for_row_blocks(num_rows, [&](int64_t r, auto block) {
    constexpr int kRows = decltype(block)::value;
    accumulate_columns<E, kRows, accumulate_width<kRows>()>(rows, count, length, 0, weights + r * weight_stride,
                                                            weight_stride, out + r * length);
  });
}

template <class E>
void narrow(const float* from, int64_t count, void* to) {
  E* out = static_cast<E*>(to);
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<E>(from[i]);
}

template <class E>
constexpr ElementKernels kernels_of() {
  return {&dot<E>, &accumulate<E>, &narrow<E>, sizeof(E)};
}

}  // namespace

const ElementKernels& element_kernels(ScalarType dtype) {
  static const ElementKernels fp32 = kernels_of<float>(), bf16 = kernels_of<BFloat16>(), fp16 = kernels_of<Half>(),
                              fp8 = {&dot<Float8>, &accumulate<Float8>, nullptr, 1},
                              codes = {&dot<uint8_t>, nullptr, nullptr, 1};
  switch (dtype) {
    case ScalarType::Float:
      return fp32;
    case ScalarType::BFloat16:
      return bf16;
    case ScalarType::Half:
      return fp16;
    case ScalarType::Float8_e4m3fn:
      return fp8;
    default:
      return codes;
  }
}

}  // namespace twilight
