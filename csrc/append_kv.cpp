// twilight::append_kv. One task a (touched page, KV head): copies the page's new rows, writes their 4-bit shadow, then
// the page's bounds and mean, so that no two threads write the same page.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "arguments.h"
#include "dot.h"
#include "paged_kv.h"
#include "parallel.h"

namespace twilight {
namespace {

struct Strided {
  const char* data;
  int64_t strides[3];  // bytes, of [B, T, Hkv]

  explicit Strided(const Tensor& t, int64_t element_size)
      : data(static_cast<const char*>(t.const_data_ptr())),
        strides{t.stride(0) * element_size, t.stride(1) * element_size, t.stride(2) * element_size} {}

  const char* row(int64_t b, int64_t t, int64_t h) const {
    return data + b * strides[0] + t * strides[1] + h * strides[2];
  }
};

struct AppendCall {
  Strided k, v;
  Region<char> k_cache, v_cache;
  Region<char> k_quant, k_scale;  // null: no shadow
  const int32_t *channel_order, *prefix_channels;
  const float* k_center;  // null: zeros
  bool is_fp8;            // what is stored, else the element type of k and v
  const float *k_descale, *v_descale, *k_shift;
  Region<char> page_bounds, bounds_scale;  // null: no bounds; scale null unless the bounds are 8-bit codes
  Region<char> page_means, means_scale;    // null: no means
  const int32_t* seq_lens;
  int64_t kv_heads, page_size, head_dim, element_size;
};

// A page that receives tokens: token of the call that goes to each of its places, -1 where none.
struct TouchedPage {
  int64_t b, logical, physical;
  const int32_t* token;  // [S]; null: place s gets token first + s
  int64_t first, begin, end;

  int64_t token_at(int64_t s) const {
    if (token != nullptr) return token[s];
    return s >= begin && s < end ? first + s : -1;
  }
};

// (scale, zero) as k_scale stores them, and the two as the codes are computed with: rounded.
struct Quantiser {
  uint32_t pair;
  float scale, zero;

  Quantiser(float low, float high, float levels) {
    const BFloat16 rounded_scale = (high - low) / levels, rounded_zero = low;
    pair = static_cast<uint32_t>(rounded_scale.x) | static_cast<uint32_t>(rounded_zero.x) << 16;
    scale = static_cast<float>(rounded_scale);
    zero = static_cast<float>(rounded_zero);
  }

  VecI codes(VecF x, float levels) const {
    if (!(scale > 0)) return VecI{};
    VecF steps = (x - zero) / scale;
    steps = steps > 0.0f ? steps : VecF{};  // NaN becomes 0 too
    steps = steps < levels ? steps : splat(levels);
    const VecF magic = splat(8388608.0f);  // 2^23: adding it rounds to the nearest integer, ties to even
    return __builtin_convertvector((steps + magic) - magic, VecI);
  }
};

// Smallest and largest lane, NaN if any is NaN.
struct Extent {
  VecF low = splat(kInf), high = splat(-kInf);
  VecI nan = {};

