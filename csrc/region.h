// Where a tensor of the cache lies: what belongs to a (page, KV head) is contiguous, and pages and heads lie any
// multiple of 16 bytes apart, so that a block of an engine can hold all of its tensors.
#pragma once

#include <cstdint>

namespace twilight {

template <class Byte>
struct Region {
  Byte* data;                         // null: no such tensor
  uint32_t page_stride, head_stride;  // bytes

  template <class T>
  T* at(int64_t page, int64_t head) const {
    return reinterpret_cast<T*>(data + page * page_stride + head * head_stride);
  }
};
using ReadRegion = Region<const char>;

// Of a tensor [P, Hkv, ..] that Checker.paged has seen.
template <class Tensor, class Byte>
Region<Byte> region_of(const Tensor& tensor, Byte* data) {
  return {data, static_cast<uint32_t>(tensor.stride(0) * tensor.element_size()),
          static_cast<uint32_t>(tensor.stride(1) * tensor.element_size())};
}
template <class Tensor>
ReadRegion region_of(const Tensor& tensor) {
  return region_of(tensor, static_cast<const char*>(tensor.const_data_ptr()));
}
template <class Optional>
ReadRegion region_or_null(const Optional& tensor) {
  return tensor.has_value() ? region_of(*tensor) : ReadRegion{};
}
template <class Optional>
Region<char> written_region_or_null(const Optional& tensor) {
  return tensor.has_value() ? region_of(*tensor, static_cast<char*>(tensor->mutable_data_ptr())) : Region<char>{};
}

// Elements of an optional tensor, whose dtype was checked.
template <class T, class Optional>
const T* data_or_null(const Optional& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace twilight
