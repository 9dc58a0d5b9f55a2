// What the bytes of a decode step cost when nothing else does: reads the chunks the fused kernel must read, where it
// must read them, with no arithmetic but an exclusive-or, in clusters of blocks a (sequence, KV head) and with as many
// cluster barriers between its phases.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

constexpr int kThreads = 256;
constexpr int kMaxStreams = 8;
constexpr int kLoadsInFlight = 8;

// Chunks of `vectors` x 16 bytes, `counts[unit]` of them a unit, at offsets [units, pitch] in vectors from `base`.
struct Stream {
  const uint4* base;
  const uint32_t* offsets;
  const int32_t* counts;
  int pitch, vectors, barriers_before;
  uint32_t reciprocal;  // ceil(2^32 / vectors), or 0 for one vector
};

struct Streams {
  Stream stream[kMaxStreams];
  int count, barriers_after;
};

namespace {

__global__ void __launch_bounds__(kThreads, 2) read_streams(const __grid_constant__ Streams streams, uint32_t* out) {
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank(), unit = blockIdx.x / blocks;
  uint32_t seen = 0;
  for (int s = 0; s < streams.count; ++s) {
    const Stream stream = streams.stream[s];
    for (int i = 0; i < stream.barriers_before; ++i) cluster.sync();
    const int count = __ldg(stream.counts + unit);
    const int share = (count + blocks - 1) / blocks, first = rank * share;
    const int vectors = max(0, min(count - first, share)) * stream.vectors;
    const uint32_t* offsets = stream.offsets + static_cast<int64_t>(unit) * stream.pitch + first;
    for (int start = threadIdx.x; start < vectors; start += kLoadsInFlight * kThreads) {
      uint4 v[kLoadsInFlight];
#pragma unroll
      for (int u = 0; u < kLoadsInFlight; ++u) {
        const uint32_t i = min(start + u * kThreads, vectors - 1);
        const uint32_t chunk = stream.reciprocal == 0 ? i : __umulhi(i, stream.reciprocal);
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

// The layout that speed_of_light.py must agree with.
extern "C" int streams_bytes() { return sizeof(Streams); }

extern "C" int launch_read_streams(const Streams* streams, int units, int cluster_size, uint32_t* out, void* stream) {
  if (cluster_size > 8) {
    const cudaError_t error = cudaFuncSetAttribute(read_streams, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
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