  void add(VecF x) {
    nan |= x != x;
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  Quantiser quantiser(float levels) const {
    if (bits(nan) != 0) return Quantiser(NAN, NAN, levels);
    return Quantiser(reduce(low, [](float a, float b) { return b < a ? b : a; }), reduce_max(high), levels);
  }
};

template <class E>
void load_row(const char* from, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; d += kLanes) store(out + d, load_float(reinterpret_cast<const E*>(from) + d));
}

// Two neighbouring lanes of codes make a byte, the even one its low nibble.
inline void store_nibbles(uint8_t* to, VecI codes) {
  const VectorOf<uint64_t, kLanes / 2>::type pairs = (VectorOf<uint64_t, kLanes / 2>::type) codes;
  store(to, __builtin_convertvector(pairs | pairs >> 28, VectorOf<uint8_t, kLanes / 2>::type));
}

// 4-bit codes of a key, or of a mean of keys, less the centre and in the shadow's order; returns (scale, zero).
inline uint32_t pack_row(const AppendCall& call, int64_t h, float* x, const int32_t* order, uint8_t* packed) {
  const int64_t dim = call.head_dim;
  Extent extent;
  for (int64_t d = 0; d < dim; d += kLanes) {
    if (call.k_center != nullptr) store(x + d, load(x + d) - load(call.k_center + h * dim + d));
    extent.add(load(x + d));
  }
  const Quantiser quantiser = extent.quantiser(15);
  for (int64_t j = 0; j < dim; j += kLanes) {
    const VecF ordered = (VecF)gather(reinterpret_cast<const uint32_t*>(x), load<VecI>(order + j));
    store_nibbles(packed + j / 2, quantiser.codes(ordered, 15));
  }
  return quantiser.pair;
}

template <class E>
void write_shadow(const AppendCall& call, const TouchedPage& page, int64_t h, int64_t s, const char* key,
                  const int32_t* order) {
  const int64_t dim = call.head_dim;
  float x[256];
  uint8_t packed[128];
  load_row<E>(key, dim, x);
  const uint32_t pair = pack_row(call, h, x, order, packed);

  const int64_t prefix = std::min<int64_t>(std::max(call.prefix_channels[h], 0), dim) / 8 * 4, row = dim / 2;
  uint8_t* bytes = call.k_quant.at<uint8_t>(page.physical, h);
  std::memcpy(bytes + s * prefix, packed, prefix);
  std::memcpy(bytes + call.page_size * prefix + s * (row - prefix), packed + prefix, row - prefix);
  call.k_scale.at<uint32_t>(page.physical, h)[s] = pair;
}

// A row of k or v, as the cache holds it.
template <class E>
void store_row(const AppendCall& call, const char* from, const float* shift, float descale, char* to) {
  if (!call.is_fp8) {
    std::memcpy(to, from, call.head_dim * sizeof(E));
    return;
  }
  for (int64_t d = 0; d < call.head_dim; d += kLanes) {
    const VecF x = load_float(reinterpret_cast<const E*>(from) + d);
    store_float8(reinterpret_cast<Float8*>(to) + d, (shift == nullptr ? x : x - load(shift + d)) / descale);
  }
}

// The keys of one page and head as they are stored, one register of channels at a time.
template <class E>
struct PageKeys {
  const AppendCall& call;
  const char* rows;
  float descale;
  const float* shift;

