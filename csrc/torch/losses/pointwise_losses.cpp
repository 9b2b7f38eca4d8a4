// The operators of the pointwise losses. All of them are one, trainopt::pointwise_loss, under their names in torch.
#include "torch/losses/pointwise_losses.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "torch/cuda_device.h"
#include "torch/losses/support.h"

namespace trainopt::aten {
namespace pointwise {
namespace {

constexpr int64_t kChunk = 16384;  // elements whose losses are one partial sum

void check_probabilities(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(((tensor >= 0) & (tensor <= 1)).all().item<bool>(), "all elements of ", name,
              " should be between 0 and 1");
}

at::Tensor forward(c10::string_view name, const at::Tensor& input, const at::Tensor& target,
                   const OptionalTensor& weight, const OptionalTensor& positive, int64_t reduction, double parameter) {
  const cpu::PointwiseLoss& loss = find_pointwise_loss(name);
  PointwiseOperands operands(input, target, weight, positive, reduction, parameter);
  const at::Tensor values = operands.reduction == Reduction::kNone ? operands.add_value() : at::Tensor();
  operands.arrange();
  const PointwiseTask& task = operands.task;
  const int64_t chunks = (task.numel + kChunk - 1) / kChunk;
  std::vector<double> partial(chunks);
  at::parallel_for(0, chunks, 2, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c)
      partial[c] =
          cpu::pointwise_forward(loss, operands.is_float64(), task, c * kChunk, std::min(task.numel, (c + 1) * kChunk));
  });
  double sum = 0;
  for (const double part : partial) sum += part;
  // An input or a target outside of [0, 1] makes the sum NaN; whether it was that is worth a second look then.
  if (std::isnan(sum) && name == "binary_cross_entropy") {
    check_probabilities("input", input);
    check_probabilities("target", target);
  }
  if (operands.reduction == Reduction::kNone) return operands.finished(values);
  return tensor_of(operands.reduction == Reduction::kMean ? sum / static_cast<double>(task.numel) : sum,
                   operands.dtype);
}

std::tuple<at::Tensor, at::Tensor> backward(c10::string_view name, const at::Tensor& upstream, const at::Tensor& input,
                                            const at::Tensor& target, const OptionalTensor& weight,
                                            const OptionalTensor& positive, int64_t reduction, double parameter,
                                            std::array<bool, 2> wanted) {
  const cpu::PointwiseLoss& loss = find_pointwise_loss(name);
  PointwiseOperands operands(input, target, weight, positive, reduction, parameter);
  PointwiseTask& task = operands.task;
  const PointwiseGradients gradients = operands.add_gradients(wanted);
  if (!operands.add_upstream(upstream)) task.scale = number_in(upstream);
  if (operands.reduction == Reduction::kMean) task.scale /= static_cast<double>(task.numel);
  operands.arrange();
  at::parallel_for(0, (task.numel + kChunk - 1) / kChunk, 2, [&](int64_t first, int64_t last) {
    cpu::pointwise_backward(loss, operands.is_float64(), task, first * kChunk, std::min(task.numel, last * kChunk));
  });
  return operands.summed(gradients);
}

// torch's own, for the second derivative.
at::Tensor by_torch(c10::string_view name, const torch::autograd::variable_list& inputs, const OptionalTensor& weight,
                    const OptionalTensor& positive, int64_t reduction, double parameter) {
  const at::Tensor &x = inputs[0], &t = inputs[1];
  if (name == "mse_loss") return at::mse_loss(x, t, reduction);
  if (name == "l1_loss") return at::l1_loss(x, t, reduction);
  if (name == "smooth_l1_loss") return at::smooth_l1_loss(x, t, reduction, parameter);
  if (name == "huber_loss") return at::huber_loss(x, t, reduction, parameter);
  if (name == "binary_cross_entropy") return at::binary_cross_entropy(x, t, weight, reduction);
  if (name == "binary_cross_entropy_with_logits")
    return at::binary_cross_entropy_with_logits(x, t, weight, positive, reduction);
  return at::kl_div(x, t, reduction, name == "kl_div_log_target");
}

using Forward = at::Tensor(c10::string_view, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                           const OptionalTensor&, int64_t, double);
using Backward = std::tuple<at::Tensor, at::Tensor>(c10::string_view, const at::Tensor&, const at::Tensor&,
                                                    const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                    int64_t, double, std::array<bool, 2>);

const c10::TypedOperatorHandle<Forward>& forward_operator() {
  static const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow("trainopt::pointwise_loss", "").typed<Forward>();
  return handle;
}

const c10::TypedOperatorHandle<Backward>& backward_operator() {
  static const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow("trainopt::pointwise_loss_backward", "").typed<Backward>();
  return handle;
}

at::Tensor optional(const OptionalTensor& tensor) { return tensor.has_value() ? *tensor : at::Tensor(); }

struct PointwiseFunction : torch::autograd::Function<PointwiseFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, c10::string_view name, const at::Tensor& input,
                            const at::Tensor& target, const OptionalTensor& weight, const OptionalTensor& positive,
                            int64_t reduction, double parameter) {
    context->save_for_backward({input, target, optional(weight), optional(positive)});
    context->saved_data["name"] = std::string(name);
    context->saved_data["reduction"] = reduction;
    context->saved_data["parameter"] = parameter;
    const at::AutoDispatchBelowADInplaceOrView below;
    return forward_operator().call(name, input, target, weight, positive, reduction, parameter);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    const auto saved = context->get_saved_variables();
    const std::string name = context->saved_data["name"].toStringRef();
    const int64_t reduction = context->saved_data["reduction"].toInt();
    const double parameter = context->saved_data["parameter"].toDouble();
    const auto present = [](const at::Tensor& tensor) {
      return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
    };
    const OptionalTensor weight = present(saved[2]), positive = present(saved[3]);
    torch::autograd::variable_list gradients(7);
    if (at::GradMode::is_enabled()) {
      const auto found = differentiable_gradients({saved[0], saved[1]}, upstream[0], [&](const auto& inputs) {
        return by_torch(name, inputs, weight, positive, reduction, parameter);
      });
      gradients[1] = found[0];
      gradients[2] = found[1];
      return gradients;
    }
    const std::array<bool, 2> wanted{context->needs_input_grad(0), context->needs_input_grad(1)};
    const at::AutoDispatchBelowADInplaceOrView below;  // there is no kernel for autograd, whose stand-in is slow
    auto [of_input, of_target] =
        backward_operator().call(name, upstream[0], saved[0], saved[1], weight, positive, reduction, parameter, wanted);
    if (wanted[0]) gradients[1] = std::move(of_input);
    if (wanted[1]) gradients[2] = std::move(of_target);
    return gradients;
  }
};

