#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/result_type.h>

#include <cmath>
#include <limits>
#include <string>

#include "torch/layout.h"
#include "torch/losses/arguments.h"
#include "torch/losses/fresh_memory.h"
#include "torch/losses/pointwise_losses.h"
#include "torch/losses/support.h"

namespace trainopt::aten {

const cpu::PointwiseLoss& find_pointwise_loss(std::string_view name) {
  const cpu::PointwiseLoss* loss = cpu::find_pointwise_loss(std::string(name).c_str());
  TORCH_CHECK_VALUE(loss != nullptr, "there is no pointwise loss '", name, "'");
  return *loss;
}

PointwiseOperands::PointwiseOperands(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                                     const OptionalTensor& positive, int64_t number, double parameter)
    : dtype(at::result_type(input, target)), reduction(reduction_of(number)), input_(input), target_(target) {
  check_arguments({{"input", input}, {"target", target}, {"weight", weight}, {"pos_weight", positive}});
  shape_ = at::infer_size_dimvector(input.sizes(), target.sizes());
  for (const OptionalTensor& other : {weight, positive})
    if (other.has_value() && other->defined()) shape_ = at::infer_size_dimvector(shape_, other->sizes());
  copies_ = shape_.size() > kMaxDims;
  add(input, &task.input);
  add(target, &task.target);
  if (weight.has_value()) add(*weight, &task.weight);
  if (positive.has_value()) add(*positive, &task.positive);
  task.numel = c10::multiply_integers(shape_);
  task.parameter = parameter;
}

bool PointwiseOperands::is_float64() const {
  const double size = std::fabs(task.parameter);
  const bool is_single = size == 0 || (size >= static_cast<double>(std::numeric_limits<float>::min()) &&
                                       size <= static_cast<double>(std::numeric_limits<float>::max()));
  return dtype == at::kDouble || !is_single;
}

at::Tensor PointwiseOperands::add_value() {
  const at::Tensor value = memory_for(input_, dtype);
  add(value, &task.value);
  return value;
}

PointwiseGradients PointwiseOperands::add_gradients(std::array<bool, 2> wanted) {
  PointwiseGradients gradients;
  if (wanted[0]) gradients[0] = memory_for(input_, input_.scalar_type());
  if (wanted[1]) gradients[1] = memory_for(target_, target_.scalar_type());
  add(gradients[0], &task.input_gradient);
  add(gradients[1], &task.target_gradient);
  return gradients;
}

bool PointwiseOperands::add_upstream(const at::Tensor& upstream) {
  check_arguments({{"input", input_}, {"upstream", upstream}});
  check_upstream(upstream, shape_, reduction);
  bool is_one_number = true;  // as after .sum()
  for (const int64_t stride : upstream.strides()) is_one_number = is_one_number && stride == 0;
  if (task.numel == 0) return true;
  if (!is_one_number) add(upstream, &task.upstream);
  return !is_one_number;
}

void PointwiseOperands::arrange() {
  bool contiguous = true;
  for (const at::Tensor& tensor : tensors_) contiguous = contiguous && tensor.is_contiguous();
  std::vector<Arranged> operands;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    *views_[i] = view_of(tensors_[i]);
    operands.push_back({tensors_[i].unsafeGetTensorImpl(), views_[i]});
  }
  if (contiguous) return;
  TORCH_INTERNAL_ASSERT(aten::arrange(operands, false, &layouts_));
}

std::tuple<at::Tensor, at::Tensor> PointwiseOperands::summed(const PointwiseGradients& gradients) const {
  const auto in_shape_of = [&](const at::Tensor& gradient, const at::Tensor& operand) {
    return gradient.defined() ? in_order_of(operand, at::sum_to(gradient, operand.sizes()))
                              : at::empty({0}, operand.options());
  };
  return {in_shape_of(gradients[0], input_), in_shape_of(gradients[1], target_)};
}

// Of the whole shape, in the order of `operand` if it has that shape itself.
at::Tensor PointwiseOperands::memory_for(const at::Tensor& operand, c10::ScalarType type) const {
  if (operand.sizes().equals(shape_) && !copies_) return fresh_like(operand, type);
  return operand.is_cpu() ? fresh(shape_, type) : at::empty(shape_, operand.options().dtype(type));
}

// A result that was written row-major, in the order in memory that it would have had.
at::Tensor PointwiseOperands::in_order_of(const at::Tensor& operand, const at::Tensor& result) const {
  if (!copies_ || !operand.sizes().equals(result.sizes())) return result;
  return at::empty_like(operand, operand.options().dtype(result.scalar_type())).copy_(result);
}

// A tensor to read is expanded; one to write has the shape already.
void PointwiseOperands::add(const at::Tensor& tensor, TensorView* view) {
  if (!tensor.defined()) return;
  tensors_.push_back(tensor.sizes().equals(shape_) ? tensor : tensor.expand(shape_));
  if (copies_) tensors_.back() = tensors_.back().contiguous();
  views_.push_back(view);
}

}  // namespace trainopt::aten
