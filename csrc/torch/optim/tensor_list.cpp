#include "torch/optim/tensor_list.h"

#include <ATen/MemoryOverlap.h>

#include <algorithm>

#include "torch/cuda_device.h"
#include "torch/inspect.h"

namespace trainopt::aten {

bool TensorList::add(const char* kind, size_t index, const at::Tensor& tensor, bool writes) {
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  Item item{{}, impl->numel(), impl};
  if (!is_plain_cpu(impl) && !is_plain_cuda(impl)) return false;
  TORCH_CHECK(has_memory(impl), kind, index, no_memory(impl));
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

}  // namespace trainopt::aten
