// The operators of the pointwise losses on CUDA; pointwise_losses.cpp has the rest.
#if defined(TRAINOPT_WITH_CUDA)

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "cuda/pointwise.h"
#include "torch/cuda_device.h"
#include "torch/losses/findings.h"
#include "torch/losses/pointwise_losses.h"
#include "torch/losses/support.h"

namespace trainopt::aten {
namespace pointwise_on_cuda {
namespace {

double divisor_of(Reduction reduction, const PointwiseTask& task) {
  return reduction == Reduction::kMean ? static_cast<double>(task.numel) : 1;
}

at::Tensor forward(c10::string_view name, const at::Tensor& input, const at::Tensor& target,
                   const OptionalTensor& weight, const OptionalTensor& positive, int64_t reduction, double parameter) {
  const int loss = find_pointwise_loss(name).index;
  PointwiseOperands operands(input, target, weight, positive, reduction, parameter);
  const OnDevice on(input.device());
  int64_t* bad_probability = nullptr;
  if (name == "binary_cross_entropy") {
    check_findings_on(input.device());
    if (Findings* findings = findings_of(input.device())) bad_probability = &findings->bad_probability;
  }
  const PointwiseTask& task = operands.task;
  if (operands.reduction == Reduction::kNone) {
    const at::Tensor values = operands.add_value();
    operands.arrange();
    cuda::pointwise_forward(loss, operands.is_float64(), task, {}, bad_probability, on.stream);
    return operands.finished(values);
  }
  operands.arrange();
  const at::Tensor result = at::empty({}, input.options().dtype(operands.dtype));
  const at::Tensor partials = at::empty({cuda::pointwise_partials(task.numel)}, input.options().dtype(at::kDouble));
  const cuda::Reduced reduced{view_of(result), divisor_of(operands.reduction, task),
                              partials.mutable_data_ptr<double>()};
  cuda::pointwise_forward(loss, operands.is_float64(), task, reduced, bad_probability, on.stream);
  return result;
}

std::tuple<at::Tensor, at::Tensor> backward(c10::string_view name, const at::Tensor& upstream, const at::Tensor& input,
                                            const at::Tensor& target, const OptionalTensor& weight,
                                            const OptionalTensor& positive, int64_t reduction, double parameter,
                                            std::array<bool, 2> wanted) {
  const int loss = find_pointwise_loss(name).index;
  PointwiseOperands operands(input, target, weight, positive, reduction, parameter);
  const OnDevice on(input.device());
  const PointwiseGradients gradients = operands.add_gradients(wanted);
  cuda::Upstream from_above{};
  if (!operands.add_upstream(upstream)) from_above = {view_of(upstream), divisor_of(operands.reduction, operands.task)};
  operands.arrange();
  cuda::pointwise_backward(loss, operands.is_float64(), operands.task, from_above, on.stream);
  return operands.summed(gradients);
}

}  // namespace

TORCH_LIBRARY_IMPL(trainopt, TRAINOPT_CUDA_KEY, m) {
  m.impl("pointwise_loss", forward);
  m.impl("pointwise_loss_backward", backward);
}

}  // namespace pointwise_on_cuda
}  // namespace trainopt::aten

#endif
