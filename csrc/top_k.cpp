#include "top_k.h"

namespace twilight {
namespace {

struct Threshold {
  uint32_t key;
  int64_t ties;  // how many of the keys equal to it are wanted
};

// The k-th largest of n keys below 2^31, digit by digit.
Threshold kth_largest(const uint32_t* keys, int64_t n, int64_t k, Arena& arena) {
  constexpr int kShifts[] = {20, 10, 0}, kDigits[] = {2048, 1024, 1024};
  Arena::Scope scope(arena);
  uint32_t* histogram = arena.take<uint32_t>(2 * 2048);
  uint32_t* subset = arena.take<uint32_t>(n + kLanes);
  uint32_t prefix = 0;
  for (int level = 0; level < 3; ++level) {
    const int shift = kShifts[level];
    const uint32_t digits = kDigits[level], mask = digits - 1;
    // Two histograms, because equal digits follow each other and an increment waits for the one before.
    uint32_t* other = histogram + digits;
    std::fill(histogram, histogram + 2 * digits, 0u);
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
      ++histogram[keys[i] >> shift & mask];
      ++other[keys[i + 1] >> shift & mask];
    }
    if (i < n) ++histogram[keys[i] >> shift & mask];
    uint32_t digit = digits;
    int64_t here = 0;
    do {
      --digit;
      here = static_cast<int64_t>(histogram[digit]) + other[digit];
      if (here >= k) break;
      k -= here;
    } while (digit > 0);
    prefix |= digit << shift;
    if (shift == 0) break;
    int64_t kept = 0;
    const VecU wanted = VecU{} + (prefix >> shift);
    for (i = 0; i + kLanes <= n; i += kLanes) {
      const VecU key = load<VecU>(keys + i);
      kept += compress(subset + kept, key, bits((VecI)(key >> shift == wanted)));
    }
    for (; i < n; ++i)
      if (keys[i] >> shift == prefix >> shift) subset[kept++] = keys[i];
    keys = subset;
    n = kept;
  }
  return {prefix, k};
}

}  // namespace

void TopK::add_rows(const SoftmaxRows& softmax, int64_t part, float* scores) {
  const Range range = part_of(softmax.items(), part, SoftmaxRows::kPartItems);
  for (int64_t r = 0; r < softmax.rows(); ++r) {
    const float* e = softmax.row(r);
    const VecF factor = splat(softmax.factor(part, r));
    const bool broken = softmax.is_part_broken(part, r);
    for (int64_t i = range.begin; i < range.end; i += kLanes) {
      const VecF before = r == 0 ? VecF{} : load(scores + i), x = load(e + i);
      // The factor may have vanished, and a broken item outranks the others all the same.
      const VecF weight = broken ? (x == kInf ? x : x * factor) : x * factor;
      store(scores + i, before + weight);
    }
  }
}

void TopK::choose(const float* scores, int32_t* out, Arena& arena) const {
  if (takes_all()) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int32_t>(i);
    return;
  }
  const uint32_t* keys = reinterpret_cast<const uint32_t*>(scores);
  const int64_t wanted = count - front - (items - back);  // back < items here, because the newest token is forced
  for (int64_t i = 0; i < front; ++i) *out++ = static_cast<int32_t>(i);
  if (wanted > 0) {
    Threshold threshold = kth_largest(keys + front, back - front, wanted, arena);
    const VecI limit = splat(static_cast<int32_t>(threshold.key));
    int64_t i = front;
    for (; i + kLanes <= back; i += kLanes) {
      const VecI key = load<VecI>(keys + i);
      uint32_t taken = bits(key > limit);
      for (uint32_t ties = bits(key == limit); ties != 0 && threshold.ties > 0; ties &= ties - 1, --threshold.ties)
        taken |= ties & -ties;
      out += compress(out, lane_index() + static_cast<int32_t>(i), taken);
    }
    for (; i < back; ++i)
      if (keys[i] > threshold.key || (keys[i] == threshold.key && threshold.ties-- > 0))
        *out++ = static_cast<int32_t>(i);
  }
  for (int64_t i = back; i < items; ++i) *out++ = static_cast<int32_t>(i);
}

}  // namespace twilight
