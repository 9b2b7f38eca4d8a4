// The operator trainopt::linear_cross_entropy.
//
// With a reduction to one number the gradients are made in the forward pass, chunk by chunk, while the logits are
// there: three matrix products in all, as many as the plain way has. Backward multiplies them by the upstream gradient
// and hands them over; a second backward through the same graph computes them again. Without a reduction, and in
// float16, the upstream gradient is needed first, so backward recomputes the logits.
#include "torch/losses/linear_cross_entropy.h"

#include <torch/custom_class.h>
#include <torch/library.h>

#include "torch/cuda_device.h"
#include "torch/losses/cross_entropy_options.h"

namespace trainopt::aten {

void check_operands(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
                    const OptionalTensor& bias, const OptionalTensor& class_weight) {
  check_arguments({{"input", input},
                   {"weight", weight},
                   LossArgument::classes_or_probabilities(target),
                   {"bias", bias},
                   {"class_weight", class_weight}});
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) > 0, "weight must have shape (classes, width), not ",
                    weight.sizes(), ": where the layer is sharded, gather it whole first (weight.full_tensor())");
  TORCH_CHECK_VALUE(input.dim() > 0 && input.size(-1) == weight.size(1), "input has shape ", input.sizes(),
                    ", and its last dimension must be the width of weight, which has shape ", weight.sizes());
  TORCH_CHECK_VALUE(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "bias has shape ",
                    bias.has_value() ? bias->sizes() : c10::IntArrayRef(), ", and weight has ", weight.size(0),
                    " rows");
}

void check_backward(const at::Tensor& upstream, const at::Tensor& input, const at::Tensor& lse, Reduction reduction) {
  check_arguments({{"input", input}, {"upstream", upstream}, {"lse", lse}});
  check_upstream(upstream, input.sizes().slice(0, input.dim() - 1), reduction);
}

c10::DimVector logit_sizes(const at::Tensor& input, const at::Tensor& weight) {
  c10::DimVector sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = weight.size(0);
  return sizes;
}

void product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  at::Tensor result = out;
  out.scalar_type() == a.scalar_type() ? at::mm_out(result, a, b) : at::mm_out(result, a, b, out.scalar_type());
}

void add_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  at::Tensor result = out;
  out.scalar_type() == a.scalar_type() ? at::addmm_out(result, out, a, b)
                                       : at::addmm_out(result, out, a, b, out.scalar_type());
}

