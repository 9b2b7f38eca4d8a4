// The operator trainopt::cross_entropy.
#include <ATen/ATen.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <utility>

#include "torch/losses/arguments.h"
#include "torch/losses/cross_entropy.h"
#include "torch/losses/cross_entropy_cuda.h"
#include "torch/losses/cross_entropy_options.h"
#include "torch/losses/fresh_memory.h"

namespace trainopt::aten {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // loss, z-loss, log-sum-exp

void check(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight) {
  check_arguments({{"input", input}, LossArgument::classes_or_probabilities(target), {"weight", weight}});
}

int64_t class_dim_of(const at::Tensor& input) {
  TORCH_CHECK_VALUE(input.dim() > 0, "input must have a dimension of classes, and has shape ", input.sizes());
  return input.dim() == 1 ? 0 : 1;
}

Outputs forward(const CrossEntropyOptions& options, const at::Tensor& input, const at::Tensor& target,
                const OptionalTensor& weight, bool) {
  check(input, target, weight);
  const int64_t class_dim = class_dim_of(input);
  HostTarget targets(input.sizes(), class_dim, target, weight, options);
  const Logits logits = Logits::of(input, class_dim);
  at::Tensor lse = empty_lse(targets.rows(), input.options());
  std::vector<double> loss(targets.rows());
  cpu::CrossEntropyTask task = targets.task(logits);
  task.lse = lse_in(lse, targets.rows());
  task.loss = loss.data();
  for_each_row(targets.rows(), task.classes, [&](int64_t first, int64_t last) {
    cpu::cross_entropy_forward(input.scalar_type() == at::kDouble, task, first, last);
  });
  c10::DimVector shape(input.sizes().begin(), input.sizes().end());
  shape.erase(shape.begin() + class_dim);
  auto [reduced, z] = targets.reduce(loss, task.lse, shape, input.options());
  return {std::move(reduced), std::move(z), std::move(lse)};
}

#if defined(TRAINOPT_WITH_CUDA)
// With `gradient`, the gradient for an upstream gradient of 1 too, which then costs no second pass over the logits; it
// stays undefined where they lie in an order that the engine does not know.
Outputs on_cuda(const CrossEntropyOptions& options, const at::Tensor& input, const at::Tensor& target,
                const OptionalTensor& weight, at::Tensor* gradient) {
  check(input, target, weight);
  const OnDevice on(input.device());
  const int64_t class_dim = class_dim_of(input);
  const c10::ScalarType dtype = input.scalar_type();
  CrossEntropyTarget targets(input.sizes(), class_dim, target, weight, DeviceCrossEntropy::weight_dtype(dtype),
                             options);
  std::optional<Logits> derivatives;
  if (gradient != nullptr) {
    const at::Tensor memory = at::empty_like(input);
    Logits walked = Logits::of(memory, class_dim);
    if (walked.tensor.is_alias_of(memory)) {
      *gradient = memory;
      derivatives = std::move(walked);
    }
  }
  const Logits logits = derivatives ? Logits::of(input, class_dim, derivatives->inner) : Logits::of(input, class_dim);
  DeviceCrossEntropy work(targets, input.device(), dtype, targets.rows(), on.stream);
  work.start(dtype);
  if (derivatives) work.count(false);
  work.forward(targets.batch(logits), 0, targets.rows(), derivatives ? &derivatives->rows : nullptr);
  auto [loss, z] = work.finish();
  return {std::move(loss), std::move(z), std::move(work.lse)};
}

Outputs forward_on_cuda(const CrossEntropyOptions& options, const at::Tensor& input, const at::Tensor& target,
                        const OptionalTensor& weight, bool) {
  return on_cuda(options, input, target, weight, nullptr);
}
#endif

// Whether forward should make the gradient, too: on CUDA, for a loss that is reduced, where its upstream gradient is
// likely to be 1. Not where somebody could tell: hooks that pack what is saved for backward (those of activation
// checkpoints, say) would not be shown it, nor would a mode that looks at every operator.
bool makes_gradient_in_forward([[maybe_unused]] const at::Tensor& input, [[maybe_unused]] const at::Tensor& target,
                               [[maybe_unused]] const OptionalTensor& weight,
                               [[maybe_unused]] const CrossEntropyOptions& options,
                               [[maybe_unused]] bool inplace_backward) {
#if defined(TRAINOPT_WITH_CUDA)
  return options.reduction != Reduction::kNone && !inplace_backward && at::GradMode::is_enabled() &&
         input.requires_grad() && !input.is_cpu() && !has_saved_tensor_hooks() &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() && takes(input) && takes(target) &&
         (!weight.has_value() || takes(*weight)) && !DeviceCrossEntropy::was_scaled(input.device());
#else
  return false;
#endif
}

// What backward is given.
struct Given {
  const at::Tensor &upstream, &input, &target;
  const OptionalTensor& weight;
  const at::Tensor& lse;
  CrossEntropyOptions options;
  int64_t class_dim = class_dim_of(input);

