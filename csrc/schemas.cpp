// Schemas of the operators for a process without twilight_ops, where no Python derives them from its signatures: a
// package of AOTInductor that runs alone. Load this library, then ask for them. tests/test_export.py compares both.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
#include <exception>
#include <vector>

#include "checks.h"

namespace twilight {
namespace {

using torch::stable::detail::StableLibrary;

constexpr const char* kSchemas[] = {
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor page_table, Tensor "
    "seq_lens, Tensor? positions=None, Tensor(c!)? k_quant=None, Tensor(d!)? k_scale=None, Tensor? "
    "channel_order=None, Tensor? prefix_channels=None, Tensor? k_center=None, Tensor(e!)? page_bounds=None, "
    "Tensor(f!)? bounds_scale=None, Tensor(g!)? page_means=None, Tensor(h!)? means_scale=None, Tensor? "
    "k_descale=None, Tensor? v_descale=None, Tensor? k_shift=None) -> ()",
    "select_pages(Tensor q, Tensor? page_bounds, Tensor? bounds_scale, Tensor page_table, Tensor seq_lens, "
    "int page_size, int token_budget, float budget_fraction, Tensor? head_token_budget, float sm_scale, int "
    "sink_tokens=0, int recent_tokens=0, Tensor? page_means=None, Tensor? means_scale=None, Tensor? "
    "k_quant=None, Tensor? k_scale=None, Tensor? channel_order=None, Tensor? prefix_channels=None, Tensor? "
    "k_center=None) -> (Tensor indices, Tensor counts)",
    "select_tokens(Tensor q, Tensor k_quant, Tensor k_scale, Tensor channel_order, Tensor prefix_channels, "
    "Tensor? k_center, Tensor page_table, Tensor seq_lens, int token_budget, float budget_fraction, Tensor? "
    "head_token_budget, float sm_scale, int sink_tokens=0, int recent_tokens=0, Tensor? page_means=None, "
    "Tensor? means_scale=None, float page_fraction=1.0, int min_scored_tokens=0) -> (Tensor indices, Tensor "
    "counts)",
    "estimate_weights(Tensor q, Tensor k_quant, Tensor k_scale, Tensor channel_order, Tensor prefix_channels,"
    " Tensor? k_center, Tensor page_table, Tensor seq_lens, Tensor? indices, Tensor? counts, int "
    "tokens_per_index, float sm_scale, float? softcap=None) -> Tensor",
    "prune_top_p(Tensor weights, Tensor seq_lens, Tensor? indices, Tensor? counts, int tokens_per_index, int "
    "num_kv_heads, float top_p=1.0, Tensor? head_top_p=None, int sink_tokens=0, int recent_tokens=0) -> "
    "(Tensor indices, Tensor counts, Tensor mass)",
    "attend_sparse(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, Tensor? "
    "indices, Tensor? counts, int tokens_per_index, float sm_scale, Tensor? k_descale=None, Tensor? "
    "v_descale=None, Tensor? k_shift=None, float? softcap=None) -> (Tensor out, Tensor lse)",
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, str "
    "selector, int token_budget, float budget_fraction, Tensor? head_token_budget, float top_p, Tensor? "
    "head_top_p, int sink_tokens, int recent_tokens, int dense_below, float page_fraction, int "
    "min_scored_tokens, float sm_scale, Tensor? k_quant=None, Tensor? k_scale=None, Tensor? "
    "channel_order=None, Tensor? prefix_channels=None, Tensor? k_center=None, Tensor? page_bounds=None, "
    "Tensor? bounds_scale=None, Tensor? indices=None, Tensor? counts=None, int tokens_per_index=1, "
    "Tensor(a!)? budget_counters=None, Tensor(b!)? kept_indices=None, Tensor(c!)? kept_counts=None, Tensor? "
    "page_means=None, Tensor? means_scale=None, Tensor(d!)? out=None, Tensor? k_descale=None, Tensor? "
    "v_descale=None, Tensor? k_shift=None, float? softcap=None) -> (Tensor attended, Tensor lse)",
    "_first_requiring_grad(Tensor[] tensors) -> int",
};

// Tensors are asked for gradients in Python alone, and a call that cannot ask must not go on as if none were wanted.
int64_t first_requiring_grad(std::vector<torch::stable::Tensor>) { return kNobodyAsked; }

}  // namespace
}  // namespace twilight

// Whether all are defined now; not where twilight_ops has defined them itself, which is said on stderr.
extern "C" __attribute__((visibility("default"))) bool twilight_define_schemas() {
  static const bool defined = [] {
    try {
      static twilight::StableLibrary library(twilight::StableLibrary::Kind::FRAGMENT, TWILIGHT_NAMESPACE_NAME, nullptr,
                                             __FILE__, __LINE__);
      for (const char* schema : twilight::kSchemas) library.def(schema);
      static twilight::StableLibrary kernels(twilight::StableLibrary::Kind::IMPL, TWILIGHT_NAMESPACE_NAME,
                                             "CompositeExplicitAutograd", __FILE__, __LINE__);
      kernels.impl("_first_requiring_grad", TORCH_BOX(&twilight::first_requiring_grad));
      return true;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "twilight_define_schemas: %s\n", error.what());
      return false;
    }
  }();
  return defined;
}
