// Prints what csrc/simd.h gives, bit by bit and element by element, so that the number of lanes does not matter;
// tests/test_simd.py compares instruction sets. Exits with 1 where a result is wrong by itself.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "simd.h"

using namespace twilight;

namespace {

struct Bits {
  uint64_t hash = 1469598103934665603ull;
  template <class T>
  void add(const T& value) {
    uint8_t bytes[sizeof(T)];
    std::memcpy(bytes, &value, sizeof(T));
    for (const uint8_t byte : bytes) hash = (hash ^ byte) * 1099511628211ull;
  }
  void print(const char* name) const { std::printf("%s %016llx\n", name, static_cast<unsigned long long>(hash)); }
};

void expect(bool right, const char* what) {
  if (right) return;
  std::printf("%s is wrong\n", what);
  std::exit(1);
}

template <class T, class Raw>
void every_number(const char* name) {
  constexpr size_t count = size_t{1} << (8 * sizeof(Raw));
  std::vector<Raw> codes(count);
  for (size_t i = 0; i < count; ++i) codes[i] = static_cast<Raw>(i);
  Bits seen;
  for (size_t at = 0; at < count; at += kLanes) {
    const VecU v = (VecU)load_float(reinterpret_cast<const T*>(codes.data() + at));
    for (int i = 0; i < kLanes; ++i) seen.add((v[i] & 0x7fffffff) > 0x7f800000 ? 0x7fc00000u : v[i]);  // any NaN
  }
  seen.print(name);
}

}  // namespace

int main() {
  every_number<Half, uint16_t>("half");
  every_number<BFloat16, uint16_t>("bf16");
  every_number<Float8, uint8_t>("fp8");
  every_number<uint8_t, uint8_t>("uint8");

  constexpr int kCount = 1 << 20;
  Bits rounded;
  uint32_t state = 1;
  for (int at = 0; at < kCount; at += kLanes) {
    VecU x;
    Float8 codes[kLanes];
    for (int i = 0; i < kLanes; ++i) x[i] = state = state * 1664525u + 1013904223u;
    store_float8(codes, (VecF)x);
    rounded.add(codes);
  }
  rounded.print("to fp8");

  Bits exponentials;
  for (int at = 0; at < kCount; at += kLanes) {
    VecF x;
    for (int i = 0; i < kLanes; ++i) x[i] = -87.0f * static_cast<float>(at + i) / kCount;
    const VecF y = exp(x);
    for (int i = 0; i < kLanes; ++i) {
      const double exact = std::exp(static_cast<double>(x[i]));
      expect(std::fabs(y[i] - exact) <= 0x1p-22 * exact, "exp");  // 2 ulp
      exponentials.add(y[i]);
    }
  }
  exponentials.print("exp");

  for (uint32_t n = 0; n < 4096; ++n) {
    const uint32_t mask = (n * 2654435761u >> 7) & ((1u << kLanes) - 1);
    uint32_t out[2 * kLanes];
    const int kept = compress(out, lane_index(), mask);
    int at = 0;
    for (int i = 0; i < kLanes; ++i)
      if (mask >> i & 1) expect(out[at++] == static_cast<uint32_t>(i), "compress");
    expect(at == kept, "the count of compress");
  }
  expect(bits(lane_index() > 1) == (((1u << kLanes) - 1) & ~3u), "bits");
  VecF rows[kLanes];
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) rows[i][j] = static_cast<float>(100 * i + j);
  const VecF sums = sum_each(rows);
  for (int i = 0; i < kLanes; ++i) expect(sums[i] == 100 * i * kLanes + kLanes * (kLanes - 1) / 2, "sum_each");
}
