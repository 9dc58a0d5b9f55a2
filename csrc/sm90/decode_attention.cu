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

#include "fused_decode.cuh"

namespace twilight {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int kSharedLimit = 227 * 1024;          // a block's, on sm_90
constexpr int kSharedPerBlockOfTwo = 113 * 1024;  // of two blocks on a multiprocessor
// A cluster of blocks lies within one of these groups of 14 to 18 multiprocessors: with a block each, clusters of four
// or more do not fill the chip, and the last of 128 blocks would wait for the first.
constexpr int kProcessingClusters = 8;

using Launcher = void (*)(const FusedParams&, int grid, int cluster_size, int shared_bytes, cudaStream_t stream);

Launcher launcher_of(ScalarType dtype, int head_dim) {
  if (dtype == ScalarType::Half)
    return head_dim == 64 ? launch_fused_decode<__half, 64> : launch_fused_decode<__half, 128>;
  return head_dim == 64 ? launch_fused_decode<__nv_bfloat16, 64> : launch_fused_decode<__nv_bfloat16, 128>;
}

template <typename V = void>
const V* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<const V*>(tensor->const_data_ptr()) : nullptr;
}

FusedSelector selector_of(const std::string& name) {
  if (name == "dense") return FusedSelector::kDense;
  if (name == "full") return FusedSelector::kFull;
  if (name == "quest") return FusedSelector::kQuest;
  return FusedSelector::kShadowPrefix;
}

// Arguments were checked by decode_attention; kernels/fused.py says which calls come here and with which cluster size.
std::tuple<Tensor, Tensor> fused_decode_attention(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k_quant,
    const OptionalTensor& k_scale, const OptionalTensor& page_bounds, const OptionalTensor& bounds_scale,
    const OptionalTensor& channel_order, const OptionalTensor& prefix_channels, const Tensor& page_table,
    const Tensor& seq_lens, std::string selector, int64_t token_budget, double budget_fraction, double top_p,
    double sm_scale, int64_t dense_below, int64_t sink_tokens, int64_t recent_tokens,
    const OptionalTensor& head_token_budget, const OptionalTensor& top_p_per_head, OptionalTensor budget_counters,
    OptionalTensor kept_indices, OptionalTensor kept_counts, int64_t cluster_size) {
  const int batch = q.size(0), query_tokens = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const int kv_heads = k_cache.size(1), page_size = k_cache.size(2), rows = query_tokens * heads / kv_heads;
  const int device = q.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out = torch::stable::new_empty(q, {batch, query_tokens, heads, head_dim});
  Tensor lse = torch::stable::new_empty(q, {batch, query_tokens, heads}, ScalarType::Float);
  if (batch == 0) return {out, lse};

  FusedParams p{};
  p.q = q.const_data_ptr();
  p.q_stride_batch = q.stride(0);
  p.q_stride_token = q.stride(1);
  p.q_stride_head = q.stride(2);
  p.k_cache = k_cache.const_data_ptr();
  p.v_cache = v_cache.const_data_ptr();
  p.k_quant = data_or_null<uint8_t>(k_quant);
  p.k_scale = data_or_null<uint8_t>(k_scale);
  p.page_bounds = data_or_null<uint8_t>(page_bounds);
  p.bounds_scale = data_or_null<uint8_t>(bounds_scale);
  p.channel_order = data_or_null<int>(channel_order);
  p.prefix_channels = data_or_null<int>(prefix_channels);
  p.page_table = static_cast<const int*>(page_table.const_data_ptr());
  p.seq_lens = static_cast<const int*>(seq_lens.const_data_ptr());
  p.head_token_budget = data_or_null<int>(head_token_budget);
  p.top_p_per_head = data_or_null<float>(top_p_per_head);
  if (top_p_per_head.has_value()) {
    p.top_p_stride_batch = top_p_per_head->size(0) == 1 ? 0 : top_p_per_head->stride(0);
    p.top_p_stride_head = top_p_per_head->size(1) == 1 ? 0 : top_p_per_head->stride(1);
  }
  if (budget_counters.has_value()) {
    p.budget_counters = static_cast<unsigned long long*>(budget_counters->mutable_data_ptr());
  }
  if (kept_indices.has_value()) {
    p.kept_indices = static_cast<int*>(kept_indices->mutable_data_ptr());
    p.kept_counts = static_cast<int*>(kept_counts->mutable_data_ptr());
  }
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.budget_fraction = budget_fraction;
  p.top_p = top_p;
  p.sm_scale = static_cast<float>(sm_scale);
  p.selector = selector_of(selector);
  p.query_tokens = query_tokens;
  p.group_size = heads / kv_heads;
  p.kv_heads = kv_heads;
  p.log2_page_size = page_size == 16 ? 4 : page_size == 32 ? 5 : 6;
  p.max_pages = page_table.size(1);
  p.num_pages = k_cache.size(0);
  const Limits limits(page_table.size(1) * page_size, query_tokens, token_budget, sink_tokens, recent_tokens,
                      dense_below);
  p.token_budget = limits.token_budget;
  p.capacity = p.selector == FusedSelector::kQuest ? page_capacity(limits, page_size, budget_fraction)
                                                   : token_capacity(limits, budget_fraction);
  p.dense_below = limits.dense_below;
  if (limits.max_tokens <= p.dense_below) p.selector = FusedSelector::kDense;  // as kernels/fused.py has it
  p.prunes = p.selector != FusedSelector::kDense && (top_p < 1.0 || top_p_per_head.has_value());
  p.sink_tokens = limits.sink_tokens;
  p.recent_tokens = limits.recent_tokens;

  const int grid = batch * kv_heads * static_cast<int>(cluster_size);
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  p.evens_out = grid > multiprocessors;
  int shared_bytes = lay_out(p, head_dim, rows, cluster_size);
  const bool clusters_fit =
      shared_bytes <= kSharedPerBlockOfTwo || cluster_size <= 2 || batch * kv_heads <= kProcessingClusters;
  if (!p.evens_out && (shared_bytes > kSharedLimit || !clusters_fit)) {
    p.evens_out = 1;
    shared_bytes = lay_out(p, head_dim, rows, cluster_size);
  }
  if (shared_bytes > kSharedLimit) {
    throw std::runtime_error("twilight::_fused_decode_attention: page_table: expected at most " +
                             std::to_string(kSharedLimit) + " bytes of shared memory a block, got " +
                             std::to_string(shared_bytes));
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  launcher_of(q.scalar_type(), head_dim)(p, grid, cluster_size, shared_bytes, static_cast<cudaStream_t>(stream));
  return {out, lse};
}

}  // namespace
}  // namespace twilight

STABLE_TORCH_LIBRARY_FRAGMENT(twilight, m) {
  m.def(
      "_fused_decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_quant, Tensor? k_scale, "
      "Tensor? page_bounds, Tensor? bounds_scale, Tensor? channel_order, Tensor? prefix_channels, Tensor page_table, "
      "Tensor seq_lens, str selector, int token_budget, float budget_fraction, float top_p, float sm_scale, "
      "int dense_below, int sink_tokens, int recent_tokens, Tensor? head_token_budget, Tensor? top_p_per_head, "
      "Tensor(a!)? budget_counters, Tensor(b!)? kept_indices, Tensor(c!)? kept_counts, int cluster_size) "
      "-> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(twilight, CUDA, m) {
  m.impl("_fused_decode_attention", TORCH_BOX(&twilight::fused_decode_attention));
}
