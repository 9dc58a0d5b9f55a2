// The operator around the kernels of append_kv.cuh.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../arguments.h"
#include "append_kv.cuh"
#include "launch.cuh"

namespace twilight {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename T, typename E, int D>
void launch(const AppendParams& p, int batch, cudaStream_t stream) {
  const dim3 grid(blocks_of(kChunkTokens, p.tokens), p.kv_heads, batch);
  const auto start = [&](void (*kernel)(AppendParams)) { launch_early(kernel, grid, 1, 0, stream, p); };
  if (p.page_bounds.data == nullptr && p.page_means.data == nullptr) {
    start(append_kernel<T, E, D, true, false>);
  } else if (grid.x == 1) {
    start(append_kernel<T, E, D, true, true>);
  } else {
    start(append_kernel<T, E, D, true, false>);
    start(append_kernel<T, E, D, false, true>);
  }
}

template <typename T, typename E>
void launch_for(int head_dim, const AppendParams& p, int batch, cudaStream_t stream) {
  if (head_dim == 64) return launch<T, E, 64>(p, batch, stream);
  if (head_dim == 96) return launch<T, E, 96>(p, batch, stream);
  if (head_dim == 128) return launch<T, E, 128>(p, batch, stream);
  launch<T, E, 256>(p, batch, stream);
}

// Arguments were checked by append_kv.
void fused_append_kv(TWILIGHT_APPEND_KV_ARGUMENTS) {
  const int batch = k.size(0), device = k.get_device_index();
  if (batch == 0) return;
  torch::stable::accelerator::DeviceGuard guard(device);
  AppendParams p{};
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  for (int i = 0; i < 3; ++i) {
    p.k_strides[i] = k.stride(i);
    p.v_strides[i] = v.stride(i);
  }
  p.k_cache = region_of(k_cache, static_cast<char*>(k_cache.mutable_data_ptr()));
  p.v_cache = region_of(v_cache, static_cast<char*>(v_cache.mutable_data_ptr()));
  p.k_quant = written_region_or_null(k_quant);
  p.k_scale = written_region_or_null(k_scale);
  p.page_bounds = written_region_or_null(page_bounds);
  p.bounds_scale = written_region_or_null(bounds_scale);
  p.page_means = written_region_or_null(page_means);
  p.means_scale = written_region_or_null(means_scale);
  p.channel_order = data_or_null<int>(channel_order);
  p.prefix_channels = data_or_null<int>(prefix_channels);
  p.k_center = data_or_null<float>(k_center);
  p.page_table = static_cast<const int*>(page_table.const_data_ptr());
  p.seq_lens = static_cast<const int*>(seq_lens.const_data_ptr());
  p.positions = data_or_null<int>(positions);
  p.k_descale = data_or_null<float>(k_descale);
  p.v_descale = data_or_null<float>(v_descale);
  p.k_shift = data_or_null<float>(k_shift);
  p.tokens = k.size(1);
  p.kv_heads = k.size(2);
  p.page_size = k_cache.size(2);
  p.max_pages = page_table.size(1);
  p.num_pages = k_cache.size(0);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const bool is_half = k.scalar_type() == ScalarType::Half, is_float8 = k_cache.element_size() == 1;
  const auto launcher = is_float8 ? (is_half ? launch_for<__half, Float8> : launch_for<__nv_bfloat16, Float8>)
                                  : (is_half ? launch_for<__half, __half> : launch_for<__nv_bfloat16, __nv_bfloat16>);
  launcher(k.size(3), p, batch, static_cast<cudaStream_t>(stream));
}

}  // namespace
}  // namespace twilight

STABLE_TORCH_LIBRARY_IMPL(TWILIGHT_NAMESPACE, CUDA, m) {
  m.impl("_fused_append_kv", TORCH_BOX(&twilight::fused_append_kv));
}
