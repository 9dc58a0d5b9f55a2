// Argument checks: the C++ twin of twilight_ops/ops/_checks.py, with the same words.
// A message always reads `twilight::<op>: <argument>: expected <what>, got <what>`.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <iomanip>
#include <locale>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "capacity.h"
#include "namespace.h"
#include "region.h"

namespace twilight {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMaxQueryTokens = 8;
constexpr int64_t kPageAlignment = 16, kMaxPageStride = int64_t{1} << 32;  // bytes

inline std::string dtype_name(ScalarType dtype) {
  constexpr std::pair<ScalarType, const char*> kNames[] = {{ScalarType::Float, "float32"},
                                                           {ScalarType::Double, "float64"},
                                                           {ScalarType::Half, "float16"},
                                                           {ScalarType::Byte, "uint8"},
                                                           {ScalarType::BFloat16, "bfloat16"},
                                                           {ScalarType::Char, "int8"},
                                                           {ScalarType::Short, "int16"},
                                                           {ScalarType::Int, "int32"},
                                                           {ScalarType::Long, "int64"},
                                                           {ScalarType::Bool, "bool"},
                                                           {ScalarType::Float8_e4m3fn, "float8_e4m3fn"}};
  for (const auto& [known, name] : kNames)
    if (known == dtype) return name;
  return torch::headeronly::toString(dtype);
}

inline std::string device_name(const Tensor& tensor) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  switch (static_cast<torch::headeronly::DeviceType>(type)) {
    case torch::headeronly::DeviceType::CPU:
      return "cpu";
    case torch::headeronly::DeviceType::CUDA:
      return "cuda:" + std::to_string(tensor.get_device_index());
    case torch::headeronly::DeviceType::Meta:
      return "meta";
    default:
      return "device type " + std::to_string(type);
  }
}

// repr(float) of Python: the shortest digits that read back the same, in fixed notation from 1e-4 up to 1e16.
inline std::string number(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  const double size = std::fabs(value);
  const bool fixed = size == 0 || (size >= 1e-4 && size < 1e16);
  std::string out;
  // Not std::to_chars, which manylinux_2_28 does not have for a double.
  for (int digits = fixed ? 1 : 0; digits <= 20; ++digits) {
    std::stringstream text;
    text.imbue(std::locale::classic());
    text << (fixed ? std::fixed : std::scientific) << std::setprecision(digits) << value;
    out = text.str();
    double read = 0;
    if (text >> read && read == value) break;
  }
  return out;
}

template <class Values>
std::string list(const Values& values) {
  std::string out = "[";
  for (size_t i = 0; i < values.size(); ++i) out += (i ? ", " : "") + std::to_string(values[i]);
  return out + "]";
}

// A dimension is either a symbol, bound by the first tensor that has it, or a number.
struct Dim {
  Dim(const char* symbol) : symbol(symbol), size(0) {}  // NOLINT: written as {"B", "T", 2}
  Dim(int64_t size) : symbol(nullptr), size(size) {}    // NOLINT
  Dim(int size) : symbol(nullptr), size(size) {}        // NOLINT

  const char* symbol;
  int64_t size;
};

// Which strides a tensor may have: those of its sizes, any but the last, or any of pages and heads.
enum class Layout { kContiguous, kRows, kPaged };

// What `_first_requiring_grad` returns in a process without Python to ask (schemas.cpp).
constexpr int64_t kNobodyAsked = -2;

