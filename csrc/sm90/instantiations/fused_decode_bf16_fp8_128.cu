#include "fused_decode_impl.cuh"

namespace twilight {
template void launch_fused_decode<__nv_bfloat16, Float8, 128>(const FusedParams&, int, int, int, cudaStream_t);
}