namespace linear {
namespace {

using ForwardOperator = CrossEntropyOperator<LinearOutputs(
    const CrossEntropyOptions&, const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
    const OptionalTensor& bias, const OptionalTensor& class_weight, int64_t chunk, Wanted)>;
using BackwardOperator = CrossEntropyOperator<LinearGradients(
    const CrossEntropyOptions&, const at::Tensor& upstream, const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& target, const OptionalTensor& bias, const OptionalTensor& class_weight, const at::Tensor& lse,
    int64_t chunk, Wanted)>;

const ForwardOperator& forward_operator() {
  static const ForwardOperator found("trainopt::linear_cross_entropy_forward");
  return found;
}

const BackwardOperator& backward_operator() {
  static const BackwardOperator found("trainopt::linear_cross_entropy_backward");
  return found;
}

// What backward must know of the call, and the gradients that it may hand over once.
struct Call : torch::CustomClassHolder {
  CrossEntropyOptions options;
  int64_t chunk = 0;
  torch::autograd::variable_list gradients;  // of input, weight and bias; empty when they are not there (any more)
};

// The loss of input, weight and bias with all logits stored: its gradients can be differentiated again.
at::Tensor by_logits(const torch::autograd::variable_list& operands, const at::Tensor& target,
                     const OptionalTensor& class_weight, const CrossEntropyOptions& options) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const c10::ScalarType dtype = operands[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor bias = operands[2].defined() ? operands[2].to(dtype) : at::Tensor();
  const at::Tensor logits = at::linear(operands[0].to(dtype), operands[1].to(dtype), bias);
  const auto as_logits = [&](const at::Tensor& t) { return t.is_floating_point() ? t.to(dtype) : t; };
  return std::get<0>(cross_entropy_operator()(
      options, logits, as_logits(target),
      class_weight.has_value() ? OptionalTensor(as_logits(*class_weight)) : std::nullopt, false));
}

struct LinearCrossEntropyFunction : torch::autograd::Function<LinearCrossEntropyFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const at::Tensor& input,
                                                const at::Tensor& weight, const at::Tensor& target,
                                                const OptionalTensor& bias, const OptionalTensor& class_weight,
                                                const CrossEntropyOptions& options, int64_t chunk, bool with_graph) {
    const Wanted wanted{with_graph && input.requires_grad(), with_graph && weight.requires_grad(),
                        with_graph && bias.has_value() && bias->requires_grad()};
    // Gradients for an upstream gradient of 1 may be too small for float16: GradScaler's scale is in the upstream one.
    const bool now = options.reduction != Reduction::kNone && weight.scalar_type() != at::kHalf;
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, z, lse, of_input, of_weight, of_bias] =
        forward_operator()(options, input, weight, target, bias, class_weight, chunk, now ? wanted : Wanted{});
    auto call = c10::make_intrusive<Call>();
    call->options = options;
    call->chunk = chunk;
    if (now) call->gradients = {of_input, of_weight, of_bias};
    context->saved_data["call"] = c10::IValue::make_capsule(std::move(call));
    const auto present = [](const OptionalTensor& tensor) { return tensor.has_value() ? *tensor : at::Tensor(); };
    context->save_for_backward({input, weight, target, present(bias), present(class_weight), lse});
    context->mark_non_differentiable({z});
    context->set_materialize_grads(false);
    return {loss, z};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    torch::autograd::variable_list gradients(8);
    if (!upstream[0].defined()) return gradients;
    const auto saved = context->get_saved_variables();
    Call& call = static_cast<Call&>(*context->saved_data["call"].toCapsule());
    const auto present = [](const at::Tensor& tensor) {
      return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
    };
    // Edges count the tensors that were given: input, weight, target, then bias.
    const bool has_bias = saved[3].defined();
    const Wanted wanted{context->needs_input_grad(0), context->needs_input_grad(1),
                        has_bias && context->needs_input_grad(3)};
    if (at::GradMode::is_enabled()) {
      const auto found = differentiable_gradients(
          {saved[0], saved[1], saved[3]}, upstream[0],
          [&](const auto& operands) { return by_logits(operands, saved[2], present(saved[4]), call.options); });
      gradients[0] = found[0];
      gradients[1] = found[1];
      gradients[3] = found[2];
      return gradients;
    }
    torch::autograd::variable_list found = std::move(call.gradients);
    call.gradients.clear();
    if (!found.empty()) {
      for (size_t i = 0; i < found.size(); ++i)
        if (wanted[i])
          found[i] = may_write_over(found[i], {&upstream[0]}) ? found[i].mul_(upstream[0]) : found[i] * upstream[0];
    } else {
      auto [of_input, of_weight, of_bias] =
          backward_operator()(call.options, upstream[0], saved[0], saved[1], saved[2], present(saved[3]),
                              present(saved[4]), saved[5], call.chunk, wanted);
      found = {of_input, of_weight, of_bias};
    }
    const size_t places[] = {0, 1, 3};
    for (size_t i = 0; i < 3; ++i)
      if (wanted[i]) gradients[places[i]] = found[i];
    return gradients;
  }
};

using Losses = std::tuple<at::Tensor, at::Tensor>;  // loss, z-loss