  void check() const {
    aten::check(input, target, weight);
    check_arguments({{"input", input}, {"upstream", upstream}, {"lse", lse}});
    c10::DimVector shape(input.sizes().begin(), input.sizes().end());
    shape.erase(shape.begin() + class_dim);
    check_upstream(upstream, shape, options.reduction);
  }
};

// Writes the gradient into `gradient`, which lies in memory as `logits`, the input or a copy of it, do. `unless_one`:
// on CUDA, there is that for an upstream gradient of 1 already.
void write_gradient(const Given& given, const Logits& logits, const Logits& gradient,
                    [[maybe_unused]] bool unless_one = false) {
  const c10::ScalarType dtype = given.input.scalar_type();
#if defined(TRAINOPT_WITH_CUDA)
  if (!logits.tensor.is_cpu()) {
    const OnDevice on(logits.tensor.device());
    CrossEntropyTarget targets(given.input.sizes(), given.class_dim, given.target, given.weight,
                               DeviceCrossEntropy::weight_dtype(dtype), given.options);
    DeviceCrossEntropy work(targets, logits.tensor.device(), dtype, targets.rows(), on.stream);
    work.lse = given.lse;
    work.count(false);
    return work.backward(targets.batch(logits), 0, targets.rows(), given.upstream, gradient.rows, unless_one);
  }
#endif
  HostTarget targets(given.input.sizes(), given.class_dim, given.target, given.weight, given.options);
  std::vector<double> scale, lse_scale;
  cpu::CrossEntropyTask task = targets.task(logits);
  task.lse = lse_in(given.lse, targets.rows());
  targets.scales(given.upstream, task.lse, 0, targets.rows(), &scale, &lse_scale);
  task.scale = scale.data();
  task.lse_scale = lse_scale.data();
  task.gradient = gradient.rows;
  task.streams =
      gradient.rows.data != logits.rows.data && static_cast<int64_t>(gradient.tensor.nbytes()) >= cpu::kStreamFrom;
  for_each_row(targets.rows(), task.classes, [&](int64_t first, int64_t last) {
    cpu::cross_entropy_backward(dtype == at::kDouble, task, first, last);
  });
}

at::Tensor gradient_of(const Given& given) {
  const at::Tensor& input = given.input;
  at::Tensor result = input.is_cpu() ? fresh_like(input, input.scalar_type()) : at::empty_like(input);
  const Logits gradient = Logits::of(result, given.class_dim);
  if (gradient.tensor.is_alias_of(result)) {
    write_gradient(given, Logits::of(input, given.class_dim, gradient.inner), gradient);
    return result;
  }
  // An order in memory that the engine does not know: by way of one that it does.
  return result.copy_(
      gradient_of({given.upstream, input.contiguous(), given.target, given.weight, given.lse, given.options}));
}

at::Tensor backward(const CrossEntropyOptions& options, const at::Tensor& upstream, const at::Tensor& input,
                    const at::Tensor& target, const OptionalTensor& weight, const at::Tensor& lse) {
  const Given given{upstream, input, target, weight, lse, options};
  given.check();
  return gradient_of(given);
}

// Writes the gradient over the logits' own memory. False, and nothing is done, where somebody could tell, and where
// they do not lie in memory as the engine walks them.
bool write_over_logits(const Given& given) {
  const at::Tensor weight = given.weight.value_or(at::Tensor());
  if (!may_write_over(given.input, {&given.upstream, &given.target, &weight, &given.lse})) return false;
  const Logits logits = Logits::of(given.input, given.class_dim);
  if (!given.input.is_non_overlapping_and_dense() || !logits.tensor.is_alias_of(given.input)) return false;
  given.check();
  write_gradient(given, logits, logits);
  return true;
}

// at::logsumexp over the classes, with a gradient that has all its digits: torch's is e^(x - lse), and where logits are
// large lse has none left for what is beyond the largest one.
at::Tensor log_sum_exp(const at::Tensor& x, int64_t class_dim) {
  if (x.size(class_dim) == 0) return at::logsumexp(x, class_dim);
  at::Tensor peak = x.detach().amax(class_dim, true);
  peak = peak.masked_fill(~peak.isfinite(), 0);
  return peak.squeeze(class_dim) + at::logsumexp(x - peak, class_dim);
}

// The logits of the softmax, with the soft cap that softcap_in makes of it.
at::Tensor mapped(const at::Tensor& x, const CrossEntropyOptions& options) {
  const bool is_float64 = x.scalar_type() == at::kDouble;
  const double cap =
      is_float64 ? softcap_in<double>(options.softcap) : static_cast<double>(softcap_in<float>(options.softcap));
  const at::Tensor capped = cap == 0 ? x : cap * at::tanh(x / cap);
  return options.temperature == 1 ? capped : capped / options.temperature;
}

// torch's own, with what trainopt adds, for the second derivative; in float32 inside, as the operators.
at::Tensor by_torch(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                    const CrossEntropyOptions& options) {
  const auto reduction = static_cast<int64_t>(options.reduction);
  const bool has_map = options.softcap != 0 || options.temperature != 1;
  if (!has_map && options.z_loss == 0)
    return at::cross_entropy_loss(input, target, weight, reduction, options.ignore_index, options.smoothing);
  const c10::ScalarType type = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor x = mapped(input.to(type), options);
  const OptionalTensor factors = weight.has_value() ? OptionalTensor(weight->to(type)) : std::nullopt;
  at::Tensor loss = at::cross_entropy_loss(x, target, factors, reduction, options.ignore_index, options.smoothing);
  if (options.z_loss == 0) return loss.to(input.scalar_type());
  at::Tensor z = options.z_loss * log_sum_exp(x, class_dim_of(x)).square();
  const bool has_labels = !target.is_floating_point();
  const at::Tensor counted = has_labels ? target.ne(options.ignore_index) : at::Tensor();
  if (has_labels) z = z.masked_fill(~counted, 0);
  if (options.reduction == Reduction::kSum) z = z.sum();
  if (options.reduction == Reduction::kMean) z = has_labels ? z.sum() / counted.sum() : z.mean();
  return (loss + z).to(input.scalar_type());
}

using BackwardOperator =
    CrossEntropyOperator<at::Tensor(const CrossEntropyOptions&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                    const OptionalTensor&, const at::Tensor&)>;
const BackwardOperator& backward_operator() {
  static const BackwardOperator found("trainopt::cross_entropy_backward");
  return found;
}

// What backward must know of the call, in one piece.
struct Call : torch::CustomClassHolder {
  Call(const CrossEntropyOptions& of, bool inplace) : options(of), inplace_backward(inplace) {}
  CrossEntropyOptions options;
  bool inplace_backward;
  at::Tensor gradient;  // for an upstream gradient of 1, if forward has made it; handed over once
};

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const at::Tensor& input,
                                                const at::Tensor& target, const OptionalTensor& weight,
                                                const CrossEntropyOptions& options, bool inplace_backward,
                                                [[maybe_unused]] bool with_gradient) {
    auto call = c10::make_intrusive<Call>(options, inplace_backward && !has_saved_tensor_hooks());
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto run = [&]() -> Outputs {
#if defined(TRAINOPT_WITH_CUDA)
      if (with_gradient) return on_cuda(options, input, target, weight, &call->gradient);
#endif
      return cross_entropy_operator()(options, input, target, weight, inplace_backward);
    };
    auto [loss, z, lse] = run();
    context->saved_data["call"] = c10::IValue::make_capsule(std::move(call));
    context->save_for_backward({input, target, weight.has_value() ? *weight : at::Tensor(), lse});
    context->mark_non_differentiable({z, lse});
    context->set_materialize_grads(false);  // they are never read
    return {loss, z, lse};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &input = saved[0], &target = saved[1], &lse = saved[3];
    const OptionalTensor weight = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    const at::Tensor factors = weight.value_or(at::Tensor());
    Call& call = static_cast<Call&>(*context->saved_data["call"].toCapsule());
    const CrossEntropyOptions& options = call.options;
    torch::autograd::variable_list gradients(6);
    if (!upstream[0].defined()) return gradients;
    if (at::GradMode::is_enabled()) {
      gradients[0] = differentiable_gradients(
          {input}, upstream[0], [&](const auto& inputs) { return by_torch(inputs[0], target, weight, options); })[0];
    } else if (call.gradient.defined() &&
               may_write_over(call.gradient, {&upstream[0], &input, &target, &factors, &lse})) {
      gradients[0] = std::exchange(call.gradient, at::Tensor());
      const Given given{upstream[0], input, target, weight, lse, options};
      given.check();
      const Logits gradient = Logits::of(gradients[0], given.class_dim);
      write_gradient(given, Logits::of(input, given.class_dim, gradient.inner), gradient, true);
    } else if (call.inplace_backward && write_over_logits({upstream[0], input, target, weight, lse, options})) {
      gradients[0] = input.detach();
      input.unsafeGetTensorImpl()->bump_version();
    } else {
      const at::AutoDispatchBelowADInplaceOrView below;  // there is no kernel for autograd, whose stand-in is slow
      gradients[0] = backward_operator()(options, upstream[0], input, target, weight, lse);
    }
    return gradients;
  }
};

