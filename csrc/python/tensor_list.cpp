#include "python/tensor_list.h"

#include <ATen/MemoryOverlap.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "python/cuda_device.h"
#include "python/tensors.h"

namespace trainopt::python {

bool TensorList::add(const at::Tensor& tensor, bool writes) {
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  Item item{{}, impl->numel(), impl};
  if (!is_plain_cpu(impl) && !is_plain_cuda(impl)) return false;
  if (!items.empty() && impl->device() != device()) return false;
  if (!read_view(impl, writes, &item.view)) return false;
  // The order of elements does not matter, so a dense tensor is one run whatever its strides.
  if (!tensor.is_contiguous() && !tensor.is_non_overlapping_and_dense()) {
    if (tensor.dim() > kMaxDims || (writes && at::has_internal_overlap(tensor) != at::MemOverlap::No)) return false;
    Layout layout{static_cast<int>(tensor.dim()), {}, {}};
    std::copy(tensor.sizes().begin(), tensor.sizes().end(), layout.sizes);
    std::copy(tensor.strides().begin(), tensor.strides().end(), layout.strides);
    layouts_.push_back(layout);
    item.view.layout = &layouts_.back();
  }
  items.push_back(item);
  elements += item.numel;
  return true;
}

bool TensorList::collect(const pybind11::list& objects, bool of_gradients, bool writes) {
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
  const size_t count = objects.size();
  items.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    PyObject* object = PyList_GET_ITEM(objects.ptr(), static_cast<Py_ssize_t>(i));
    if (!THPVariable_CheckExact(object)) return false;
    const at::Tensor& tensor = THPVariable_Unpack(object);
    // A plain tensor's gradient may still be of a subclass: that is no plain tensor.
    const at::Tensor& item = of_gradients ? tensor.grad() : tensor;
    if (!item.defined()) continue;
    const c10::TensorImpl* impl = item.unsafeGetTensorImpl();
    TORCH_CHECK(!(is_plain_cpu(impl) || is_plain_cuda(impl)) || has_memory(impl),
                of_gradients ? "the gradient of parameter " : "tensor ", i, no_memory(impl));
    if (!add(item, writes)) return false;
  }
  return true;
}

bool TensorList::share_memory() const {
  struct Span {
    const char *begin, *end;
  };
  std::vector<Span> spans;
  spans.reserve(items.size());
  for (const Item& item : items) {
    if (item.numel == 0) continue;
    int64_t extent = item.numel;
    if (item.view.layout != nullptr) {
      extent = 1;
      for (int d = 0; d < item.view.layout->ndim; ++d)
        extent += (item.view.layout->sizes[d] - 1) * item.view.layout->strides[d];
    }
    const char* begin = static_cast<const char*>(item.view.data);
    spans.push_back({begin, begin + extent * size_of(item.view.dtype)});
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < spans.size(); ++i)
    if (spans[i].begin < spans[i - 1].end) return true;
  return false;
}

at::ScalarType TensorList::norm_dtype() const {
  at::ScalarType result = at::kFloat;
  for (const Item& item : items) {
    const at::ScalarType other = c10::typeMetaToScalarType(item.tensor->dtype());
    if (other != result) result = c10::promoteTypes(result, other);
  }
  return result;
}

}  // namespace trainopt::python
