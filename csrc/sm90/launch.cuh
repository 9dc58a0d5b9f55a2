// How the fused kernels are launched.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include "params.cuh"

namespace twilight {

// Launches `grid` blocks, clusters of `cluster_size`, which start as soon as the blocks ahead of them in the stream
// have ended, before what those wrote is visible (programmatic dependent launch): the kernel calls
// await_earlier_kernels before it touches what others do. None lets the next one start any earlier: its blocks would be
// placed where there is room that moment, and pile up. 32/8 B 8 L 32k, dense, behind an append: 296 us instead of 252.
template <typename Params>
void launch_early(void (*kernel)(Params), dim3 grid, int cluster_size, int shared_bytes, cudaStream_t stream,
                  const Params& p) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster_size;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster_size > 1 ? 2 : 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, p));
}

// Launches the kernel of p.selector for rows of type T with D channels and caches of type E. instantiations/ compiles
// it: who includes this compiles no kernel.
template <typename T, typename E, int D>
void launch_fused_decode(const FusedParams& p, int grid, int cluster_size, int shared_bytes, cudaStream_t stream);

}  // namespace twilight
