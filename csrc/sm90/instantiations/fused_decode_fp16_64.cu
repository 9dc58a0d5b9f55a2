#include "fused_decode_impl.cuh"

namespace twilight {
template void launch_fused_decode<__half, __half, 64>(const FusedParams&, int, int, int, cudaStream_t);
}
