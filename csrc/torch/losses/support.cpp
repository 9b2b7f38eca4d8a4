#include "torch/losses/support.h"

#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SavedTensorHooks.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/autograd.h>

#include "torch/cuda_device.h"

namespace trainopt::aten {

torch::autograd::variable_list differentiable_gradients(
    torch::autograd::variable_list inputs, const at::Tensor& upstream,
    const std::function<at::Tensor(const torch::autograd::variable_list&)>& loss) {
  const at::AutoGradMode with_graph(true);
  torch::autograd::variable_list wanted;
  std::vector<size_t> places;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i].defined() || !inputs[i].requires_grad()) continue;
    inputs[i] = inputs[i].view_as(inputs[i]);  // a node of its own: where the graph below ends
    wanted.push_back(inputs[i]);
    places.push_back(i);
  }
  const auto found = torch::autograd::grad({loss(inputs)}, wanted, {upstream}, true, true, true);
  torch::autograd::variable_list gradients(inputs.size());
  for (size_t i = 0; i < places.size(); ++i) gradients[places[i]] = found[i];
  return gradients;
}

bool takes(const at::Tensor& tensor) {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (!is_plain_cpu(impl) && !is_plain_cuda(impl)) return false;
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) return false;
  return !tensor._fw_grad(/*level=*/0).defined();
}

bool may_write_over(const at::Tensor& memory, std::initializer_list<const at::Tensor*> others) {
  if (c10::impl::TorchDispatchModeTLS::any_modes_set() || !takes(memory)) return false;
  const auto begin_of = [](const at::Tensor& tensor) { return static_cast<const char*>(tensor.storage().data()); };
  const auto end_of = [&](const at::Tensor& tensor) { return begin_of(tensor) + tensor.storage().nbytes(); };
  for (const at::Tensor* other : others) {
    if (!other->defined()) continue;
    if (!takes(*other) || (begin_of(*other) < end_of(memory) && begin_of(memory) < end_of(*other))) return false;
  }
  return true;
}

bool has_saved_tensor_hooks() { return !at::SavedTensorDefaultHooks::get_tls_state().stack.empty(); }

at::Tensor tensor_of(double value, c10::ScalarType dtype) {
  at::Tensor tensor = at::detail::empty_cpu({}, dtype);
  void* data = tensor.mutable_data_ptr();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, "tensor_of",
                                  [&] { *static_cast<scalar_t*>(data) = static_cast<scalar_t>(value); });
  return tensor;
}

double number_in(const at::Tensor& tensor) {
  const void* data = tensor.const_data_ptr();
  double value = 0;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, tensor.scalar_type(), "number_in",
                                  [&] { value = static_cast<double>(*static_cast<const scalar_t*>(data)); });
  return value;
}

TensorView view_of(const at::Tensor& tensor) {
  TensorView view{};
  TORCH_CHECK(read_view(tensor.unsafeGetTensorImpl(), false, &view),
              "expected a tensor of float32, float64, bfloat16 or float16, not ", tensor.scalar_type());
  return view;
}

}  // namespace trainopt::aten
