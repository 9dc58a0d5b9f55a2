// Views of the paged tensors and of the queries, as the kernels read them.
#pragma once

#include "checks.h"
#include "simd.h"

namespace twilight {

struct Paging {
  const int32_t* page_table;  // [B, M]
  const int32_t* seq_lens;    // [B]
  int64_t max_pages, num_pages, page_size;

  Paging(const Tensor& page_table, const Tensor& seq_lens, int64_t num_pages, int64_t page_size)
      : page_table(page_table.const_data_ptr<int32_t>()),
        seq_lens(seq_lens.const_data_ptr<int32_t>()),
        max_pages(page_table.size(1)),
        num_pages(num_pages),
        page_size(page_size) {}

  int64_t max_tokens() const { return max_pages * page_size; }

  // Where page means lie: each page as one token.
  Paging of_means() const {
    Paging out = *this;
    out.page_size = 1;
    return out;
  }

  // Live tokens of sequence b.
  int64_t length(int64_t b) const {
    if (num_pages == 0) return 0;
    return std::min<int64_t>(std::max(seq_lens[b], 0), max_tokens());
  }

  // Live tokens of the longest sequence.
  int64_t longest(int64_t batch) const {
    int64_t out = 0;
    for (int64_t b = 0; b < batch; ++b) out = std::max(out, length(b));
    return out;
  }

  // Physical page; an entry that names none reads some valid page instead, so nothing is ever read out of bounds.
  int32_t page(int64_t b, int64_t logical) const {
    return static_cast<int32_t>(std::min<int64_t>(std::max(page_table[b * max_pages + logical], 0), num_pages - 1));
  }
};

// Where a list of tokens lies: physical page and place in it.
struct TokenRefs {
  int32_t* page;
  int32_t* slot;

  // `count` positions, or first, first + 1, .. where positions is null; padded with copies of the last up to `padded`.
  void fill(const Paging& paging, int64_t b, const int32_t* positions, int64_t first, int64_t count, int64_t padded) {
    const int32_t size = static_cast<int32_t>(paging.page_size);
    if (positions == nullptr) {
      for (int64_t i = 0; i < count;) {
        const int64_t logical = (first + i) / size;
        const int32_t physical = paging.page(b, logical);
        const int64_t stop = std::min(count, (logical + 1) * size - first);
        for (int32_t s = static_cast<int32_t>(first + i - logical * size); i < stop; ++i, ++s) {
          page[i] = physical;
          slot[i] = s;
        }
      }
    } else {
      const int32_t shift = __builtin_ctz(size);
      const int32_t* table = paging.page_table + b * paging.max_pages;
      const int32_t last = static_cast<int32_t>(paging.num_pages - 1);
      for (int64_t i = 0; i < count; ++i) {
        const int32_t physical = table[positions[i] >> shift];
        page[i] = physical < 0 ? 0 : (physical > last ? last : physical);
        slot[i] = positions[i] & (size - 1);
      }
    }
    for (int64_t i = count; i < padded; ++i) {
      page[i] = page[count - 1];
      slot[i] = slot[count - 1];
    }
  }
};

// The same for runs of kLanes tokens that follow each other in one page: one entry a run. The first of `count` tokens,
// and every kLanes-th, begins a run.
struct RunRefs {
  int32_t* page;
  int32_t* slot;

  void fill(const Paging& paging, int64_t b, const int32_t* positions, int64_t first, int64_t count, int64_t padded) {
    const int32_t size = static_cast<int32_t>(paging.page_size);
    for (int64_t i = 0, run = 0; i < padded; i += kLanes, ++run) {
      const int64_t token = i >= count ? -1 : (positions == nullptr ? first + i : positions[i]);
      page[run] = token < 0 ? page[run - 1] : paging.page(b, token / size);
      slot[run] = token < 0 ? slot[run - 1] : static_cast<int32_t>(token % size);
    }
  }
};

// q [B, T, Hq, D] with any strides but the last.
struct Query {
  const void* data;
  ScalarType dtype;
  int64_t batch, query_tokens, heads, head_dim;
  int64_t strides[3];
  int64_t kv_heads, group, rows;  // rows: query rows that share a KV head, row t * group + g
  float sm_scale, softcap;        // softcap 0: none

  Query(const Tensor& q, int64_t kv_heads, double sm_scale, const std::optional<double>& softcap = std::nullopt)
      : data(q.const_data_ptr()),
        dtype(q.scalar_type()),
        batch(q.size(0)),
        query_tokens(q.size(1)),
        heads(q.size(2)),
        head_dim(q.size(3)),
        strides{q.stride(0), q.stride(1), q.stride(2)},
        kv_heads(kv_heads),
        group(heads / kv_heads),
        rows(query_tokens * group),
        sm_scale(static_cast<float>(sm_scale)),
        softcap(static_cast<float>(softcap.value_or(0.0))) {}

  // Row r of KV head h, times sm_scale.
  void load(int64_t b, int64_t h, int64_t r, float* out) const {
    const int64_t offset = b * strides[0] + r / group * strides[1] + (h * group + r % group) * strides[2];
    switch (dtype) {
      case ScalarType::Float:
        return convert(static_cast<const float*>(data) + offset, out);
      case ScalarType::BFloat16:
        return convert(static_cast<const BFloat16*>(data) + offset, out);
      default:
        return convert(static_cast<const Half*>(data) + offset, out);
    }
  }

  // Index of row r of KV head h in a contiguous [B, T, Hq].
  int64_t out_row(int64_t b, int64_t h, int64_t r) const {
    return (b * query_tokens + r / group) * heads + h * group + r % group;
  }

  bool caps() const { return softcap > 0; }

  // Caps n logits, rounded up to kLanes, all of which lack `shift`.
  void cap(float* logits, int64_t n, float shift) const {
    for (int64_t i = 0; i < n; i += kLanes)
      store(logits + i, tanh((twilight::load(logits + i) + shift) / softcap) * softcap);
  }

  // Newest position that row r sees.
  int64_t horizon(int64_t length, int64_t r) const { return length - query_tokens + r / group; }

 private:
  template <class T>
  void convert(const T* from, float* out) const {
    for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, load_float(from + d) * sm_scale);
  }
};

// Candidates a caller hands over: [B, Hkv, C] indices, each standing for `unit` tokens.
struct GivenCandidates {
  bool given;  // false: every token; an empty list has no address either
  const int32_t *indices, *counts;
  int64_t capacity, unit;

  GivenCandidates(const OptionalTensor& indices, const OptionalTensor& counts, int64_t unit)
      : given(indices.has_value()),
        indices(given ? indices->const_data_ptr<int32_t>() : nullptr),
        counts(given ? counts->const_data_ptr<int32_t>() : nullptr),
        capacity(given ? indices->size(2) : 0),
        unit(unit) {}

  int64_t listed(int64_t row) const { return std::min<int64_t>(std::max(counts[row], 0), capacity); }

  // Calls f(slot, position) for each live slot of a row, in order.
  template <class F>
  void for_each(int64_t row, int64_t length, const F& f) const {
    const int32_t* list = indices + row * capacity;
    const int64_t count = listed(row);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t first = list[c] * unit;
      if (first < 0) continue;
      for (int64_t s = 0; s < unit && first + s < length; ++s) f(c * unit + s, first + s);
    }
  }
};

}  // namespace twilight
