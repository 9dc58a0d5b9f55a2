#include "fused_decode_impl.cuh"

namespace twilight {
template void launch_fused_decode<__nv_bfloat16, __nv_bfloat16, 64>(const FusedParams&, int, int, int, cudaStream_t);
}
