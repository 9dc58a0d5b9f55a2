// Exact attention of one row's query heads on a list of tokens; see attend_sparse.cpp.
#pragma once

#include "dot.h"
#include "paged_kv.h"
#include "parallel.h"

namespace twilight {

struct KVCache {
  ReadRegion k, v;                     // [P, Hkv, S, D]
  const float *k_descale, *v_descale;  // [Hkv]; null: 1
  const float* k_shift;                // [Hkv, D]; null: 0
  int64_t num_pages, kv_heads, page_size, head_dim;
  const ElementKernels* kernels;

  KVCache(const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k_descale,
          const OptionalTensor& v_descale, const OptionalTensor& k_shift)
      : k(region_of(k_cache)),
        v(region_of(v_cache)),
        k_descale(data_or_null<float>(k_descale)),
        v_descale(data_or_null<float>(v_descale)),
        k_shift(data_or_null<float>(k_shift)),
        num_pages(k_cache.size(0)),
        kv_heads(k_cache.size(1)),
        page_size(k_cache.size(2)),
        head_dim(k_cache.size(3)),
        kernels(&element_kernels(k_cache.scalar_type())) {}
};

class AttendRow {
 public:
  static constexpr int kPhases = 2;  // partial results, merge

  void start(const KVCache& cache, const Paging& paging, const Query& query, int64_t b, int64_t h, int64_t capacity,
             void* out, float* lse, Arena& arena);

  // The live tokens to attend to, in any order; null: 0 .. count - 1.
  void set_positions(const int32_t* positions, int64_t count) {
    positions_ = positions;
    count_ = count;
  }

  int64_t parts(int phase) const { return phase == 0 ? num_parts() : 1; }
  void run(int phase, int64_t part) { phase == 0 ? attend(part) : merge(); }

 private:
  static constexpr int64_t kPartTokens = 512;

  // Softmax state of one query row: the sum is relative to e^peak.
  struct State {
    float peak, total;
    bool has_nan;  // a NaN logit, as opposed to +inf, which also makes the sum NaN
  };

  int64_t num_parts() const { return ceil_div(count_, kPartTokens); }
  void attend(int64_t part);
  void merge();

  const KVCache* cache_;
  const Paging* paging_;
  const Query* query_;
  int64_t b_, h_, length_, padded_rows_;
  const int32_t* positions_ = nullptr;
  int64_t count_ = 0;
  float* q_;        // [padded rows, D], times k_descale
  float* shifts_;   // [rows]: q . k_shift, which every logit lacks until it is capped
  State* states_;   // [parts, padded rows]
  float* partial_;  // [parts, padded rows, D]
  void* out_;
  float* lse_;
};

}  // namespace twilight
