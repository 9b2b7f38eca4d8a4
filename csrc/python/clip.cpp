#include "python/clip.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <vector>

#include "cpu/norm.h"
#include "python/tensors.h"

namespace trainopt::python {
namespace {

// Elements that a thread should at least have to do, and from which on the interpreter is let go.
constexpr int64_t kGrainElements = 48 * 1024, kReleaseElements = 256 * 1024;

struct Item {
  TensorView view;
  int64_t numel;
  c10::TensorImpl* tensor;
};

// The tensors of a list, as the engine sees them, and their chunks one after the other.
struct Work {
  std::vector<Item> items;
  std::vector<int64_t> starts{0};
  int64_t elements = 0;
  std::deque<Layout> layouts;
  std::vector<c10::Storage> kept;  // alive while the interpreter is let go

  // Calls use(item, begin, end, chunk) for all chunks, on torch's threads. `backwards`: each thread takes its last
  // chunk first, which is the one that its cache may still hold from the last time.
  template <class Use>
  void for_each_chunk(bool backwards, Use use) {
    const int64_t chunks = starts.back();
    const auto run = [&](int64_t first, int64_t last) {
      size_t t = static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), backwards ? last - 1 : first) -
                                     starts.begin() - 1);
      for (int64_t i = first; i < last; ++i) {
        const int64_t chunk = backwards ? first + last - 1 - i : i;
        while (chunk >= starts[t + 1]) ++t;
        while (chunk < starts[t]) --t;
        const int64_t begin = (chunk - starts[t]) * kNormChunk;
        use(items[t], begin, std::min(begin + kNormChunk, items[t].numel), chunk);
      }
    };
    if (elements < 2 * kGrainElements) return run(0, chunks);
    const int64_t grain = std::max<int64_t>(chunks * kGrainElements / elements, 1);
    if (elements < kReleaseElements) return at::parallel_for(0, chunks, grain, run);
    for (const Item& item : items) kept.push_back(item.tensor->storage());
    pybind11::gil_scoped_release release;
    at::parallel_for(0, chunks, grain, run);
  }
};

bool add(const at::Tensor& tensor, bool writes, Work& work) {
  Item item{{}, tensor.unsafeGetTensorImpl()->numel(), tensor.unsafeGetTensorImpl()};
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (!is_plain_cpu(impl) || !read_view(impl, writes, &item.view)) return false;
  // The order of elements does not matter, so a dense tensor is one run whatever its strides.
  if (!tensor.is_contiguous() && !tensor.is_non_overlapping_and_dense()) {
    if (tensor.dim() > kMaxDims || (writes && at::has_internal_overlap(tensor) != at::MemOverlap::No)) return false;
    Layout layout{static_cast<int>(tensor.dim()), {}, {}};
    std::copy(tensor.sizes().begin(), tensor.sizes().end(), layout.sizes);
    std::copy(tensor.strides().begin(), tensor.strides().end(), layout.strides);
    work.layouts.push_back(layout);
    item.view.layout = &work.layouts.back();
  }
  work.items.push_back(item);
  work.elements += item.numel;
  work.starts.push_back(work.starts.back() + norm_chunks(item.numel));
  return true;
}

// False if one of them is not for the engine.
bool collect(const pybind11::list& objects, bool of_gradients, bool writes, Work& work) {
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
  const size_t count = objects.size();
  work.items.reserve(count);
  work.starts.reserve(count + 1);
  for (size_t i = 0; i < count; ++i) {
    PyObject* object = PyList_GET_ITEM(objects.ptr(), static_cast<Py_ssize_t>(i));
    if (!THPVariable_CheckExact(object)) return false;
    const at::Tensor& tensor = THPVariable_Unpack(object);
    if (!of_gradients) {
      if (!add(tensor, writes, work)) return false;
      continue;
    }
    // A plain tensor's gradient may still be of a subclass: that is no plain CPU tensor.
    const at::Tensor& gradient = tensor.grad();
    if (gradient.defined() && !add(gradient, writes, work)) return false;
  }
  return true;
}

bool share_memory(const Work& work) {
  struct Span {
    const char *begin, *end;
  };
  std::vector<Span> spans;
  spans.reserve(work.items.size());
  for (const Item& item : work.items) {
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

// The dtype of torch.stack over the tensors' norms.
at::ScalarType common_dtype(const Work& work) {
  at::ScalarType result = c10::typeMetaToScalarType(work.items[0].tensor->dtype());
  for (const Item& item : work.items) {
    const at::ScalarType other = c10::typeMetaToScalarType(item.tensor->dtype());
    if (other != result) result = c10::promoteTypes(result, other);
  }
  return result;
}

}  // namespace

pybind11::object norm_of(pybind11::list tensors, double order, bool of_gradients) {
  const Norm norm = order == 1 ? Norm::kSizes : order == 2 ? Norm::kSquares : Norm::kLargest;
  Work work;
  if (!collect(tensors, of_gradients, false, work)) return pybind11::none();
  if (work.items.empty()) return pybind11::make_tuple(0.0, pybind11::none());
  std::vector<double> partials(static_cast<size_t>(work.starts.back()));
  work.for_each_chunk(false, [&](const Item& item, int64_t begin, int64_t end, int64_t chunk) {
    partials[static_cast<size_t>(chunk)] = cpu::norm_of_chunk(norm, item.view, begin, end);
  });
  double total = 0;
  for (size_t t = 0; t < work.items.size(); ++t) {
    double sum = 0;
    for (int64_t c = work.starts[t]; c < work.starts[t + 1]; ++c)
      sum = combine(norm, sum, partials[static_cast<size_t>(c)]);
    total = combine(norm, total, sum);
  }
  const auto dtype = pybind11::reinterpret_borrow<pybind11::object>(
      reinterpret_cast<PyObject*>(torch::getTHPDtype(common_dtype(work))));
  return pybind11::make_tuple(root(norm, total), dtype);
}

bool scale_gradients(pybind11::list parameters, double factor) {
  Work work;
  if (!collect(parameters, true, true, work) || share_memory(work)) return false;
  for (const Item& item : work.items)
    if (!item.tensor->is_inference()) item.tensor->bump_version();
  work.for_each_chunk(
      true, [&](const Item& item, int64_t begin, int64_t end, int64_t) { cpu::scale(item.view, begin, end, factor); });
  return true;
}

}  // namespace trainopt::python
