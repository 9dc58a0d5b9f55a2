// Products of fp32 query rows with rows of K, V or page bounds in any element type.
#pragma once

#include "checks.h"
#include "simd.h"

namespace twilight {

// Query rows are taken four at a time; a remainder of three counts as four, so row buffers are padded to this many
// rows.
constexpr int64_t kRowPad = 4;

// Calls f(first row, number of rows) of each block of query rows, the number as a constant: fours, then what is left.
template <class F>
void for_row_blocks(int64_t num_rows, const F& f) {
  for (int64_t r = 0; r < num_rows; r += 4) {
    if (num_rows - r == 1) {
      f(r, std::integral_constant<int, 1>());
    } else if (num_rows - r == 2) {
      f(r, std::integral_constant<int, 2>());
    } else {
      f(r, std::integral_constant<int, 4>());
    }
  }
}

struct ElementKernels {
  // out[r, i] = q[r, :] . rows[i][:]. `rows` and each row of `out` have room for `count` rounded up to kLanes, and
  // rows[i] is readable for the padding too.
  void (*dot)(const void* const* rows, int64_t count, int64_t length, const float* q, int64_t num_rows, float* out,
              int64_t out_stride);
  // out[r, :] += sum over i of weights[r, i] * rows[i][:].
  void (*accumulate)(const void* const* rows, int64_t count, int64_t length, const float* weights,
                     int64_t weight_stride, int64_t num_rows, float* out);
  // Rounds to nearest even.
  void (*narrow)(const float* from, int64_t count, void* to);
  int64_t element_size;
};

const ElementKernels& element_kernels(ScalarType dtype);

}  // namespace twilight
