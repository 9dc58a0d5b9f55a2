// The operator around the fused decode kernel.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../arguments.h"
#include "launch.cuh"

namespace twilight {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

using Launcher = void (*)(const FusedParams&, int grid, int cluster_size, int shared_bytes, cudaStream_t stream);

template <typename T>
Launcher launcher_of(bool is_float8, int head_dim) {
  if (is_float8) return head_dim == 64 ? launch_fused_decode<T, Float8, 64> : launch_fused_decode<T, Float8, 128>;
  return head_dim == 64 ? launch_fused_decode<T, T, 64> : launch_fused_decode<T, T, 128>;
}

cudaError_t read_limits(int device, DeviceLimits& limits) {
  const cudaError_t error = cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&limits.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

cudaError_t lies_in_host_memory(const Tensor& tensor, int& host) {
  cudaPointerAttributes attributes{};
  const cudaError_t error = cudaPointerGetAttributes(&attributes, tensor.const_data_ptr());
  host = attributes.type == cudaMemoryTypeHost;
  return error;
}

// Arguments were checked by decode_attention, and the same plan sent the call here. A cluster_size of 0 is the
// plan's.
std::tuple<Tensor, Tensor> fused_decode_attention(TWILIGHT_DECODE_ATTENTION_ARGUMENTS, int64_t cluster_size) {
  const int64_t batch = q.size(0), query_tokens = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const int device = q.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Tensor attended = out.has_value() ? torch::stable::new_empty(q, {0})  // an operator may not return what it writes
                                    : torch::stable::new_empty(q, {batch, query_tokens, heads, head_dim});
  Tensor lse = torch::stable::new_empty(q, {batch, query_tokens, heads}, ScalarType::Float);
  if (batch == 0) return {attended, lse};

  FusedTensors p{};
  p.q = q.const_data_ptr();
  p.q_stride_batch = q.stride(0);
  p.q_stride_token = q.stride(1);
  p.q_stride_head = q.stride(2);
  p.k_cache = region_of(k_cache);
  p.v_cache = region_of(v_cache);
  p.k_quant = region_or_null(k_quant);
  p.k_scale = region_or_null(k_scale);
  p.page_bounds = region_or_null(page_bounds);
  p.bounds_scale = region_or_null(bounds_scale);
  p.page_means = region_or_null(page_means);
  p.means_scale = region_or_null(means_scale);
  p.channel_order = data_or_null<int>(channel_order);
  p.prefix_channels = data_or_null<int>(prefix_channels);
  p.page_table = static_cast<const int*>(page_table.const_data_ptr());
  p.seq_lens = static_cast<const int*>(seq_lens.const_data_ptr());
  p.head_token_budget = data_or_null<int>(head_token_budget);
  p.head_top_p = data_or_null<float>(head_top_p);
  if (head_top_p.has_value()) {
    p.top_p_stride_batch = head_top_p->size(0) == 1 ? 0 : head_top_p->stride(0);
    p.top_p_stride_head = head_top_p->size(1) == 1 ? 0 : head_top_p->stride(1);
  }
  if (budget_counters.has_value()) {
    p.budget_counters = static_cast<unsigned long long*>(budget_counters->mutable_data_ptr());
  }
  if (kept_indices.has_value()) {
    p.kept_indices = static_cast<int*>(kept_indices->mutable_data_ptr());
    p.kept_counts = static_cast<int*>(kept_counts->mutable_data_ptr());
  }
  p.out = out.has_value() ? out->mutable_data_ptr() : attended.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.k_descale = data_or_null<float>(k_descale);
  p.v_descale = data_or_null<float>(v_descale);
  p.k_shift = data_or_null<float>(k_shift);
  p.top_p = top_p;
  p.sm_scale = static_cast<float>(sm_scale);
  STD_CUDA_CHECK(lies_in_host_memory(k_cache, p.in_host_memory));

  PlanRequest request{};
  request.selector = selector_named(selector_name);
  request.prunes = top_p < 1.0 || head_top_p.has_value();
  request.softcap = softcap.value_or(0.0);
  request.dtype_bits = 8 * q.element_size();
  request.bounds_bits = page_bounds.has_value() ? 8 * page_bounds->element_size() : 0;
  request.head_dim = head_dim;
  request.query_tokens = query_tokens;
  request.kv_heads = k_cache.size(1);
  request.group_size = heads / request.kv_heads;
  request.batch = batch;
  request.page_size = k_cache.size(2);
  request.max_pages = page_table.size(1);
  request.num_pages = k_cache.size(0);
  request.page_words = page_words(p.k_cache, p.v_cache, p.k_quant, p.k_scale);
  request.token_budget = token_budget;
  request.sink_tokens = sink_tokens;
  request.recent_tokens = recent_tokens;
  request.dense_below = dense_below;
  request.budget_fraction = budget_fraction;
  request.page_fraction = page_fraction;
  request.min_scored_tokens = min_scored_tokens;
  request.cluster_size = cluster_size;
  STD_CUDA_CHECK(read_limits(device, request.device));
  const Plan plan = plan_fused_decode(request);
  if (*plan.reason != 0)
    throw std::runtime_error(std::string(TWILIGHT_NAMESPACE_NAME "::_fused_decode_attention: ") + plan.reason);

  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto choose = q.scalar_type() == ScalarType::Half ? launcher_of<__half> : launcher_of<__nv_bfloat16>;
  choose(k_cache.element_size() == 1, head_dim)(fused_params(p, request, plan), plan.grid, plan.cluster_size,
                                                plan.shared_bytes, static_cast<cudaStream_t>(stream));
  return {attended, lse};
}

}  // namespace
}  // namespace twilight

STABLE_TORCH_LIBRARY_IMPL(TWILIGHT_NAMESPACE, CUDA, m) {
  m.impl("_fused_decode_attention", TORCH_BOX(&twilight::fused_decode_attention));
}

// For Python, which plans a call before it sends it here: false where the device cannot be asked.
extern "C" __attribute__((visibility("default"))) bool twilight_device_limits(int device,
                                                                              twilight::DeviceLimits* limits) {
  return twilight::read_limits(device, *limits) == cudaSuccess;
}
