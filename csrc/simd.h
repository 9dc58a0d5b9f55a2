// Vectors of one register of floats, for AVX-512, AVX2 or whatever the compiler has; GCC and Clang vector extensions
// carry the arithmetic, intrinsics only what they cannot say. Everything here is internal to one extension, which is
// built for one set.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace twilight {

using c10::BFloat16;
using c10::Half;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define TWILIGHT_AVX512 1
constexpr int kLanes = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define TWILIGHT_AVX2 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
typedef VectorOf<float, kLanes>::type VecF;
typedef VectorOf<int32_t, kLanes>::type VecI;
typedef VectorOf<uint32_t, kLanes>::type VecU;

constexpr float kInf = std::numeric_limits<float>::infinity();

#if defined(TWILIGHT_AVX512)
inline VecF splat(float x) { return (VecF)_mm512_set1_ps(x); }
inline VecI splat(int32_t x) { return (VecI)_mm512_set1_epi32(x); }
#elif defined(TWILIGHT_AVX2)
inline VecF splat(float x) { return (VecF)_mm256_set1_ps(x); }
inline VecI splat(int32_t x) { return (VecI)_mm256_set1_epi32(x); }
#else
inline VecF splat(float x) { return VecF{x, x, x, x}; }
inline VecI splat(int32_t x) { return VecI{x, x, x, x}; }
#endif

template <class V, class T>
inline V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
inline VecF load(const float* from) { return load<VecF>(from); }
template <class V, class T>
inline void store(T* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

inline VecI lane_index() {
  VecI v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// One register of consecutive elements as floats.
inline VecF load_float(const float* from) { return load(from); }
inline VecU widen(const uint16_t* from) {
#if defined(TWILIGHT_AVX512)
  return (VecU)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(TWILIGHT_AVX2)
  return (VecU)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  return __builtin_convertvector(load<VectorOf<uint16_t, kLanes>::type>(from), VecU);
#endif
}
inline VecF load_float(const BFloat16* from) { return (VecF)(widen(&from->x) << 16); }
inline VecF load_float(const Half* from) {
#if defined(TWILIGHT_AVX512)
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(TWILIGHT_AVX2)
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  // Exponent and mantissa move to their fp32 places; 2^112 corrects the bias, subnormals included.
  const VecU h = widen(&from->x);
  const VecU special = (VecU)((h & 0x7c00) == 0x7c00) & 0x7f800000;
  const VecF size = (VecF)((h & 0x7fff) << 13) * 0x1p112f;
  return (VecF)((VecU)size | special | ((h & 0x8000) << 16));
#endif
}

// One element of float8_e4m3fn: sign, four bits of exponent with a bias of 7, three of mantissa; all ones is NaN.
struct Float8 {
  uint8_t x;
};
constexpr float kFloat8Max = 448;

inline VecU widen(const uint8_t* from) {
#if defined(TWILIGHT_AVX512)
  return (VecU)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(TWILIGHT_AVX2)
  return (VecU)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  return __builtin_convertvector(load<VectorOf<uint8_t, kLanes>::type>(from), VecU);
#endif
}
inline VecF load_float(const uint8_t* from) { return __builtin_convertvector((VecI)widen(from), VecF); }
// Exponent and mantissa move to their fp32 places; 2^120 corrects the bias, subnormals included.
inline VecF load_float(const Float8* from) {
  const VecU bits = widen(&from->x), size = bits & 0x7f;
  const VecU nan = (VecU)(size == 0x7f) & 0x7fc00000;
  return (VecF)((VecU)((VecF)(size << 20) * 0x1p120f) | nan | (bits & 0x80) << 24);
}
// The nearest numbers, ties to even; what is too large becomes the largest.
inline void store_float8(Float8* to, VecF x) {
  const VecU size = (VecU)x & 0x7fffffff;
  const VecF wide = (VecF)size, capped = wide > kFloat8Max ? splat(kFloat8Max) : wide;
  // Below the smallest normal number adding 2^14 leaves units of 2^-9.
  const VecU small = (VecU)(capped + 16384.0f) - 0x46800000;
  const VecU at = (VecU)capped, normal = (at - (120u << 23) + 0x7ffff + (at >> 20 & 1)) >> 20;
  const VecU code = (VecU)(capped < 0.015625f) & small, rest = (VecU)(capped >= 0.015625f) & normal;
  const VecU nan = (VecU)(x != x) & 0x7f;
  store(to, __builtin_convertvector(code | rest | nan | ((VecU)x >> 24 & 0x80), VectorOf<uint8_t, kLanes>::type));
}

// Bit i is set where lane i of a comparison's result is.
inline uint32_t bits(VecI mask) {
#if defined(TWILIGHT_AVX512)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(TWILIGHT_AVX2)
  return _mm256_movemask_ps((__m256)mask);
#else
  uint32_t out = 0;
  for (int i = 0; i < kLanes; ++i) out |= (mask[i] & 1u) << i;
  return out;
#endif
}

// True where x is NaN or +inf: a logit that softmax cannot digest.
inline VecI is_broken(VecF x) { return ~(x < kInf); }

// The larger lane; a NaN in b is passed over.
inline VecF max(VecF a, VecF b) { return b > a ? b : a; }

template <class Op>
inline float reduce(VecF v, Op op) {
  float out = v[0];
  for (int i = 1; i < kLanes; ++i) out = op(out, v[i]);
  return out;
}
inline float reduce_max(VecF v) {
  return reduce(v, [](float a, float b) { return b > a ? b : a; });
}
inline float reduce_add(VecF v) {
  // Halves are added to halves, so that the order does not depend on the compiler.
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

namespace detail {
template <int kStep, class V>
inline V combine(V a, V b) {
  // Lane i takes from a where bit kStep of i is clear, else from b: once itself, once its partner across kStep.
  VecI own, partner;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const int from = (i & kStep) ? kLanes : 0;
    own[i] = from + i;
    partner[i] = from + (i ^ kStep);
  }
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, partner);
}
template <int kStep>
inline void combine_all(VecF* v) {
  if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / (2 * kStep); ++i) v[i] = combine<kStep>(v[2 * i], v[2 * i + 1]);
    combine_all<2 * kStep>(v);
  }
}
}  // namespace detail

