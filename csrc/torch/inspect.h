// What is asked of a torch tensor before an engine may touch its memory: the only file that knows TensorImpl's insides.
// Each trick that it plays for speed has a slow twin, in torch's public words, behind TRAINOPT_SLOW_INSPECT: for a
// torch in which the trick no longer compiles, and to show that it is one.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/TensorImpl.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "core/macros.h"
#include "core/tensor_view.h"

namespace trainopt::aten {

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
#if defined(TRAINOPT_SLOW_INSPECT)
  return const_cast<c10::TensorImpl*>(tensor)->storage().unsafeGetStorageImpl();
#else
  return tensor->unsafe_storage().unsafeGetStorageImpl();
#endif
}

// What autograd keeps for a tensor; null where there is nothing yet. TensorImpl's accessor is a call into libc10 for
// each tensor of a step; see VersionAccess for how its member is reached here.
#if defined(TRAINOPT_SLOW_INSPECT)
inline const torch::autograd::AutogradMeta* autograd_meta_of(const c10::TensorImpl* tensor) {
  return static_cast<const torch::autograd::AutogradMeta*>(const_cast<c10::TensorImpl*>(tensor)->autograd_meta());
}
#else
template <auto kMember>
struct MetaAccess;
template <std::unique_ptr<c10::AutogradMetaInterface> c10::TensorImpl::* kMember>
struct MetaAccess<kMember> {
  friend const c10::AutogradMetaInterface* meta_of(const c10::TensorImpl& tensor) { return (tensor.*kMember).get(); }
};
const c10::AutogradMetaInterface* meta_of(const c10::TensorImpl& tensor);
template struct MetaAccess<&c10::TensorImpl::autograd_meta_>;

inline const torch::autograd::AutogradMeta* autograd_meta_of(const c10::TensorImpl* tensor) {
  return static_cast<const torch::autograd::AutogradMeta*>(meta_of(*tensor));
}
#endif

// As TensorImpl::requires_grad, which is another call; most states have nothing of autograd's.
inline bool requires_grad(const c10::TensorImpl* tensor) {
  return autograd_meta_of(tensor) != nullptr && tensor->requires_grad();
}

// The tensor in .grad, read without the reference that at::Tensor::grad() hands out; null if there is none.
inline const c10::TensorImpl* gradient_of(const c10::TensorImpl* param) {
#if defined(TRAINOPT_SLOW_INSPECT)
  const at::Tensor gradient = tensor_from(param).grad();
  return gradient.defined() ? gradient.unsafeGetTensorImpl() : nullptr;
#else
  const torch::autograd::AutogradMeta* meta = autograd_meta_of(param);
  return meta != nullptr && meta->grad_.defined() ? meta->grad_.unsafeGetTensorImpl() : nullptr;
#endif
}

// From the first element in memory to the last, counted in elements.
inline int64_t extent_of(const c10::TensorImpl* tensor) {
  const int64_t numel = tensor->numel();
  if (numel == 0 || tensor->is_non_overlapping_and_dense()) return numel;
  int64_t extent = 1;
  for (int64_t d = 0; d < tensor->dim(); ++d) extent += (tensor->sizes()[d] - 1) * tensor->strides()[d];
  return extent;
}

// Whether a storage of so many bytes at `data` holds elements up to `end`. Python can take a storage's memory away from
// under its tensors (untyped_storage().resize_), and torch's own kernels end the process then.
TRAINOPT_INLINE bool holds(const void* data, size_t bytes, int64_t end, size_t itemsize) {
  return data != nullptr && static_cast<size_t>(end) * itemsize <= bytes;
}

// Whether all elements of a tensor are in its storage.
inline bool has_memory(const c10::TensorImpl* tensor) {
  const c10::StorageImpl* storage = storage_of(tensor);
  return tensor->numel() == 0 || holds(storage->data(), storage->nbytes(), tensor->storage_offset() + extent_of(tensor),
                                       tensor->dtype().itemsize());
}

// What is said of a tensor that has none, after its name.
inline std::string no_memory(const c10::TensorImpl* tensor) {
  const int64_t end = tensor->storage_offset() + extent_of(tensor);
  const c10::StorageImpl* storage = storage_of(tensor);
  return " needs " + std::to_string(end * static_cast<int64_t>(tensor->dtype().itemsize())) +
         " bytes of memory, and its storage has " + std::to_string(storage->data() == nullptr ? 0 : storage->nbytes()) +
         " (a tensor of shape " + c10::str(tensor->sizes()) + "; untyped_storage().resize_?)";
}

// RuntimeError for a tensor whose storage is smaller than its sizes and strides say.
inline void check_memory(const char* name, const c10::TensorImpl* tensor) {
  TORCH_CHECK(has_memory(tensor), name, no_memory(tensor));
}

// The tensor's memory; a lazily copied tensor is given memory of its own if it is to be written.
inline void* data_of(const c10::TensorImpl* tensor, DType dtype, bool writes) {
  c10::StorageImpl* storage = storage_of(tensor);
  char* base = static_cast<char*>(writes ? storage->mutable_data() : const_cast<void*>(storage->data()));
  return base + tensor->storage_offset() * size_of(dtype);
}

// False for a type that the engine does not store; RuntimeError for a tensor whose memory is gone.
inline bool read_view(const c10::TensorImpl* tensor, bool writes, TensorView* out) {
  if (!read_dtype(tensor, &out->dtype)) return false;
  check_memory("a tensor", tensor);
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

// Version counters
// ----------------------------------------------------------------------------------------------------- By which
// autograd notices that a tensor it has saved was changed in place.

#if defined(TRAINOPT_SLOW_INSPECT)

using VersionCounter = c10::TensorImpl;

inline VersionCounter* counter_of(const c10::TensorImpl* tensor) {
  auto* const counted = const_cast<c10::TensorImpl*>(tensor);
  return counted->is_inference() ? nullptr : counted;
}

inline void move_on(VersionCounter* counter) { counter->bump_version(); }

#else

// c10::VariableVersion moves on by an atomic operation, which waits for every write before it: for a small tensor that
// costs more than the arithmetic of its step. So its only member is reached by name here. The language lifts access
// checks for the arguments of an explicit instantiation, and the friend that it defines hands the pointer out.
template <auto kMember>
struct VersionAccess;
template <class T, c10::intrusive_ptr<T> c10::VariableVersion::* kMember>
struct VersionAccess<kMember> {
  friend auto counter_of(const c10::VariableVersion& version) { return (version.*kMember).get(); }
};
auto counter_of(const c10::VariableVersion& version);
template struct VersionAccess<&c10::VariableVersion::version_counter_>;

using VersionCounter = std::remove_pointer_t<decltype(counter_of(std::declval<const c10::VariableVersion&>()))>;

// Null for a tensor that was made in inference mode.
inline VersionCounter* counter_of(const c10::TensorImpl* tensor) { return counter_of(tensor->version_counter()); }

// As c10::VariableVersion::bump. A counter that nothing else refers to, no view and no saved tensor, can only be moved
// by another operation that writes to this very tensor at this very time, which is a race for its values anyhow; a
// plain write will do for it.
inline void move_on(VersionCounter* counter) {
  if (c10::raw::intrusive_ptr::use_count(counter) == 1) {
    counter->version_.store(counter->version_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  } else {
    ++counter->version_;
  }
}

#endif

}  // namespace trainopt::aten
