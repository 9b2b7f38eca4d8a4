#include "torch/losses/arguments.h"

#include "torch/cuda_device.h"
#include "torch/inspect.h"
#include "torch/losses/support.h"

namespace trainopt::aten {
namespace {

bool is_dense(const c10::TensorImpl* tensor) {
  if (is_plain_cpu(tensor) || is_plain_cuda(tensor)) return true;  // nearly always, and one mask
  const c10::DispatchKeySet keys = tensor->key_set();
  return tensor->layout() == c10::kStrided && tensor->has_storage() && !keys.has(c10::DispatchKey::Negative) &&
         !keys.has(c10::DispatchKey::Conjugate) && !keys.has(c10::DispatchKey::ZeroTensor);
}

void check_type(const LossArgument& argument) {
  const c10::ScalarType type = argument.tensor->scalar_type();
  DType stored;
  if (read_dtype(argument.tensor->unsafeGetTensorImpl(), &stored)) return;
  TORCH_CHECK(argument.may_be_classes, argument.name,
              " must be a tensor of float32, float64, bfloat16 or float16, not of ", type);
  TORCH_CHECK(type == at::kLong || type == at::kByte, argument.name,
              " must hold classes (int64 or uint8) or probabilities (float32, float64, bfloat16 or float16), not ",
              type);
}

}  // namespace

void check_arguments(std::initializer_list<LossArgument> arguments) {
  const LossArgument& first = *arguments.begin();
  for (const LossArgument& argument : arguments) {
    if (argument.tensor == nullptr) continue;
    const at::Tensor& tensor = *argument.tensor;
    TORCH_CHECK(tensor.defined(), argument.name, " must be a tensor, and is undefined");
    TORCH_CHECK(tensor.device() == first.tensor->device(), "expected all tensors to be on one device, but ",
                argument.name, " is on ", tensor.device(), " and ", first.name, " on ", first.tensor->device());
    TORCH_CHECK(is_dense(tensor.unsafeGetTensorImpl()), argument.name, " must be a dense tensor");
    check_type(argument);
    check_memory(argument.name, tensor.unsafeGetTensorImpl());
  }
}

Reduction reduction_of(int64_t number) {
  const auto reduction = static_cast<Reduction>(number);
  TORCH_CHECK_VALUE(Reduction::kNone <= reduction && reduction <= Reduction::kSum,
                    "reduction must be 0 (none), 1 (mean) or 2 (sum), not ", number);
  return reduction;
}

void check_upstream(const at::Tensor& upstream, c10::IntArrayRef shape, Reduction reduction) {
  const c10::IntArrayRef expected = reduction == Reduction::kNone ? shape : c10::IntArrayRef();
  TORCH_CHECK_VALUE(upstream.sizes().equals(expected), "upstream must have the shape of the loss, ", expected, ", not ",
                    upstream.sizes());
}

}  // namespace trainopt::aten
