// What the loss operators share.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <functional>
#include <initializer_list>

#include "core/tensor_view.h"
#include "torch/inspect.h"

namespace trainopt::aten {

// Gradients by torch's own formulas, which can be differentiated again: for a backward pass with create_graph=True.
// `loss` computes the loss from the inputs; an input that is undefined has no gradient. The inputs are taken as
// independent of each other.
torch::autograd::variable_list differentiable_gradients(
    torch::autograd::variable_list inputs, const at::Tensor& upstream,
    const std::function<at::Tensor(const torch::autograd::variable_list&)>& loss);

// Whether the fused losses take this tensor as it is now: a plain dense one on the CPU or on a CUDA device that
// trainopt has kernels for, outside of function transforms and of forward-mode differentiation.
bool takes(const at::Tensor& tensor);

// Whether a backward pass may write its result over `memory` while it reads the others: only where nobody can tell,
// with plain tensors that share no memory with it, and no mode or transform that must see what is done. Writing past
// the dispatcher would overlook a lazy negative bit, a tensor of zeros without memory, a compiler's stand-ins.
bool may_write_over(const at::Tensor& memory, std::initializer_list<const at::Tensor*> others);

// Whether tensors that are saved for backward now come back as the caller's hooks make them: as copies that another
// backward pass is given again.
bool has_saved_tensor_hooks();

// The view of a tensor that an engine reads or writes; RuntimeError for a type that it does not store.
TensorView view_of(const at::Tensor& tensor);

// On the CPU: a tensor of one number, and the number in a tensor of one element.
at::Tensor tensor_of(double value, c10::ScalarType dtype);
double number_in(const at::Tensor& tensor);

inline at::Tensor to_single(const at::Tensor& tensor) {
  return at::autocast::cached_cast(at::kFloat, tensor, tensor.device().type());
}
inline std::optional<at::Tensor> to_single(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? std::optional(to_single(*tensor)) : std::nullopt;
}

}  // namespace trainopt::aten
