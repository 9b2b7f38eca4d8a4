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
inline const uint64_t kOrdinaryKeys =
    at::detail::empty_cpu({0}, at::kFloat).unsafeGetTensorImpl()->key_set().raw_repr();

inline bool is_plain_cpu(const at::Tensor& tensor) {
  const c10::DispatchKeySet keys = tensor.unsafeGetTensorImpl()->key_set();
  return (keys.raw_repr() & ~kOrdinaryKeys) == 0 && keys.has(c10::DispatchKey::CPU);
}

// The tensor's type and memory; a lazily copied tensor is given memory of its own if it is to be written. False for a
// type that the engine does not store.
inline bool read_view(const at::Tensor& tensor, bool writes, TensorView* out) {
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  switch (c10::typeMetaToScalarType(impl->dtype())) {
    case c10::ScalarType::Float: out->dtype = DType::kFloat32; break;
    case c10::ScalarType::Double: out->dtype = DType::kFloat64; break;
    case c10::ScalarType::BFloat16: out->dtype = DType::kBFloat16; break;
    case c10::ScalarType::Half: out->dtype = DType::kFloat16; break;
    default: return false;
  }
  out->layout = nullptr;
  // TensorImpl's own accessors ask it virtually whether it has a storage; a plain tensor has.
  c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  char* base = static_cast<char*>(writes ? storage->mutable_data() : const_cast<void*>(storage->data()));
  out->data = base + impl->storage_offset() * size_of(out->dtype);
  return true;
}

inline bool is_dense(const at::Tensor& tensor) { return tensor.unsafeGetTensorImpl()->is_non_overlapping_and_dense(); }

}  // namespace trainopt::python
