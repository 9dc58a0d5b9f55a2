// Runs the fused decode kernel under the emulator; tests/test_fused_emulated.py calls it through ctypes.
#include "../../csrc/decode_attention.cuh"

namespace {

using twilight::FusedParams;
using twilight::FusedSelector;

template <typename T, int D, int RP>
void run_selector(const FusedParams& p) {
  switch (p.selector) {
    case FusedSelector::kQuest:
      return twilight::fused_decode_kernel<T, D, RP, FusedSelector::kQuest>(p);
    case FusedSelector::kShadowPrefix:
      return twilight::fused_decode_kernel<T, D, RP, FusedSelector::kShadowPrefix>(p);
    default:
      return twilight::fused_decode_kernel<T, D, RP, FusedSelector::kFull>(p);
  }
}

template <typename T, int D>
void run_rows(const FusedParams& p) {
  const int rows = p.query_tokens * p.group_size;
  if (rows == 1) return run_selector<T, D, 1>(p);
  if (rows <= 4) return run_selector<T, D, 4>(p);
  run_selector<T, D, 8>(p);
}

}  // namespace

extern "C" int fused_params_bytes() { return sizeof(FusedParams); }

// Returns the bytes of shared memory a block took.
extern "C" int emulate_fused_decode(FusedParams* p, int batch, int head_dim, int is_half, int cluster_size,
                                    unsigned seed) {
  const int bytes = twilight::lay_out(*p, head_dim, p->query_tokens * p->group_size, cluster_size);
  for (int unit = 0; unit < batch * p->kv_heads; ++unit) {
    emulated::run_cluster(unit * cluster_size, cluster_size, twilight::kThreads, bytes, seed + unit, [&] {
      if (head_dim == 64) {
        is_half ? run_rows<__half, 64>(*p) : run_rows<__nv_bfloat16, 64>(*p);
      } else {
        is_half ? run_rows<__half, 128>(*p) : run_rows<__nv_bfloat16, 128>(*p);
      }
    });
  }
  return bytes;
}