at::Tensor with_gradient(c10::string_view name, const at::Tensor& input, const at::Tensor& target,
                         const OptionalTensor& weight, const OptionalTensor& positive, int64_t reduction,
                         double parameter) {
  return PointwiseFunction::apply(name, input, target, weight, positive, reduction, parameter);
}

at::Tensor in_single(c10::string_view name, const at::Tensor& input, const at::Tensor& target,
                     const OptionalTensor& weight, const OptionalTensor& positive, int64_t reduction,
                     double parameter) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return forward_operator().call(name, to_single(input), to_single(target), to_single(weight), to_single(positive),
                                 reduction, parameter);
}

#if defined(TRAINOPT_WITH_CUDA)
// torch's autocast on CUDA refuses binary_cross_entropy: the error is its own.
at::Tensor in_single_on_cuda(c10::string_view name, const at::Tensor& input, const at::Tensor& target,
                             const OptionalTensor& weight, const OptionalTensor& positive, int64_t reduction,
                             double parameter) {
  if (name == "binary_cross_entropy") return at::binary_cross_entropy(input, target, weight, reduction);
  return in_single(name, input, target, weight, positive, reduction, parameter);
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(trainopt, m) {
  m.def(
      "pointwise_loss(str loss, Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, int reduction, "
      "float parameter) -> Tensor");
  m.def(
      "pointwise_loss_backward(str loss, Tensor upstream, Tensor input, Tensor target, Tensor? weight, "
      "Tensor? pos_weight, int reduction, float parameter, bool[2] wanted) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(trainopt, CPU, m) {
  m.impl("pointwise_loss", forward);
  m.impl("pointwise_loss_backward", backward);
}
TORCH_LIBRARY_IMPL(trainopt, Autograd, m) { m.impl("pointwise_loss", with_gradient); }
TORCH_LIBRARY_IMPL(trainopt, AutocastCPU, m) { m.impl("pointwise_loss", in_single); }
#if defined(TRAINOPT_WITH_CUDA)
TORCH_LIBRARY_IMPL(trainopt, TRAINOPT_AUTOCAST_CUDA_KEY, m) { m.impl("pointwise_loss", in_single_on_cuda); }
#endif

}  // namespace pointwise
}  // namespace trainopt::aten