Outputs with_gradient(const CrossEntropyOptions& options, const at::Tensor& input, const at::Tensor& target,
                      const OptionalTensor& weight, bool inplace_backward) {
  const bool early = makes_gradient_in_forward(input, target, weight, options, inplace_backward);
  auto outputs = CrossEntropyFunction::apply(input, target, weight, options, inplace_backward, early);
  return {std::move(outputs[0]), std::move(outputs[1]), std::move(outputs[2])};
}

Outputs in_single(const CrossEntropyOptions& options, const at::Tensor& input, const at::Tensor& target,
                  const OptionalTensor& weight, bool inplace_backward) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return cross_entropy_operator()(options, to_single(input), to_single(target), to_single(weight), inplace_backward);
}

}  // namespace

const CrossEntropyForward& cross_entropy_operator() {
  static const CrossEntropyForward found("trainopt::cross_entropy");
  return found;
}

void check_options(const CrossEntropyOptions& options) {
  TORCH_CHECK_VALUE(options.softcap >= 0, "softcap must be at least 0, which is none, not ", options.softcap);
  TORCH_CHECK_VALUE(options.temperature > 0 && std::isfinite(options.temperature),
                    "temperature must be finite and greater than 0, not ", options.temperature);
}

TORCH_LIBRARY_FRAGMENT(trainopt, m) {
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, bool "
      "inplace_backward, " TRAINOPT_CROSS_ENTROPY_OPTIONS ") -> (Tensor loss, Tensor z_loss, Tensor lse)");
  m.def(
      "cross_entropy_backward(Tensor upstream, Tensor input, Tensor target, Tensor? weight, Tensor "
      "lse, " TRAINOPT_CROSS_ENTROPY_OPTIONS ") -> Tensor");
}