Losses with_gradient(const CrossEntropyOptions& options, const at::Tensor& input, const at::Tensor& weight,
                     const at::Tensor& target, const OptionalTensor& bias, const OptionalTensor& class_weight,
                     int64_t chunk) {
  auto outputs = LinearCrossEntropyFunction::apply(input, weight, target, bias, class_weight, options, chunk,
                                                   at::GradMode::is_enabled());
  return {std::move(outputs[0]), std::move(outputs[1])};
}

Losses without_gradient(const CrossEntropyOptions& options, const at::Tensor& input, const at::Tensor& weight,
                        const at::Tensor& target, const OptionalTensor& bias, const OptionalTensor& class_weight,
                        int64_t chunk) {
  auto all = forward_operator()(options, input, weight, target, bias, class_weight, chunk, Wanted{});
  return {std::move(std::get<0>(all)), std::move(std::get<1>(all))};
}

const CrossEntropyOperator<decltype(with_gradient)>& whole_operator() {
  static const CrossEntropyOperator<decltype(with_gradient)> found("trainopt::linear_cross_entropy");
  return found;
}

// On the CPU the products are taken in float32 whatever the operands are, so there is nothing to lower; the loss is
// float32.
Losses in_single(const CrossEntropyOptions& options, const at::Tensor& input, const at::Tensor& weight,
                 const at::Tensor& target, const OptionalTensor& bias, const OptionalTensor& class_weight,
                 int64_t chunk) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return whole_operator()(options, to_single(input), to_single(weight), to_single(target), to_single(bias),
                          to_single(class_weight), chunk);
}

#if defined(TRAINOPT_WITH_CUDA)
// On CUDA the products are taken in the type of the weight: autocast's, as those of a linear layer. The loss has the
// type of the input: float32.
Losses in_lower(const CrossEntropyOptions& options, const at::Tensor& input, const at::Tensor& weight,
                const at::Tensor& target, const OptionalTensor& bias, const OptionalTensor& class_weight,
                int64_t chunk) {
  const c10::DeviceType device = input.device().type();
  const at::Tensor lower = at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), weight, device);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return whole_operator()(options, to_single(input), lower, to_single(target), to_single(bias), to_single(class_weight),
                          chunk);
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(trainopt, m) {
  m.def(
      "linear_cross_entropy(Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, "
      "int chunk, " TRAINOPT_CROSS_ENTROPY_OPTIONS ") -> (Tensor loss, Tensor z_loss)");
  m.def(
      "linear_cross_entropy_forward(Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, "
      "int chunk, bool[3] wanted, " TRAINOPT_CROSS_ENTROPY_OPTIONS
      ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_cross_entropy_backward(Tensor upstream, Tensor input, Tensor weight, Tensor target, Tensor? bias, "
      "Tensor? class_weight, Tensor lse, int chunk, bool[3] wanted, " TRAINOPT_CROSS_ENTROPY_OPTIONS
      ") -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(trainopt, CPU, m) { m.impl("linear_cross_entropy", TRAINOPT_UNPACK_OPTIONS(without_gradient)); }
TORCH_LIBRARY_IMPL(trainopt, Autograd, m) { m.impl("linear_cross_entropy", TRAINOPT_UNPACK_OPTIONS(with_gradient)); }
TORCH_LIBRARY_IMPL(trainopt, AutocastCPU, m) { m.impl("linear_cross_entropy", TRAINOPT_UNPACK_OPTIONS(in_single)); }

#if defined(TRAINOPT_WITH_CUDA)
TORCH_LIBRARY_IMPL(trainopt, TRAINOPT_CUDA_KEY, m) {
  m.impl("linear_cross_entropy", TRAINOPT_UNPACK_OPTIONS(without_gradient));
}
TORCH_LIBRARY_IMPL(trainopt, TRAINOPT_AUTOCAST_CUDA_KEY, m) {
  m.impl("linear_cross_entropy", TRAINOPT_UNPACK_OPTIONS(in_lower));
}
#endif

}  // namespace linear
}  // namespace trainopt::aten