// Lane i of the result is the sum of all lanes of v[i]; v is overwritten.
inline VecF sum_each(VecF (&v)[kLanes]) {
  detail::combine_all<1>(v);
  return v[0];
}

// The larger of x and a bound; a NaN in x stays.
inline VecF at_least(VecF x, float bound) {
#if defined(TWILIGHT_AVX512)
  return (VecF)_mm512_max_ps((__m512)splat(bound), (__m512)x);
#elif defined(TWILIGHT_AVX2)
  return (VecF)_mm256_max_ps((__m256)splat(bound), (__m256)x);
#else
  return x < bound ? splat(bound) : x;
#endif
}

// e^x within 2 ulp for x <= 0; -inf gives 0, NaN and +inf give NaN.
inline VecF exp(VecF x) {
  const VecF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  x = at_least(x, -104.0f);
  const VecF shifted = x * 1.44269504088896341f + magic;
  const VecF n = shifted - magic;
  VecF r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  VecF p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(TWILIGHT_AVX512)
  return (VecF)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // 2^n in two factors, because n reaches below the smallest normal exponent.
  const VecI whole = (VecI)shifted - (VecI)magic;
  const VecI half = whole >> 1;
  return p * (VecF)((half + 127) << 23) * (VecF)((whole - half + 127) << 23);
#endif
}

// tanh within a few ulp; NaN gives NaN. A polynomial where 1 - exp would lose what is small.
inline VecF tanh(VecF x) {
  const VecF size = (VecF)((VecI)x & 0x7fffffff), square = x * x;
  VecF series = square * -5.70498872745e-3f + 2.06390887954e-2f;
  series = series * square - 5.37397155531e-2f;
  series = series * square + 1.33314422036e-1f;
  series = series * square - 3.33332819422e-1f;
  series = series * square * x + x;
  const VecF fade = exp(size * -2.0f), large = (1.0f - fade) / (1.0f + fade);
  return size < 0.625f ? series : (VecF)((VecI)large | ((VecI)x & splat(INT32_MIN)));
}

// Nibble n of each lane as a float.
inline VecF nibble(VecU x, int n) {
#if defined(TWILIGHT_AVX512)
  // The permutation looks at the low four bits of each lane only.
  const VecF codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (VecF)_mm512_permutexvar_ps((__m512i)(x >> (4 * n)), (__m512)codes);
#else
  return __builtin_convertvector((VecI)((x >> (4 * n)) & 15u), VecF);
#endif
}

// The first n words, 0 < n < kLanes, and nothing is read beyond them.
inline VecU load_first(const uint32_t* from, int n) {
#if defined(TWILIGHT_AVX512)
  return (VecU)_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << n) - 1), from);
#elif defined(TWILIGHT_AVX2)
  return (VecU)_mm256_maskload_epi32(reinterpret_cast<const int*>(from), (__m256i)(lane_index() < n));
#else
  VecU v = {};
  for (int i = 0; i < n; ++i) v[i] = from[i];
  return v;
#endif
}

inline VecU gather(const uint32_t* base, VecI offsets) {
#if defined(TWILIGHT_AVX512)
  return (VecU)_mm512_i32gather_epi32((__m512i)offsets, base, 4);
#elif defined(TWILIGHT_AVX2)
  return (VecU)_mm256_i32gather_epi32(reinterpret_cast<const int*>(base), (__m256i)offsets, 4);
#else
  VecU v;
  for (int i = 0; i < kLanes; ++i) v[i] = base[offsets[i]];
  return v;
#endif
}

#if defined(TWILIGHT_AVX2)
namespace detail {
// Row m lists the set bits of m.
constexpr std::array<uint64_t, 256> compress_table() {
  std::array<uint64_t, 256> table{};
  for (int m = 0; m < 256; ++m) {
    int at = 0;
    for (uint64_t i = 0; i < 8; ++i)
      if (m >> i & 1) table[m] |= i << (8 * at++);
  }
  return table;
}
constexpr std::array<uint64_t, 256> kCompressTable = compress_table();
}  // namespace detail
#endif

// Writes the lanes whose bit is set side by side; up to a whole register may be overwritten. Returns their number.
template <class V>
inline int compress(void* to, V values, uint32_t mask) {
#if defined(TWILIGHT_AVX512)
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), (__m512i)values));
#elif defined(TWILIGHT_AVX2)
  const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(detail::kCompressTable[mask])));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32((__m256i)values, order));
#else
  uint32_t* out = static_cast<uint32_t*>(to);
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) std::memcpy(out++, reinterpret_cast<const char*>(&values) + 4 * i, 4);
#endif
  return __builtin_popcount(mask);
}

}  // namespace twilight
