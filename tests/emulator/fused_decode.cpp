// Runs the fused kernels under the emulator; tests/test_fused_emulated.py calls it through ctypes.
#include "../../csrc/plan.cpp"
#include "../../csrc/sm90/append_kv.cuh"
#include "../../csrc/sm90/kernel.cuh"

namespace {

using twilight::Float8;
using twilight::FusedParams;
using twilight::Selector;

// No length can be read before earlier kernels were awaited: until then it is 0.
void run_cluster(const int* length, emulated::Index first, int blocks, int shared_bytes, unsigned seed,
                 const std::function<void()>& kernel) {
  int& place = const_cast<int&>(*length);
  emulated::machine().earlier_kernels = [&place, value = std::exchange(place, 0)] { place = value; };
  emulated::run_cluster(first, blocks, twilight::kThreads, shared_bytes, seed, kernel);
  twilight::await_earlier_kernels();  // blocks without work may not have
}

template <typename T, typename E, int D, int RP>
void run_selector(const FusedParams& p) {
  switch (p.selector) {
    case Selector::kDense:
      return twilight::fused_decode_kernel<T, E, D, RP, Selector::kDense>(p);
    case Selector::kQuest:
      return twilight::fused_decode_kernel<T, E, D, RP, Selector::kQuest>(p);
    case Selector::kPageMean:
      return twilight::fused_decode_kernel<T, E, D, RP, Selector::kPageMean>(p);
    case Selector::kStreaming:
      return twilight::fused_decode_kernel<T, E, D, RP, Selector::kStreaming>(p);
    case Selector::kShadowPrefix:
      if (p.two_levels) return twilight::fused_decode_kernel<T, E, D, RP, Selector::kShadowPrefix, true>(p);
      return twilight::fused_decode_kernel<T, E, D, RP, Selector::kShadowPrefix>(p);
    default:
      return twilight::fused_decode_kernel<T, E, D, RP, Selector::kFull>(p);
  }
}

template <typename T, typename E, int D>
void run_rows(const FusedParams& p) {
  switch (twilight::padded_rows(p.query_tokens * p.group_size)) {
    case 1:
      return run_selector<T, E, D, 1>(p);
    case 4:
      return run_selector<T, E, D, 4>(p);
    case 8:
      return run_selector<T, E, D, 8>(p);
    case 16:
      return twilight::fused_decode_kernel<T, E, D, 16, Selector::kDense>(p);
    case 24:
      return twilight::fused_decode_kernel<T, E, D, 24, Selector::kDense>(p);
    default:
      return twilight::fused_decode_kernel<T, E, D, 32, Selector::kDense>(p);
  }
}

template <typename T, typename E, int D>
void run_append(const twilight::AppendParams& p, emulated::Index grid, unsigned seed) {
  const auto launch = [&](const std::function<void()>& kernel) {
    for (int z = 0; z < grid.z; ++z) {
      for (int y = 0; y < grid.y; ++y) {
        for (int x = 0; x < grid.x; ++x) run_cluster(p.seq_lens + z, {x, y, z}, 1, 16, seed + x, kernel);
      }
    }
  };
  const bool statistics = p.page_bounds.data != nullptr || p.page_means.data != nullptr;
  if (statistics && grid.x == 1) return launch([&] { twilight::append_kernel<T, E, D, true, true>(p); });
  launch([&] { twilight::append_kernel<T, E, D, true, false>(p); });
  if (statistics) launch([&] { twilight::append_kernel<T, E, D, false, true>(p); });
}

template <typename T, typename E>
void run_append_dim(int head_dim, const twilight::AppendParams& p, emulated::Index grid, unsigned seed) {
  if (head_dim == 64) return run_append<T, E, 64>(p, grid, seed);
  if (head_dim == 96) return run_append<T, E, 96>(p, grid, seed);
  if (head_dim == 128) return run_append<T, E, 128>(p, grid, seed);
  run_append<T, E, 256>(p, grid, seed);
}

}  // namespace

extern "C" int append_params_bytes() { return sizeof(twilight::AppendParams); }

extern "C" void emulate_fused_append(const twilight::AppendParams* p, int batch, int head_dim, int is_half,
                                     int is_float8, unsigned seed) {
  const emulated::Index grid = {twilight::blocks_of(twilight::kChunkTokens, p->tokens), p->kv_heads, batch};
  const auto run = is_float8
                       ? (is_half ? run_append_dim<__half, Float8> : run_append_dim<__nv_bfloat16, Float8>)
                       : (is_half ? run_append_dim<__half, __half> : run_append_dim<__nv_bfloat16, __nv_bfloat16>);
  run(head_dim, *p, grid, seed);
}

extern "C" int fused_tensors_bytes() { return sizeof(twilight::FusedTensors); }

// Returns the bytes of shared memory a block took, 0 where the plan refuses the call. Of caches in Float8, to halve
// what there is to compile, only those behind fp16 with 64 channels and behind bf16 with 128.
extern "C" int emulate_fused_decode(const twilight::FusedTensors* tensors, const twilight::PlanRequest* request,
                                    int is_half, int is_float8, unsigned seed) {
  const twilight::Plan plan = twilight::plan_fused_decode(*request);
  if (*plan.reason != 0 || (is_float8 && is_half != (request->head_dim == 64))) return 0;
  const FusedParams p = twilight::fused_params(*tensors, *request, plan);
  for (int unit = 0; unit < request->units(); ++unit) {
    const int* length = p.seq_lens + unit / p.kv_heads;
    run_cluster(length, {unit * plan.cluster_size, 0, 0}, plan.cluster_size, plan.shared_bytes, seed + unit, [&] {
      if (is_float8) {
        request->head_dim == 64 ? run_rows<__half, Float8, 64>(p) : run_rows<__nv_bfloat16, Float8, 128>(p);
      } else if (request->head_dim == 64) {
        is_half ? run_rows<__half, __half, 64>(p) : run_rows<__nv_bfloat16, __nv_bfloat16, 64>(p);
      } else {
        is_half ? run_rows<__half, __half, 128>(p) : run_rows<__nv_bfloat16, __nv_bfloat16, 128>(p);
      }
    });
  }
  return plan.shared_bytes;
}
