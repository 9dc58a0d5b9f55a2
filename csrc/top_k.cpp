#include "top_k.h"

namespace twilight {
namespace {

constexpr int kBins = 1 << (31 - kScoreBinShift);

// The bin in which the `wanted` best of n scores end, and how many of it are wanted.
struct Cut {
  int32_t bin;
  int64_t wanted;
};

Cut find_cut(const uint32_t* keys, int64_t n, int64_t wanted, Arena& arena) {
  Arena::Scope scope(arena);
  // Two histograms, because equal bins follow each other and an increment waits for the one before.
  uint32_t *histogram = arena.take<uint32_t>(2 * kBins), *other = histogram + kBins;
  std::fill(histogram, histogram + 2 * kBins, 0u);
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    ++histogram[keys[i] >> kScoreBinShift];
    ++other[keys[i + 1] >> kScoreBinShift];
  }
  if (i < n) ++histogram[keys[i] >> kScoreBinShift];
  for (int32_t bin = kBins - 1; bin > kLowestScoreBin; --bin) {
    const int64_t here = static_cast<int64_t>(histogram[bin]) + other[bin];
    if (here >= wanted) return {bin, wanted};
    wanted -= here;
  }
  return {kLowestScoreBin, wanted};
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
    Cut cut = find_cut(keys + front, back - front, wanted, arena);
    int64_t i = front;
    for (; i + kLanes <= back; i += kLanes) {
      VecI bin = load<VecI>(keys + i) >> kScoreBinShift;
      bin = bin > kLowestScoreBin ? bin : splat(kLowestScoreBin);
      uint32_t taken = bits(bin > cut.bin);
      for (uint32_t here = bits(bin == cut.bin); here != 0 && cut.wanted > 0; here &= here - 1, --cut.wanted)
        taken |= here & -here;
      out += compress(out, lane_index() + static_cast<int32_t>(i), taken);
    }
    for (; i < back; ++i) {
      const int32_t bin = std::max(static_cast<int32_t>(keys[i] >> kScoreBinShift), kLowestScoreBin);
      if (bin > cut.bin || (bin == cut.bin && cut.wanted-- > 0)) *out++ = static_cast<int32_t>(i);
    }
  }
  for (int64_t i = back; i < items; ++i) *out++ = static_cast<int32_t>(i);
}

}  // namespace twilight
