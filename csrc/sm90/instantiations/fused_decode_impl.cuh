// What every file here compiles for one type of queries, one of caches and one head dimension: the kernels of all
// selectors and numbers of rows.
#pragma once

#include "../kernel.cuh"
#include "../launch.cuh"

namespace twilight {
namespace {

template <typename T, typename E, int D, int RP, Selector kSelector, bool kTwoLevels = false>
void launch_kernel(const FusedParams& p, int grid, int cluster_size, int shared_bytes, cudaStream_t stream) {
  const auto kernel = fused_decode_kernel<T, E, D, RP, kSelector, kTwoLevels>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  if (cluster_size > 8) STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  TWILIGHT_REMEMBER_CLOCK();
  launch_early(kernel, dim3(grid), cluster_size, shared_bytes, stream, p);
}

template <typename T, typename E, int D, int RP>
void launch_rows(const FusedParams& p, int grid, int cluster_size, int shared_bytes, cudaStream_t stream) {
  const auto launcher = p.two_levels                         ? launch_kernel<T, E, D, RP, Selector::kShadowPrefix, true>
                        : p.selector == Selector::kDense     ? launch_kernel<T, E, D, RP, Selector::kDense>
                        : p.selector == Selector::kQuest     ? launch_kernel<T, E, D, RP, Selector::kQuest>
                        : p.selector == Selector::kPageMean  ? launch_kernel<T, E, D, RP, Selector::kPageMean>
                        : p.selector == Selector::kStreaming ? launch_kernel<T, E, D, RP, Selector::kStreaming>
                        : p.selector == Selector::kShadowPrefix ? launch_kernel<T, E, D, RP, Selector::kShadowPrefix>
                                                                : launch_kernel<T, E, D, RP, Selector::kFull>;
  launcher(p, grid, cluster_size, shared_bytes, stream);
}

}  // namespace

template <typename T, typename E, int D>
void launch_fused_decode(const FusedParams& p, int grid, int cluster_size, int shared_bytes, cudaStream_t stream) {
  const int rows = padded_rows(p.query_tokens * p.group_size);
  const auto launcher = rows == 1    ? launch_rows<T, E, D, 1>
                        : rows == 4  ? launch_rows<T, E, D, 4>
                        : rows == 8  ? launch_rows<T, E, D, 8>
                        : rows == 16 ? launch_kernel<T, E, D, 16, Selector::kDense>
                        : rows == 24 ? launch_kernel<T, E, D, 24, Selector::kDense>
                                     : launch_kernel<T, E, D, 32, Selector::kDense>;
  launcher(p, grid, cluster_size, shared_bytes, stream);
}

}  // namespace twilight
