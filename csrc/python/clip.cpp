#include "python/clip.h"

#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "python/wrap.h"
#include "torch/inspect.h"
#include "torch/losses/support.h"
#include "torch/optim/clip.h"

namespace trainopt::python {

using namespace aten;
namespace {

// Elements from which on the interpreter is let go.
constexpr int64_t kClipReleaseElements = 256 * 1024;

// Reads a list of tensors, or of parameters with or without gradients. False if there is one that an engine does not
// take, or a mode that must see what is done with them.
bool collect(const pybind11::list& objects, bool of_gradients, bool writes, TensorList* list) {
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
  const size_t count = objects.size();
  list->items.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    PyObject* object = PyList_GET_ITEM(objects.ptr(), static_cast<Py_ssize_t>(i));
    if (!THPVariable_CheckExact(object)) return false;
    const at::Tensor& tensor = THPVariable_Unpack(object);
    // A plain tensor's gradient may still be of a subclass: that is no plain tensor.
    const at::Tensor& item = of_gradients ? tensor.grad() : tensor;
    if (!item.defined()) continue;
    if (!list->add(of_gradients ? "the gradient of parameter " : "tensor ", i, item, writes)) return false;
  }
  return true;
}

// Lets the interpreter go while much is to be done, and keeps the memory that is worked on meanwhile.
class Unlocked {
 public:
  explicit Unlocked(const TensorList& list) {
    if (list.elements < kClipReleaseElements) return;
    for (const TensorList::Item& item : list.items) kept_.push_back(item.tensor->storage());
    release_.emplace();
  }

 private:
  std::vector<c10::Storage> kept_;
  std::optional<pybind11::gil_scoped_release> release_;
};

void bump_versions(const TensorList& list) {
  for (const TensorList::Item& item : list.items)
    if (!item.tensor->is_inference()) item.tensor->bump_version();
}

}  // namespace

pybind11::object norm_of(const pybind11::list& tensors, double order, bool of_gradients) {
  if (order != 1 && order != 2 && !(std::isinf(order) && order > 0))
    throw pybind11::value_error("norm_of: the order must be 1, 2 or infinity, not " + std::to_string(order));
  const Norm norm = order == 1 ? Norm::kSizes : order == 2 ? Norm::kSquares : Norm::kLargest;
  TensorList list;
  if (!collect(tensors, of_gradients, false, &list)) return pybind11::none();
#if defined(TRAINOPT_WITH_CUDA)
  if (!list.device().is_cpu()) {
    const CudaNorm found = norm_on_cuda(norm, list);
    return pybind11::make_tuple(wrap(found.exact), wrap(found.rounded));
  }
#endif
  // The tensors may be gone afterwards: while the interpreter is let go, only their memory is kept.
  const at::ScalarType dtype = list.items.empty() ? c10::get_default_dtype_as_scalartype() : list.norm_dtype();
  double exact = 0;
  {
    const Unlocked unlocked(list);
    exact = norm_on_cpu(norm, list);
  }
  return pybind11::make_tuple(exact, wrap(tensor_of(exact, dtype)));
}

bool clip_gradients(const pybind11::list& parameters, double max_norm, const pybind11::object& norm) {
  const bool is_tensor = THPVariable_Check(norm.ptr());
  const ClipFactors factors = is_tensor ? ClipFactors{} : clip_factors(norm.cast<double>(), max_norm);
  if (factors.change_nothing()) return true;
  TensorList list;
  if (!collect(parameters, true, true, &list) || list.device().is_cpu() == is_tensor || list.share_memory())
    return false;
#if defined(TRAINOPT_WITH_CUDA)
  if (is_tensor) {
    const at::Tensor& exact = THPVariable_Unpack(norm.ptr());
    if (exact.device() != list.device() || exact.scalar_type() != at::kDouble) return false;
    bump_versions(list);
    clip_on_cuda(list, max_norm, exact);
    return true;
  }
#endif
  bump_versions(list);
  const Unlocked unlocked(list);
  clip_on_cpu(list, factors);
  return true;
}

bool clamp_gradients(const pybind11::list& parameters, double limit) {
  TensorList list;
  if (!collect(parameters, true, true, &list) || list.share_memory()) return false;
  bump_versions(list);
#if defined(TRAINOPT_WITH_CUDA)
  if (!list.device().is_cpu()) {
    clamp_on_cuda(list, limit);
    return true;
  }
#endif
  const Unlocked unlocked(list);
  clamp_on_cpu(list, limit);
  return true;
}

}  // namespace trainopt::python