  VecF at(int64_t s, int64_t d) const {
    const int64_t i = s * call.head_dim + d;
    if (!call.is_fp8) return load_float(reinterpret_cast<const E*>(rows) + i);
    const VecF x = load_float(reinterpret_cast<const Float8*>(rows) + i) * descale;
    return shift == nullptr ? x : x + load(shift + d);
  }
};

// Sums every channel in the order of the slots, as all backends do.
template <class E>
void write_mean(const AppendCall& call, int64_t page, int64_t h, const PageKeys<E>& keys, int64_t live,
                const int32_t* order) {
  const int64_t dim = call.head_dim;
  float mean[256];
  for (int64_t d = 0; d < dim; d += kLanes) {
    VecF sum = {};
    for (int64_t s = 0; s < live; ++s) sum += keys.at(s, d);
    store(mean + d, sum / splat(static_cast<float>(std::max<int64_t>(live, 1))));
  }
  *call.means_scale.at<uint32_t>(page, h) = pack_row(call, h, mean, order, call.page_means.at<uint8_t>(page, h));
}

template <class E>
void write_bounds(const AppendCall& call, int64_t page, int64_t h, const PageKeys<E>& keys, int64_t live) {
  const int64_t dim = call.head_dim;
  float bounds[512];
  Extent all;
  for (int64_t d = 0; d < dim; d += kLanes) {
    Extent column;
    for (int64_t s = 0; s < live; ++s) column.add(keys.at(s, d));
    const VecF none = column.nan ? splat(NAN) : VecF{};
    const VecI empty = splat(static_cast<int32_t>(live == 0 ? -1 : 0));
    const VecF low = column.nan | empty ? none : column.low, high = column.nan | empty ? none : column.high;
    store(bounds + d, low);
    store(bounds + dim + d, high);
    all.add(low);
    all.add(high);
  }
  if (call.bounds_scale.data == nullptr) {
    E* out = call.page_bounds.at<E>(page, h);
    for (int64_t d = 0; d < 2 * dim; ++d) out[d] = static_cast<E>(bounds[d]);
    return;
  }
  const Quantiser quantiser = all.quantiser(255);
  uint8_t* out = call.page_bounds.at<uint8_t>(page, h);
  for (int64_t d = 0; d < 2 * dim; d += kLanes)
    store(out + d, __builtin_convertvector(quantiser.codes(load(bounds + d), 255), VectorOf<uint8_t, kLanes>::type));
  *call.bounds_scale.at<uint32_t>(page, h) = quantiser.pair;
}

template <class E>
void write_page(const AppendCall& call, const TouchedPage& page, int64_t h) {
  const int64_t size = call.page_size, row_bytes = call.head_dim * call.element_size;
  char *keys_to = call.k_cache.at<char>(page.physical, h), *values_to = call.v_cache.at<char>(page.physical, h);
  const float* shift = call.k_shift == nullptr ? nullptr : call.k_shift + h * call.head_dim;
  const float k_descale = call.k_descale == nullptr ? 1 : call.k_descale[h];
  const float v_descale = call.v_descale == nullptr ? 1 : call.v_descale[h];
  int32_t order[256];
  for (int64_t j = 0; j < call.head_dim; ++j) {
    const int64_t channel = call.channel_order == nullptr ? j : call.channel_order[h * call.head_dim + j];
    order[j] = static_cast<int32_t>(std::min(std::max<int64_t>(channel, 0), call.head_dim - 1));
  }
  for (int64_t s = 0; s < size; ++s) {
    const int64_t t = page.token_at(s);
    if (t < 0) continue;
    const char* key = call.k.row(page.b, t, h);
    store_row<E>(call, key, shift, k_descale, keys_to + s * row_bytes);
    store_row<E>(call, call.v.row(page.b, t, h), nullptr, v_descale, values_to + s * row_bytes);
    if (call.k_quant.data != nullptr) write_shadow<E>(call, page, h, s, key, order);
  }
  const int64_t live = std::min<int64_t>(std::max<int64_t>(call.seq_lens[page.b] - page.logical * size, 0), size);
  const PageKeys<E> keys{call, keys_to, k_descale, shift};
  if (call.page_bounds.data != nullptr) write_bounds(call, page.physical, h, keys, live);
  if (call.page_means.data != nullptr) write_mean(call, page.physical, h, keys, live, order);
}

// Pages that consecutive positions ending at the sequence's last token fall on.
void touch_consecutive(const Paging& paging, int64_t b, int64_t tokens, std::vector<TouchedPage>& pages) {
  const int64_t size = paging.page_size, last = std::min<int64_t>(paging.seq_lens[b], paging.max_tokens());
  const int64_t shift = static_cast<int64_t>(paging.seq_lens[b]) - tokens;  // position of token 0
  for (int64_t position = std::max<int64_t>(shift, 0); position < last;) {
    const int64_t logical = position / size, stop = std::min(last, (logical + 1) * size);
    const int64_t physical = paging.page_table[b * paging.max_pages + logical];
    if (physical >= 0 && physical < paging.num_pages)
      pages.push_back(
          {b, logical, physical, nullptr, logical * size - shift, position - logical * size, stop - logical * size});
    position = stop;
  }
}

// Pages that given positions fall on; a later token wins a place that two ask for.
void touch_given(const Paging& paging, int64_t b, const int32_t* positions, int64_t tokens, Arena& arena,
                 std::vector<TouchedPage>& pages) {
  const int64_t size = paging.page_size;
  int32_t** places = arena.take<int32_t*>(paging.max_pages);
  std::fill(places, places + paging.max_pages, nullptr);
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t position = positions[t], logical = position / size;
    if (position < 0 || logical >= paging.max_pages) continue;
    const int64_t physical = paging.page_table[b * paging.max_pages + logical];
    if (physical < 0 || physical >= paging.num_pages) continue;
    if (places[logical] == nullptr) {
      places[logical] = arena.take<int32_t>(size);
      std::fill(places[logical], places[logical] + size, -1);
      pages.push_back({b, logical, physical, places[logical], 0, 0, 0});
    }
    places[logical][position % size] = static_cast<int32_t>(t);
  }
}

// Whether two sequences write the same physical page; then they go one after the other.
bool share_a_page(const std::vector<TouchedPage>& pages) {
  std::vector<int64_t> physical;
  physical.reserve(pages.size());
  for (const TouchedPage& page : pages) physical.push_back(page.physical);
  std::sort(physical.begin(), physical.end());
  return std::adjacent_find(physical.begin(), physical.end()) != physical.end();
}

void append_kv(TWILIGHT_APPEND_KV_ARGUMENTS) {
  Checker check("append_kv", k);
  check.tensor("k", k, {"B", "T", "Hkv", "D"}, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half},
               Layout::kRows);
  const ScalarType dtype = k.scalar_type();
  check.tensor("v", v, {"B", "T", "Hkv", "D"}, {dtype}, Layout::kRows);
  if (k.size(1) < 1) check.fail("k", "at least 1 token", std::to_string(k.size(1)));
  check.cache(k_cache, v_cache);
  check.geometry();
  check.paging(page_table, seq_lens);
  check.shadow_if_any(k_quant, k_scale, channel_order, prefix_channels, k_center);
  if (page_bounds.has_value()) {
    check.bounds(*page_bounds, bounds_scale);
  } else {
    check.absent("bounds_scale", bounds_scale, "None, because page_bounds is None");
  }
  check.means(page_means, means_scale);
  check.scales(k_descale, v_descale, k_shift, k_cache.scalar_type());
  if (positions.has_value()) check.tensor("positions", *positions, {"B", "T"}, {ScalarType::Int});
  check.no_gradients();

