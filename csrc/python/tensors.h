// What the plan asks of a torch tensor before an engine may touch its memory.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/TensorImpl.h>

#include "core/tensor_view.h"

namespace trainopt::python {

// A dense, real, materialised CPU tensor and nothing else: no subclass with a dispatch of its own, no lazy conjugate or
// negation, no functorch wrapper. The check is one mask over the dispatch keys: an ordinary tensor has all of them but
// those that a tensor made in inference mode lacks.
inline bool is_plain_cpu(const c10::TensorImpl* tensor) {
  static const uint64_t ordinary = at::detail::empty_cpu({0}, at::kFloat).unsafeGetTensorImpl()->key_set().raw_repr();
  return (tensor->key_set().raw_repr() & ~ordinary) == 0 && tensor->key_set().has(c10::DispatchKey::CPU);
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

// The tensor's memory, to write; a lazily copied tensor is given its own first.
inline void* writable(const at::Tensor& tensor) { return tensor.mutable_data_ptr(); }

// As any in-place operation: what autograd saved of the tensor before is now known to be stale.
inline void bump_version(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace trainopt::python
