#include "python/loss_calls.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string>
#include <tuple>

#include "python/wrap.h"
#include "torch/losses/cross_entropy_options.h"
#include "torch/losses/findings.h"
#include "torch/losses/support.h"

namespace trainopt::python {

using namespace aten;
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// A tensor that the fused losses take, on the device of the first one; false for any other object.
bool read(const pybind11::handle& object, OptionalTensor* tensor, const OptionalTensor& first) {
  if (!THPVariable_CheckExact(object.ptr()) && !THPVariable_Check(object.ptr())) return false;
  *tensor = THPVariable_Unpack(object.ptr());
  DType stored;
  if ((*tensor)->is_floating_point() && !read_dtype((*tensor)->unsafeGetTensorImpl(), &stored)) return false;
  return takes(**tensor) && (*tensor)->device() == first->device();
}

// A weight: the same, of floating point, or None.
bool read_weight(const pybind11::handle& object, OptionalTensor* tensor, const OptionalTensor& first) {
  return object.is_none() || (read(object, tensor, first) && (*tensor)->is_floating_point());
}

pybind11::object pointwise_loss(const std::string& loss, const pybind11::handle& input, const pybind11::handle& target,
                                const pybind11::handle& weight, const pybind11::handle& pos_weight, int64_t reduction,
                                double parameter) {
  OptionalTensor tensors[4];
  if (!read(input, &tensors[0], tensors[0]) || !read(target, &tensors[1], tensors[0]) ||
      !read_weight(weight, &tensors[2], tensors[0]) || !read_weight(pos_weight, &tensors[3], tensors[0]) ||
      !tensors[0]->is_floating_point() || !tensors[1]->is_floating_point())
    return pybind11::none();
  static const auto operation = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("trainopt::pointwise_loss", "")
                                    .typed<at::Tensor(c10::string_view, const at::Tensor&, const at::Tensor&,
                                                      const OptionalTensor&, const OptionalTensor&, int64_t, double)>();
  at::Tensor result;
  {
    const pybind11::gil_scoped_release release;
    result = operation.call(loss, *tensors[0], *tensors[1], tensors[2], tensors[3], reduction, parameter);
  }
  return wrap(result);
}

pybind11::object cross_entropy(const CrossEntropyOptions& options, const pybind11::handle& input,
                               const pybind11::handle& target, const pybind11::handle& weight, bool inplace_backward) {
  OptionalTensor tensors[3];
  if (!read(input, &tensors[0], tensors[0]) || !read(target, &tensors[1], tensors[0]) ||
      !read_weight(weight, &tensors[2], tensors[0]) || !tensors[0]->is_floating_point())
    return pybind11::none();
  at::Tensor loss, z, lse;
  {
    const pybind11::gil_scoped_release release;
    std::tie(loss, z, lse) = cross_entropy_operator()(options, *tensors[0], *tensors[1], tensors[2], inplace_backward);
  }
  return options.z_loss == 0 ? wrap(loss) : pybind11::make_tuple(wrap(loss), wrap(z));
}

}  // namespace

void bind_loss_calls(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("pointwise_loss", pointwise_loss, py::arg("loss"), py::arg("input"), py::arg("target"), py::arg("weight"),
        py::arg("pos_weight"), py::arg("reduction"), py::arg("parameter"),
        "torch.ops.trainopt.pointwise_loss, or None where it does not take these tensors as they are now.");
  m.def("cross_entropy", TRAINOPT_UNPACK_OPTIONS(cross_entropy),
        "torch.ops.trainopt.cross_entropy, with all of its arguments: the loss, with z_loss the pair of loss and its "
        "z-loss; or None where it does not take these tensors as they are now.");
  m.def("check_targets", check_findings,
        "IndexError if a cross-entropy on a device other than the CPU has met a target that is no class since it was "
        "last told of, RuntimeError if a binary_cross_entropy has met an input or a target that is no probability. "
        "Looks at what the devices have done so far, and does not wait for them.");
}

}  // namespace trainopt::python