  const int64_t element_size = element_kernels(dtype).element_size, batch = k.size(0), tokens = k.size(1);
  const bool is_fp8 = k_cache.scalar_type() == ScalarType::Float8_e4m3fn;
  const Paging paging(page_table, seq_lens, k_cache.size(0), k_cache.size(2));
  const AppendCall call{Strided(k, element_size),
                        Strided(v, element_size),
                        region_of(k_cache, static_cast<char*>(k_cache.mutable_data_ptr())),
                        region_of(v_cache, static_cast<char*>(v_cache.mutable_data_ptr())),
                        written_region_or_null(k_quant),
                        written_region_or_null(k_scale),
                        data_or_null<int32_t>(channel_order),
                        data_or_null<int32_t>(prefix_channels),
                        data_or_null<float>(k_center),
                        is_fp8,
                        data_or_null<float>(k_descale),
                        data_or_null<float>(v_descale),
                        data_or_null<float>(k_shift),
                        written_region_or_null(page_bounds),
                        written_region_or_null(bounds_scale),
                        written_region_or_null(page_means),
                        written_region_or_null(means_scale),
                        paging.seq_lens,
                        k_cache.size(1),
                        paging.page_size,
                        k_cache.size(3),
                        is_fp8 ? 1 : element_size};

  Arena& arena = Arena::mine();
  Arena::Scope scope(arena);
  std::vector<TouchedPage> pages;
  for (int64_t b = 0; b < batch; ++b) {
    if (positions.has_value()) {
      touch_given(paging, b, positions->const_data_ptr<int32_t>() + b * tokens, tokens, arena, pages);
    } else {
      touch_consecutive(paging, b, tokens, pages);
    }
  }
  const auto write = [&](int64_t page, int64_t h) {
    switch (dtype) {
      case ScalarType::Float:
        return write_page<float>(call, pages[page], h);
      case ScalarType::BFloat16:
        return write_page<BFloat16>(call, pages[page], h);
      default:
        return write_page<Half>(call, pages[page], h);
    }
  };
  // A task is big enough to be worth handing to another thread; all heads of a page stay together, for they lie side by
  // side in k and v.
  constexpr int64_t kRowsPerTask = 512;
  const int64_t num_pages = static_cast<int64_t>(pages.size());
  const int64_t pages_per_task =
      std::max<int64_t>(1, kRowsPerTask / (std::min(tokens, paging.page_size) * call.kv_heads));
  const int64_t tasks = batch > 1 && share_a_page(pages) ? 1 : (num_pages + pages_per_task - 1) / pages_per_task;
  const int64_t per_task = tasks <= 1 ? num_pages : pages_per_task;
  run_tasks(tasks, [&](int64_t task) {
    for (int64_t page = task * per_task; page < std::min(num_pages, (task + 1) * per_task); ++page)
      for (int64_t h = 0; h < call.kv_heads; ++h) write(page, h);
  });
}

}  // namespace
}  // namespace twilight

STABLE_TORCH_LIBRARY_IMPL(TWILIGHT_NAMESPACE, CPU, m) { m.impl("append_kv", TORCH_BOX(&twilight::append_kv)); }
