// What the bytes of a decode step cost when nothing else does: reads the chunks the fused kernel must read, where it
// must read them, with no arithmetic but an exclusive-or, in clusters as the kernel launches them and with as many
// cluster barriers between its phases.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256;
constexpr int kMaxStreams = 8;
constexpr int kLoadsInFlight = 8;

// `count` chunks of `vectors` x 16 bytes a unit, at offsets [units, count] counted in 16 bytes from `base`.
struct Stream {
  const uint4* base;
  const uint32_t* offsets;
  int count, vectors, barriers_before;
};

struct Streams {
  Stream stream[kMaxStreams];
  int count, barriers_after;
};

__global__ void __launch_bounds__(kThreads, 2) read_streams(const __grid_constant__ Streams streams, uint32_t* out) {
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank(), unit = blockIdx.x / blocks;
  uint32_t seen = 0;
  for (int s = 0; s < streams.count; ++s) {
    const Stream stream = streams.stream[s];
    for (int i = 0; i < stream.barriers_before; ++i) cluster.sync();
    const int share = (stream.count + blocks - 1) / blocks, first = rank * share;
    const int vectors = max(0, min(stream.count - first, share)) * stream.vectors;
    const uint32_t* offsets = stream.offsets + static_cast<int64_t>(unit) * stream.count + first;
    for (int start = threadIdx.x; start < vectors; start += kLoadsInFlight * kThreads) {
      uint4 v[kLoadsInFlight];
#pragma unroll
      for (int u = 0; u < kLoadsInFlight; ++u) {
        const int i = min(start + u * kThreads, vectors - 1), chunk = i / stream.vectors;
        v[u] = __ldg(stream.base + __ldg(offsets + chunk) + (i - chunk * stream.vectors));
      }
#pragma unroll
      for (int u = 0; u < kLoadsInFlight; ++u) seen ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
  }
  for (int i = 0; i < streams.barriers_after; ++i) cluster.sync();
  if (seen == 0x9e3779b9u) out[unit] = seen;  // keeps the loads
}

}  // namespace

extern "C" int launch_read_streams(const Streams* streams, int units, int cluster_size, uint32_t* out, void* stream) {
  if (cluster_size > 8) cudaFuncSetAttribute(read_streams, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = cluster_size;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(units * cluster_size);
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, read_streams, *streams, out);
}
