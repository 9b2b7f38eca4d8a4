// What the loss operators return, without computing it: for meta and fake tensors, so for torch.compile and
// torch.export, whose sizes may be symbols. They refuse what the operators refuse by types and shapes; devices are
// compared by whoever made the fake tensors.
#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <torch/library.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>

#include "torch/losses/cross_entropy_options.h"

namespace trainopt::aten {
namespace meta {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Sizes = c10::SymDimVector;

bool is_floating(c10::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

void check_types(std::initializer_list<LossArgument> arguments) {
  for (const LossArgument& argument : arguments) {
    if (argument.tensor == nullptr) continue;
    const c10::ScalarType type = argument.tensor->scalar_type();
    TORCH_CHECK(is_floating(type) || (argument.may_be_classes && (type == at::kLong || type == at::kByte)),
                argument.name, " must not be of ", type);
    // The dispatcher comes here if a single tensor is on meta, and nothing would be computed.
    TORCH_CHECK(argument.tensor->is_meta(), "expected all tensors to be on one device, but ", argument.name, " is on ",
                argument.tensor->device(), " and others are on meta");
  }
}

void check_shape(const char* name, const OptionalTensor& tensor, c10::SymIntArrayRef shape) {
  if (!tensor.has_value() || !tensor->defined()) return;
  const c10::SymIntArrayRef sizes = tensor->sym_sizes();
  bool is_right = sizes.size() == shape.size();
  for (size_t d = 0; is_right && d < shape.size(); ++d)
    is_right = sizes[d].sym_eq(shape[d]).expect_true(__FILE__, __LINE__);
  TORCH_CHECK_VALUE(is_right, name, " must have shape ", shape, ", not ", sizes);
}

Sizes sizes_of(const at::Tensor& tensor) { return Sizes(tensor.sym_sizes().begin(), tensor.sym_sizes().end()); }

c10::SymInt product_of(const Sizes& sizes) {
  c10::SymInt product = 1;
  for (const c10::SymInt& size : sizes) product = product * size;
  return product;
}

at::Tensor empty(c10::SymIntArrayRef sizes, const at::Tensor& like, c10::ScalarType dtype) {
  return at::empty_symint(sizes, like.options().dtype(dtype));
}
at::Tensor nothing_like(const at::Tensor& like) { return at::empty({0}, like.options()); }

// The pointwise losses -------------------------------------------------------------------------------------------

Sizes broadcast(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                const OptionalTensor& pos_weight) {
  Sizes shape = at::infer_size_symdimvector(input.sym_sizes(), target.sym_sizes());
  for (const OptionalTensor& other : {weight, pos_weight})
    if (other.has_value() && other->defined()) shape = at::infer_size_symdimvector(shape, other->sym_sizes());
  return shape;
}

// In the operand's order in memory, where it has the shape of the loss.
at::Tensor empty_like(const at::Tensor& operand, const Sizes& shape, c10::ScalarType dtype) {
  const bool has_shape = operand.sym_sizes() == c10::SymIntArrayRef(shape);
  return has_shape ? at::empty_like(operand, operand.options().dtype(dtype)) : empty(shape, operand, dtype);
}

at::Tensor pointwise(c10::string_view, const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                     const OptionalTensor& pos_weight, int64_t reduction, double) {
  check_types({{"input", input}, {"target", target}, {"weight", weight}, {"pos_weight", pos_weight}});
  const Sizes shape = broadcast(input, target, weight, pos_weight);
  const c10::ScalarType dtype = at::result_type(input, target);
  if (reduction_of(reduction) != Reduction::kNone) return at::empty({}, input.options().dtype(dtype));
  return empty_like(input, shape, dtype);
}

std::tuple<at::Tensor, at::Tensor> pointwise_backward(c10::string_view, const at::Tensor& upstream,
                                                      const at::Tensor& input, const at::Tensor& target,
                                                      const OptionalTensor& weight, const OptionalTensor& pos_weight,
                                                      int64_t reduction, double, std::array<bool, 2> wanted) {
  check_types(
      {{"input", input}, {"target", target}, {"weight", weight}, {"pos_weight", pos_weight}, {"upstream", upstream}});
  const Sizes shape = broadcast(input, target, weight, pos_weight);
  check_shape("upstream", upstream, reduction_of(reduction) == Reduction::kNone ? shape : Sizes());
  const auto gradient_of = [&](const at::Tensor& operand, bool is_wanted) {
    if (!is_wanted) return nothing_like(operand);
    const bool has_shape = operand.sym_sizes() == c10::SymIntArrayRef(shape);
    return has_shape ? at::empty_like(operand) : empty(operand.sym_sizes(), operand, operand.scalar_type());
  };
  return {gradient_of(input, wanted[0]), gradient_of(target, wanted[1])};
}

// Cross-entropy --------------------------------------------------------------------------------------------------

// The outputs of logits whose shape without classes is `rows`.
std::tuple<at::Tensor, at::Tensor, at::Tensor> outputs(const CrossEntropyOptions& options, const Sizes& rows,
                                                       const at::Tensor& like, c10::ScalarType dtype) {
  const Sizes reduced = options.reduction == Reduction::kNone ? rows : Sizes();
  return {empty(reduced, like, dtype), options.z_loss != 0 ? empty(reduced, like, dtype) : empty({0}, like, dtype),
          empty({2, product_of(rows)}, like, at::kDouble)};
}

void check_upstream(const CrossEntropyOptions& options, const at::Tensor& upstream, const at::Tensor& lse,
                    const Sizes& rows) {
  check_shape("upstream", upstream, options.reduction == Reduction::kNone ? rows : Sizes());
  check_shape("lse", lse, {2, product_of(rows)});
}

// `rows` with the classes in their place, or without them for a target of classes.
void check_target(const at::Tensor& target, const Sizes& rows, int64_t class_dim, const c10::SymInt& classes) {
  Sizes shape = rows;
  if (target.is_floating_point()) shape.insert(shape.begin() + class_dim, classes);
  check_shape("target", target, shape);
}

// The shape of the logits without classes, once target and weight fit them.
Sizes rows_of(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight) {
  check_types({{"input", input}, LossArgument::classes_or_probabilities(target), {"weight", weight}});
  TORCH_CHECK_VALUE(input.dim() > 0, "input must have a dimension of classes");
  const int64_t class_dim = input.dim() == 1 ? 0 : 1;
  Sizes rows = sizes_of(input);
  rows.erase(rows.begin() + class_dim);
  const c10::SymInt classes = input.sym_size(class_dim);
  check_target(target, rows, class_dim, classes);
  check_shape("weight", weight, {classes});
  return rows;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy(const CrossEntropyOptions& options,
                                                             const at::Tensor& input, const at::Tensor& target,
                                                             const OptionalTensor& weight, bool) {
  return outputs(options, rows_of(input, target, weight), input, input.scalar_type());
}

at::Tensor cross_entropy_backward(const CrossEntropyOptions& options, const at::Tensor& upstream,
                                  const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                                  const at::Tensor& lse) {
  const Sizes rows = rows_of(input, target, weight);
  check_types({{"upstream", upstream}, {"lse", lse}});
  check_upstream(options, upstream, lse, rows);
  return at::empty_like(input);
}

// Linear cross-entropy -------------------------------------------------------------------------------------------

// The shape of the hidden states without features, once all operands fit together.
Sizes tokens_of(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target, const OptionalTensor& bias,
                const OptionalTensor& class_weight) {
  check_types({{"input", input},
               {"weight", weight},
               LossArgument::classes_or_probabilities(target),
               {"bias", bias},
               {"class_weight", class_weight}});
  TORCH_CHECK_VALUE(input.dim() > 0 && weight.dim() == 2, "weight must have shape (classes, width)");
  Sizes rows = sizes_of(input);
  const c10::SymInt width = rows.back(), classes = weight.sym_size(0);
  rows.pop_back();
  check_shape("weight", weight, {classes, width});
  check_shape("bias", bias, {classes});
  check_shape("class_weight", class_weight, {classes});
  check_target(target, rows, static_cast<int64_t>(rows.size()), classes);
  return rows;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_outputs(const CrossEntropyOptions& options, const Sizes& rows,
                                                              const at::Tensor& input) {
  return outputs(options, rows, input, input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

at::Tensor gradient_of(const OptionalTensor& operand, bool is_wanted, const at::Tensor& input) {
  if (!is_wanted || !operand.has_value() || !operand->defined()) return nothing_like(input);
  return empty(operand->sym_sizes(), *operand, operand->scalar_type());
}

std::tuple<at::Tensor, at::Tensor> linear(const CrossEntropyOptions& options, const at::Tensor& input,
                                          const at::Tensor& weight, const at::Tensor& target,
                                          const OptionalTensor& bias, const OptionalTensor& class_weight, int64_t) {
  auto [loss, z, lse] = linear_outputs(options, tokens_of(input, weight, target, bias, class_weight), input);
  return {std::move(loss), std::move(z)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_forward(
    const CrossEntropyOptions& options, const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
    const OptionalTensor& bias, const OptionalTensor& class_weight, int64_t, std::array<bool, 3> wanted) {
  auto [loss, z, lse] = linear_outputs(options, tokens_of(input, weight, target, bias, class_weight), input);
  return {std::move(loss),
          std::move(z),
          std::move(lse),
          gradient_of(input, wanted[0], input),
          gradient_of(weight, wanted[1], input),
          gradient_of(bias, wanted[2], input)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(
    const CrossEntropyOptions& options, const at::Tensor& upstream, const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& target, const OptionalTensor& bias, const OptionalTensor& class_weight, const at::Tensor& lse,
    int64_t, std::array<bool, 3> wanted) {
  const Sizes rows = tokens_of(input, weight, target, bias, class_weight);
  check_types({{"upstream", upstream}, {"lse", lse}});
  check_upstream(options, upstream, lse, rows);
  return {gradient_of(input, wanted[0], input), gradient_of(weight, wanted[1], input),
          gradient_of(bias, wanted[2], input)};
}

}  // namespace

TORCH_LIBRARY_IMPL(trainopt, Meta, m) {
  m.impl("pointwise_loss", pointwise);
  m.impl("pointwise_loss_backward", pointwise_backward);
  m.impl("cross_entropy", TRAINOPT_UNPACK_OPTIONS(cross_entropy));
  m.impl("cross_entropy_backward", TRAINOPT_UNPACK_OPTIONS(cross_entropy_backward));
  m.impl("linear_cross_entropy", TRAINOPT_UNPACK_OPTIONS(linear));
  m.impl("linear_cross_entropy_forward", TRAINOPT_UNPACK_OPTIONS(linear_forward));
  m.impl("linear_cross_entropy_backward", TRAINOPT_UNPACK_OPTIONS(linear_backward));
}

}  // namespace meta
}  // namespace trainopt::aten
