// The launchers of the fused decode kernel. instantiations/ compiles them: who includes this compiles no kernel.
#pragma once

#include "params.cuh"

namespace twilight {

// Launches the kernel of p.selector for rows of type T with D channels.
template <typename T, int D>
void launch_fused_decode(const FusedParams& p, int grid, int cluster_size, int shared_bytes, cudaStream_t stream);

}  // namespace twilight