class Checker {
 public:
  // `like` is the first tensor that the operator checks, which refuses a None in its place.
  Checker(const char* op, const Tensor& like) : op_(op), like_(like) {
    grad_enabled_ = aoti_torch_grad_mode_is_enabled();
    if (!like.defined()) return;
    dtype_ = like.scalar_type();
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index_));
  }

  [[noreturn]] void fail(const char* argument, const std::string& expected, const std::string& got) const {
    throw std::runtime_error(std::string(TWILIGHT_NAMESPACE_NAME "::") + op_ + ": " + argument + ": expected " +
                             expected + ", got " + got);
  }

  bool bound(const char* symbol) const {
    return std::any_of(sizes_.begin(), sizes_.end(), [&](const auto& known) { return known.first == symbol; });
  }

  int64_t size(const char* symbol) const {
    for (const auto& known : sizes_)
      if (known.first == symbol) return known.second;
    return -1;
  }

  void bind(const char* symbol, int64_t value) { sizes_.emplace_back(symbol, value); }

  void tensor(const char* argument, const Tensor& tensor, std::initializer_list<Dim> dims,
              std::initializer_list<ScalarType> dtypes, Layout layout = Layout::kContiguous) {
    if (!tensor.defined()) fail(argument, "a tensor", "None");
    watch(argument, tensor);
    check_device(argument, tensor);
    check_dtype(argument, tensor, dtypes);
    const auto sizes = tensor.sizes();
    if (sizes.size() != dims.size()) fail(argument, "shape " + shape(dims), list(sizes));
    size_t i = 0;
    for (const Dim& dim : dims) {
      const int64_t got = sizes[i++];
      if (dim.symbol == nullptr) {
        if (got != dim.size) fail(argument, "shape " + shape(dims), list(sizes));
        continue;
      }
      const int64_t known = size(dim.symbol);
      if (known < 0) {
        bind(dim.symbol, got);
      } else if (got != known) {
        fail(argument, "shape " + shape(dims) + " with " + dim.symbol + " = " + std::to_string(known), list(sizes));
      }
    }
    if (layout == Layout::kRows) {
      if (tensor.stride(tensor.dim() - 1) != 1)
        fail(argument, "stride 1 in the last dimension", "strides " + list(tensor.strides()));
    } else if (!tensor.is_contiguous()) {
      if (layout == Layout::kContiguous) fail(argument, "a contiguous tensor", "strides " + list(tensor.strides()));
      page_strides(argument, tensor);
    }
  }

  // A tensor of the cache, [P, Hkv, ..]; see region.h.
  void paged(const char* argument, const Tensor& paged, std::initializer_list<Dim> dims,
             std::initializer_list<ScalarType> dtypes) {
    tensor(argument, paged, dims, dtypes, Layout::kPaged);
  }

  void one_of(const char* argument, int64_t value, std::initializer_list<int64_t> allowed) const {
    std::string names;
    for (int64_t a : allowed) {
      if (a == value) return;
      names += (names.empty() ? "" : ", ") + std::to_string(a);
    }
    fail(argument, "one of " + names, std::to_string(value));
  }

  template <class Names>
  void one_of(const char* argument, const std::string& value, const Names& allowed) const {
    std::string names;
    for (const char* a : allowed) {
      if (value == a) return;
      names += std::string(names.empty() ? "" : ", ") + a;
    }
    fail(argument, "one of " + names, value);
  }

  void at_least(const char* argument, int64_t value, int64_t minimum) const {
    if (value < minimum) fail(argument, ">= " + std::to_string(minimum), std::to_string(value));
  }

  // Optional tensors that must be given or absent. A None for one that is not optional arrives as an undefined tensor.
  void given(const char* argument, const OptionalTensor& tensor, const char* expected) const {
    if (!tensor.has_value() || !tensor->defined()) fail(argument, expected, "None");
  }
  void absent(const char* argument, const OptionalTensor& tensor, const std::string& expected) const {
    if (tensor.has_value()) fail(argument, expected, "a tensor");
  }
  void together(const char* argument, const OptionalTensor& tensor, const char* other,
                const OptionalTensor& other_tensor) const {
    if (tensor.has_value() != other_tensor.has_value())
      fail(argument, std::string("given exactly when ") + other + " is given", "one without the other");
  }

  void geometry() const {
    if (bound("D")) one_of("head_dim", size("D"), {64, 96, 128, 256});
    if (bound("S")) one_of("page_size", size("S"), {16, 32, 64});
    const int64_t heads = size("Hq"), kv_heads = size("Hkv");
    if (bound("Hq") && bound("Hkv") && !(kv_heads > 0 && heads > 0 && heads % kv_heads == 0))
      fail("q", "num_qo_heads a multiple of num_kv_heads = " + std::to_string(kv_heads), std::to_string(heads));
  }

  void query(const Tensor& q) {
    tensor("q", q, {"B", "T", "Hq", "D"}, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, Layout::kRows);
    const int64_t tokens = size("T");
    if (tokens < 1 || tokens > kMaxQueryTokens)
      fail("q", "1 to " + std::to_string(kMaxQueryTokens) + " query tokens", std::to_string(tokens));
  }

  void paging(const Tensor& page_table, const Tensor& seq_lens) {
    tensor("page_table", page_table, {"B", "M"}, {ScalarType::Int});
    tensor("seq_lens", seq_lens, {"B"}, {ScalarType::Int});
    const int64_t pages = page_table.size(1), page_size = size("S"), most = kMaxTableTokens / page_size;
    if (pages > most)
      fail("page_table", "at most " + std::to_string(most) + " pages of " + std::to_string(page_size) + " tokens",
           std::to_string(pages));
  }

  void cache(const Tensor& k_cache, const Tensor& v_cache) {
    paged("k_cache", k_cache, {"P", "Hkv", "S", "D"}, {dtype_, ScalarType::Float8_e4m3fn});
    paged("v_cache", v_cache, {"P", "Hkv", "S", "D"}, {k_cache.scalar_type()});
  }

  void scales(const OptionalTensor& k_descale, const OptionalTensor& v_descale, const OptionalTensor& k_shift,
              ScalarType stored) {
    if (stored != ScalarType::Float8_e4m3fn) {
      const std::string expected = "None, because k_cache is " + dtype_name(stored);
      absent("k_descale", k_descale, expected);
      absent("v_descale", v_descale, expected);
      absent("k_shift", k_shift, expected);
    }
    if (k_descale.has_value()) tensor("k_descale", *k_descale, {"Hkv"}, {ScalarType::Float});
    if (v_descale.has_value()) tensor("v_descale", *v_descale, {"Hkv"}, {ScalarType::Float});
    if (k_shift.has_value()) tensor("k_shift", *k_shift, {"Hkv", "D"}, {ScalarType::Float});
  }

  void shadow(const OptionalTensor& k_quant, const OptionalTensor& k_scale, const OptionalTensor& channel_order,
              const OptionalTensor& prefix_channels, const OptionalTensor& k_center) {
    const char* expected = "a tensor (k_quant, k_scale, channel_order and prefix_channels come together)";
    given("k_quant", k_quant, expected);
    given("k_scale", k_scale, expected);
    given("channel_order", channel_order, expected);
    given("prefix_channels", prefix_channels, expected);
    paged("k_scale", *k_scale, {"P", "Hkv", "S", 2}, {ScalarType::BFloat16});
    tensor("channel_order", *channel_order, {"Hkv", "D"}, {ScalarType::Int});
    tensor("prefix_channels", *prefix_channels, {"Hkv"}, {ScalarType::Int});
    paged("k_quant", *k_quant, {"P", "Hkv", size("S") * size("D") / 2}, {ScalarType::Byte});
    if (k_center.has_value()) tensor("k_center", *k_center, {"Hkv", "D"}, {ScalarType::Float});
  }

  void shadow_if_any(const OptionalTensor& k_quant, const OptionalTensor& k_scale, const OptionalTensor& channel_order,
                     const OptionalTensor& prefix_channels, const OptionalTensor& k_center) {
    if (k_quant.has_value() || k_scale.has_value() || channel_order.has_value() || prefix_channels.has_value() ||
        k_center.has_value())
      shadow(k_quant, k_scale, channel_order, prefix_channels, k_center);
  }

  void bounds(const Tensor& page_bounds, const OptionalTensor& bounds_scale) {
    paged("page_bounds", page_bounds, {"P", "Hkv", 2, "D"}, {dtype_, ScalarType::Byte});
    if (page_bounds.scalar_type() == ScalarType::Byte) {
      given("bounds_scale", bounds_scale, "a tensor, because page_bounds is uint8");
      paged("bounds_scale", *bounds_scale, {"P", "Hkv", 2}, {ScalarType::BFloat16});
    } else {
      absent("bounds_scale", bounds_scale, "None, because page_bounds is " + dtype_name(dtype_));
    }
  }

  // `needed` says why there must be some, null where there need not be.
  void means(const OptionalTensor& page_means, const OptionalTensor& means_scale, const char* needed = nullptr) {
    if (!page_means.has_value() && !means_scale.has_value()) {
      if (needed != nullptr) fail("page_means", needed, "None");
      return;
    }
    together("means_scale", means_scale, "page_means", page_means);
    paged("means_scale", *means_scale, {"P", "Hkv", 2}, {ScalarType::BFloat16});
    paged("page_means", *page_means, {"P", "Hkv", size("D") / 2}, {ScalarType::Byte});
  }

  // A page_size of 0 stands for any.
  void candidates(const OptionalTensor& indices, const OptionalTensor& counts, int64_t tokens_per_index,
                  int64_t page_size) {
    together("counts", counts, "indices", indices);
    if (page_size == 0) {
      one_of("tokens_per_index", tokens_per_index, {1, 16, 32, 64});
    } else {
      one_of("tokens_per_index", tokens_per_index, {1, page_size});
    }
    if (indices.has_value()) {
      tensor("indices", *indices, {"B", "Hkv", "C"}, {ScalarType::Int});
      tensor("counts", *counts, {"B", "Hkv"}, {ScalarType::Int});
    }
  }

  void budget(int64_t token_budget, double budget_fraction, int64_t sink_tokens, int64_t recent_tokens,
              const OptionalTensor& head_token_budget) {
    at_least("token_budget", token_budget, 1);
    if (!(budget_fraction >= 0.0 && budget_fraction <= 1.0))
      fail("budget_fraction", "0 <= budget_fraction <= 1", number(budget_fraction));
    at_least("sink_tokens", sink_tokens, 0);
    at_least("recent_tokens", recent_tokens, 0);
    if (head_token_budget.has_value()) tensor("head_token_budget", *head_token_budget, {"Hkv"}, {ScalarType::Int});
  }

  void level(double page_fraction, int64_t min_scored_tokens) const {
    if (!(page_fraction > 0.0 && page_fraction <= 1.0))
      fail("page_fraction", "0 < page_fraction <= 1", number(page_fraction));
    at_least("min_scored_tokens", min_scored_tokens, 0);
  }

  void top_p(double top_p, const OptionalTensor& head_top_p) {
    if (!(top_p > 0.0 && top_p <= 1.0)) fail("top_p", "0 < top_p <= 1", number(top_p));
    if (!head_top_p.has_value()) return;
    const Tensor& p = *head_top_p;
    watch("head_top_p", p);
    const int64_t batch = size("B"), heads = size("Hq");
    check_device("head_top_p", p);
    check_dtype("head_top_p", p, {ScalarType::Float});
    const auto sizes = p.sizes();
    if (sizes.size() != 2 || (sizes[0] != 1 && sizes[0] != batch) || (sizes[1] != 1 && sizes[1] != heads))
      fail("head_top_p",
           "shape [B or 1, Hq or 1] with B = " + std::to_string(batch) + ", Hq = " + std::to_string(heads),
           list(sizes));
  }

  void softcap(const std::optional<double>& softcap) const {
    if (softcap && !(*softcap >= 1e-30 && *softcap <= 1e30))
      fail("softcap", "None or a number from 1e-30 to 1e30", number(*softcap));
  }

  void scale(double sm_scale) const {
    if (!(sm_scale > 0.0 && sm_scale < INFINITY)) fail("sm_scale", "a positive finite number", number(sm_scale));
  }

  // The last check of every operator; see Checker.no_gradients in _checks.py. Only Python can ask a tensor.
  void no_gradients() const {
    if (watched_.empty()) return;
    StableIValue stack[] = {torch::stable::detail::from(watched_)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher(TWILIGHT_NAMESPACE_NAME "::_first_requiring_grad", "", stack, TORCH_ABI_VERSION));
    const int64_t first = torch::stable::detail::to<int64_t>(stack[0]);
    if (first == kNobodyAsked) fail("gradients", "none enabled in a process without twilight_ops", "them enabled");
    if (first >= 0)
      fail(watched_names_[first], "a tensor that needs no gradient (there is no backward: call under torch.no_grad())",
           "requires_grad=True");
  }

 private:
  void page_strides(const char* argument, const Tensor& tensor) const {
    int64_t size = 1;  // elements of a (page, head)
    bool fits = true;
    for (int64_t i = tensor.dim() - 1; i >= 2; --i) {
      fits &= tensor.size(i) == 1 || tensor.stride(i) == size;
      size *= tensor.size(i);
    }
    if (!fits) fail(argument, "contiguous dimensions behind pages and heads", "strides " + list(tensor.strides()));
    const int64_t bytes = tensor.element_size();
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t stride = tensor.stride(i) * bytes;
      fits &=
          tensor.size(i) == 1 || (stride % kPageAlignment == 0 && stride >= size * bytes && stride < kMaxPageStride);
    }
    if (!fits)
      fail(argument,
           "page and head strides that are multiples of 16 bytes, from " + std::to_string(size * bytes) +
               " bytes to 4 GiB",
           "strides " + list(tensor.strides()) + " of " + std::to_string(bytes) + " bytes");
    const int64_t offset = tensor.storage_offset() * bytes;
    if (offset % kPageAlignment != 0)
      fail(argument, "a view that starts at a multiple of 16 bytes", "byte " + std::to_string(offset));
  }

  // Keeps a tensor that may ask for a gradient for `no_gradients`.
  void watch(const char* argument, const Tensor& tensor) {
    if (!grad_enabled_) return;
    watched_names_.push_back(argument);
    watched_.push_back(tensor);
  }

  static std::string shape(std::initializer_list<Dim> dims) {
    std::string out = "[";
    for (const Dim& dim : dims)
      out += (out.size() > 1 ? ", " : "") + (dim.symbol ? std::string(dim.symbol) : std::to_string(dim.size));
    return out + "]";
  }

  void check_device(const char* argument, const Tensor& tensor) const {
    int32_t type, index;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
    if (type != device_type_ || index != device_index_)
      fail(argument, "device " + device_name(like_), device_name(tensor));
  }

  void check_dtype(const char* argument, const Tensor& tensor, std::initializer_list<ScalarType> dtypes) const {
    const ScalarType got = tensor.scalar_type();
    std::string names;
    for (ScalarType dtype : dtypes)
      if (dtype == got) return;
    for (ScalarType dtype : dtypes) names += (names.empty() ? "" : " or ") + dtype_name(dtype);
    fail(argument, "dtype " + names, dtype_name(got));
  }

  const char* op_;
  const Tensor& like_;
  ScalarType dtype_{};
  int32_t device_type_ = 0, device_index_ = 0;
  bool grad_enabled_;
  std::vector<const char*> watched_names_;
  std::vector<Tensor> watched_;
  std::vector<std::pair<std::string, int64_t>> sizes_;
};

}  // namespace twilight