TORCH_LIBRARY_IMPL(trainopt, CPU, m) {
  m.impl("cross_entropy", TRAINOPT_UNPACK_OPTIONS(forward));
  m.impl("cross_entropy_backward", TRAINOPT_UNPACK_OPTIONS(backward));
}
TORCH_LIBRARY_IMPL(trainopt, Autograd, m) { m.impl("cross_entropy", TRAINOPT_UNPACK_OPTIONS(with_gradient)); }
TORCH_LIBRARY_IMPL(trainopt, AutocastCPU, m) { m.impl("cross_entropy", TRAINOPT_UNPACK_OPTIONS(in_single)); }

#if defined(TRAINOPT_WITH_CUDA)
TORCH_LIBRARY_IMPL(trainopt, TRAINOPT_CUDA_KEY, m) {
  m.impl("cross_entropy", TRAINOPT_UNPACK_OPTIONS(forward_on_cuda));
  m.impl("cross_entropy_backward", TRAINOPT_UNPACK_OPTIONS(backward));
}
TORCH_LIBRARY_IMPL(trainopt, TRAINOPT_AUTOCAST_CUDA_KEY, m) {
  m.impl("cross_entropy", TRAINOPT_UNPACK_OPTIONS(in_single));
}
#endif

}  // namespace trainopt::aten
