// Page scores from element-wise key bounds; see select_pages.cpp.
#pragma once

#include "paged_kv.h"
#include "top_k.h"

namespace twilight {

struct PageBounds {
  ReadRegion bounds;  // [P, Hkv, 2, D] in K's dtype or 8-bit codes
  ReadRegion scale;   // [P, Hkv] words, scale in the low half, zero in the high one; null unless 8-bit
  int64_t head_dim;
  const ElementKernels* kernels;

  PageBounds(const Tensor& page_bounds, const OptionalTensor& bounds_scale)
      : bounds(region_of(page_bounds)),
        scale(region_or_null(bounds_scale)),
        head_dim(page_bounds.size(3)),
        kernels(&element_kernels(page_bounds.scalar_type())) {}
};

// Scores one row's pages: max(q min, q max) summed over channels is [min(q, 0), max(q, 0)] . [min, max].
class PageScorer {
 public:
  void prepare(const PageBounds& bounds, const Paging& paging, const Query& query, int64_t b, int64_t h, Arena& arena);
  void score(int64_t part, SoftmaxRows& softmax) const;

 private:
  const PageBounds* bounds_;
  const Paging* paging_;
  int64_t b_, h_, rows_;
  float* q_;      // [rows, 2 * D]
  float* total_;  // [rows], what the zero point multiplies
  bool finite_;
};

}  // namespace twilight
