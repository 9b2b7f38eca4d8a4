// What is asked of a torch tensor before an engine may touch its memory.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/TensorImpl.h>

#include "core/macros.h"
#include "core/tensor_view.h"

namespace trainopt::python {

// A dense, real, materialised CPU tensor and nothing else: no subclass with a dispatch of its own, no lazy conjugate or
// negation, no functorch wrapper. The check is one mask over the dispatch keys: an ordinary tensor has all of them but
// those that a tensor made in inference mode lacks. The mask must have autograd's keys wherever the module was loaded:
// in inference mode the tensor that it is read from would have none.
inline const uint64_t kOrdinaryKeys = [] {
  const c10::InferenceMode off(false);
  return at::detail::empty_cpu({0}, at::kFloat).unsafeGetTensorImpl()->key_set().raw_repr();
}();

TRAINOPT_INLINE bool is_plain_cpu(const c10::TensorImpl* tensor) {
  const c10::DispatchKeySet keys = tensor->key_set();
  return (keys.raw_repr() & ~kOrdinaryKeys) == 0 && keys.has(c10::DispatchKey::CPU);
}

// A tensor that holds on to what a plain pointer names.
inline at::Tensor tensor_from(const c10::TensorImpl* impl) {
  return at::Tensor::wrap_tensor_impl(
      c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(const_cast<c10::TensorImpl*>(impl)));
}

// False for a type that the engine does not store.
inline bool read_dtype(const c10::TensorImpl* tensor, DType* out) {
  switch (c10::typeMetaToScalarType(tensor->dtype())) {
    case c10::ScalarType::Float: *out = DType::kFloat32; return true;
    case c10::ScalarType::Double: *out = DType::kFloat64; return true;
    case c10::ScalarType::BFloat16: *out = DType::kBFloat16; return true;
    case c10::ScalarType::Half: *out = DType::kFloat16; return true;
    default: return false;
  }
}

// TensorImpl's own accessors ask it virtually whether it has a storage; a plain tensor has.
TRAINOPT_INLINE c10::StorageImpl* storage_of(const c10::TensorImpl* tensor) {
  return tensor->unsafe_storage().unsafeGetStorageImpl();
}

// The tensor's memory; a lazily copied tensor is given memory of its own if it is to be written.
inline void* data_of(const c10::TensorImpl* tensor, DType dtype, bool writes) {
  c10::StorageImpl* storage = storage_of(tensor);
  char* base = static_cast<char*>(writes ? storage->mutable_data() : const_cast<void*>(storage->data()));
  return base + tensor->storage_offset() * size_of(dtype);
}

inline bool read_view(const c10::TensorImpl* tensor, bool writes, TensorView* out) {
  if (!read_dtype(tensor, &out->dtype)) return false;
  out->layout = nullptr;
  out->data = data_of(tensor, out->dtype, writes);
  return true;
}

// As ==, for the few dimensions that there are.
TRAINOPT_INLINE bool are_equal(c10::IntArrayRef a, c10::IntArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i]) return false;
  return true;
}

// Whether the elements of `tensor` lie in memory in the order of `param`'s, which has the same sizes.
inline bool same_order_in_memory(const c10::TensorImpl* param, const c10::TensorImpl* tensor) {
  return (param->is_contiguous() && tensor->is_contiguous()) || are_equal(param->strides(), tensor->strides());
}

inline const char* end_of(const TensorView& view, int64_t numel) {
  return static_cast<const char*>(view.data) + numel * size_of(view.dtype);
}

// Whether a gradient's memory, which may have gaps or repeat itself, is clear of a dense view's.
inline bool is_clear_of(const c10::TensorImpl* gradient, const TensorView& gradient_view, const TensorView& view,
                        int64_t numel) {
  const char* begin = static_cast<const char*>(gradient_view.data);
  const char* end = end_of(gradient_view, numel);
  if (!gradient->is_non_overlapping_and_dense()) {
    begin = static_cast<const char*>(storage_of(gradient)->data());
    end = begin + storage_of(gradient)->nbytes();
  }
  return end <= static_cast<const char*>(view.data) || end_of(view, numel) <= begin;
}

}  // namespace trainopt::python
