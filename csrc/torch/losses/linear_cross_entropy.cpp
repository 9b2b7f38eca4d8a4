// The operator trainopt::linear_cross_entropy: hidden states times the output layer, into cross-entropy, a chunk of
// tokens at a time, so that the logits of all tokens never exist together.
//
// With a reduction to one number the gradients are made in the forward pass, chunk by chunk, while the logits are
// there: three matrix products in all, as many as the plain way has. Backward multiplies them by the upstream gradient
// and hands them over; a second backward through the same graph computes them again. Without a reduction, and in
// float16, the upstream gradient is needed first, so backward recomputes the logits.
#include "torch/losses/linear_cross_entropy.h"

#include <ATen/ATen.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <tuple>

#include "torch/cuda_device.h"
#include "torch/losses/arguments.h"
#include "torch/losses/cross_entropy.h"
#include "torch/losses/fresh_memory.h"

namespace trainopt::aten {

void check_operands(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
                    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& class_weight,
                    int64_t reduction) {
  check_arguments({{"input", input},
                   {"weight", weight},
                   LossArgument::classes_or_probabilities(target),
                   {"bias", bias},
                   {"class_weight", class_weight}});
  check_reduction(reduction);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) > 0, "weight must have shape (classes, width), not ",
                    weight.sizes(), ": where the layer is sharded, gather it whole first (weight.full_tensor())");
  TORCH_CHECK_VALUE(input.dim() > 0 && input.size(-1) == weight.size(1), "input has shape ", input.sizes(),
                    ", and its last dimension must be the width of weight, which has shape ", weight.sizes());
  TORCH_CHECK_VALUE(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "bias has shape ",
                    bias.has_value() ? bias->sizes() : c10::IntArrayRef(), ", and weight has ", weight.size(0),
                    " rows");
}

void check_backward(const at::Tensor& upstream, const at::Tensor& input, const at::Tensor& lse, int64_t reduction) {
  check_arguments({{"input", input}, {"upstream", upstream}, {"lse", lse}});
  check_upstream(upstream, input.sizes().slice(0, input.dim() - 1), reduction);
}

c10::DimVector logit_sizes(const at::Tensor& input, const at::Tensor& weight) {
  c10::DimVector sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = weight.size(0);
  return sizes;
}

namespace {

using OptionalTensor = std::optional<at::Tensor>;

// The problem with all leading dimensions in one, and in the type of the arithmetic.
struct Problem {
  at::Tensor input, weight, bias;  // (tokens, width), (classes, width), (classes): float32 or float64
  HostTarget target;
  int64_t chunk;  // tokens
  bool wide;

  int64_t tokens() const { return input.size(0); }
  int64_t classes() const { return weight.size(0); }

  // The logits of tokens [first, first + count), in `buffer`.
  at::Tensor logits(int64_t first, int64_t count, const at::Tensor& buffer) const {
    at::Tensor out = buffer.narrow(0, 0, count);
    const at::Tensor rows = input.narrow(0, first, count);
    if (bias.defined()) {
      at::addmm_out(out, bias, rows, weight.t());
    } else {
      at::mm_out(out, rows, weight.t());
    }
    return out;
  }
};

// What of the gradients is wanted, and where it goes: float32 or float64, whatever the operands are.
struct Gradients {
  at::Tensor input, weight, bias;  // undefined: not wanted
  bool any() const { return input.defined() || weight.defined() || bias.defined(); }
};

Problem make_problem(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
                     const OptionalTensor& bias, const OptionalTensor& class_weight, const CrossEntropyOptions& options,
                     int64_t chunk) {
  check_operands(input, weight, target, bias, class_weight, options.reduction);
  const bool wide = input.scalar_type() == at::kDouble;
  const c10::ScalarType dtype = wide ? at::kDouble : at::kFloat;
  return {input.reshape({-1, weight.size(1)}).to(dtype),
          weight.to(dtype),
          bias.has_value() ? bias->to(dtype) : at::Tensor(),
          HostTarget(logit_sizes(input, weight), input.dim() - 1, target, class_weight, options),
          std::max<int64_t>(chunk, 1),
          wide};
}

Gradients memory_for(const Problem& problem, std::array<bool, 3> wanted) {
  const auto memory = [&](const at::Tensor& like) {
    at::Tensor gradient = fresh(like.sizes(), like.scalar_type());
    return problem.tokens() == 0 ? gradient.zero_() : gradient;  // the first chunk fills it
  };
  return {wanted[0] ? memory(problem.input) : at::Tensor(), wanted[1] ? memory(problem.weight) : at::Tensor(),
          wanted[2] && problem.bias.defined() ? memory(problem.bias) : at::Tensor()};
}

// Runs over the tokens by chunks. `use(task, first, count, logits)` sees the logits of each and what is known of their
// targets, and may overwrite them.
template <class Use>
void for_each_chunk(const Problem& problem, Use use) {
  if (problem.tokens() == 0) return;
  const int64_t chunk = std::min(problem.chunk, problem.tokens());
  const at::Tensor buffer = fresh({chunk, problem.classes()}, problem.input.scalar_type());
  for (int64_t first = 0; first < problem.tokens(); first += chunk) {
    const int64_t count = std::min(chunk, problem.tokens() - first);
    const at::Tensor logits = problem.logits(first, count, buffer);
    use(problem.target.chunk_task(logits, first), first, count, logits);
  }
}

void run_rows(const Problem& problem, const cpu::CrossEntropyTask& task, int64_t count, bool backward) {
  for_each_row(count, problem.classes(), [&](int64_t begin, int64_t end) {
    (backward ? cpu::cross_entropy_backward : cpu::cross_entropy_forward)(problem.wide, task, begin, end);
  });
}

// From the gradient of a chunk's logits, which stands in their place, to those of the operands.
void accumulate(const Problem& problem, int64_t first, int64_t count, const at::Tensor& logits,
                const Gradients& gradients) {
  if (gradients.input.defined()) {
    at::Tensor out = gradients.input.narrow(0, first, count);
    at::mm_out(out, logits, problem.weight);
  }
  if (gradients.weight.defined()) {
    at::Tensor out = gradients.weight;
    const at::Tensor rows = problem.input.narrow(0, first, count);
    first == 0 ? at::mm_out(out, logits.t(), rows) : at::addmm_out(out, out, logits.t(), rows);
  }
  if (gradients.bias.defined()) {
    at::Tensor out = gradients.bias;
    first == 0 ? at::sum_out(out, logits, 0) : out.add_(logits.sum(0));
  }
}

// Puts the gradient of a chunk's logits in their place.
void write_logit_gradient(const Problem& problem, cpu::CrossEntropyTask task, const at::Tensor& upstream,
                          const LogSumExp& lse, int64_t first, int64_t count) {
  std::vector<double> scale, lse_scale;
  problem.target.scales(upstream, lse, first, count, &scale, &lse_scale);
  task.lse = lse.from(first);
  task.scale = scale.data();
  task.lse_scale = lse_scale.data();
  task.gradient = task.logits;
  run_rows(problem, task, count, true);
}

// In the operands' shapes and types; empty where not wanted.
std::tuple<at::Tensor, at::Tensor, at::Tensor> finish(const Gradients& gradients, const at::Tensor& input,
                                                      const at::Tensor& weight, const OptionalTensor& bias) {
  const auto as = [&](const at::Tensor& gradient, const at::Tensor& operand) {
    if (!gradient.defined()) return at::empty({0}, input.options());
    return gradient.reshape(operand.sizes()).to(operand.scalar_type());
  };
  return {as(gradients.input, input), as(gradients.weight, weight),
          bias.has_value() ? as(gradients.bias, *bias) : at::empty({0}, input.options())};
}

// Loss, z-loss, lse, and the gradients for an upstream gradient of 1, as far as they are wanted.
Six forward(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target, const OptionalTensor& bias,
            const OptionalTensor& class_weight, int64_t reduction, int64_t ignore_index, double label_smoothing,
            double z_loss, double softcap, bool empty_is_zero, int64_t chunk, std::array<bool, 3> wanted) {
  const CrossEntropyOptions options{reduction, ignore_index, label_smoothing, z_loss, softcap, empty_is_zero};
  const Problem problem = make_problem(input, weight, target, bias, class_weight, options, chunk);
  TORCH_CHECK(reduction != kNone || !(wanted[0] || wanted[1] || wanted[2]),
              "gradients come with the forward pass only for a loss that is reduced");
  const Gradients gradients = memory_for(problem, wanted);
  at::Tensor lse = empty_lse(problem.tokens(), input.options());
  const LogSumExp of_rows = lse_in(lse, problem.tokens());
  std::vector<double> loss(problem.tokens());
  const at::Tensor one = at::ones({}, at::kDouble);
  for_each_chunk(problem, [&](cpu::CrossEntropyTask task, int64_t first, int64_t count, const at::Tensor& logits) {
    task.lse = of_rows.from(first);
    task.loss = loss.data() + first;
    run_rows(problem, task, count, false);
    if (!gradients.any()) return;
    write_logit_gradient(problem, task, one, of_rows, first, count);
    accumulate(problem, first, count, logits, gradients);
  });
  auto [reduced, z] =
      problem.target.reduce(loss, of_rows, input.sizes().slice(0, input.dim() - 1), problem.input.options());
  auto [of_input, of_weight, of_bias] = finish(gradients, input, weight, bias);
  return {std::move(reduced),  std::move(z),         std::move(lse),
          std::move(of_input), std::move(of_weight), std::move(of_bias)};
}

// The gradients for any upstream gradient, with the logits computed again.
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& upstream, const at::Tensor& input,
                                                        const at::Tensor& weight, const at::Tensor& target,
                                                        const OptionalTensor& bias, const OptionalTensor& class_weight,
                                                        const at::Tensor& lse, int64_t reduction, int64_t ignore_index,
                                                        double label_smoothing, double z_loss, double softcap,
                                                        bool empty_is_zero, int64_t chunk, std::array<bool, 3> wanted) {
  const CrossEntropyOptions options{reduction, ignore_index, label_smoothing, z_loss, softcap, empty_is_zero};
  const Problem problem = make_problem(input, weight, target, bias, class_weight, options, chunk);
  check_backward(upstream, input, lse, reduction);
  const Gradients gradients = memory_for(problem, wanted);
  const LogSumExp of_rows = lse_in(lse, problem.tokens());
  for_each_chunk(problem,
                 [&](const cpu::CrossEntropyTask& task, int64_t first, int64_t count, const at::Tensor& logits) {
                   write_logit_gradient(problem, task, upstream, of_rows, first, count);
                   accumulate(problem, first, count, logits, gradients);
                 });
  return finish(gradients, input, weight, bias);
}

using Forward = Six(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                    const OptionalTensor&, int64_t, int64_t, double, double, double, bool, int64_t,
                    std::array<bool, 3>);
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                                const at::Tensor&, const OptionalTensor&,
                                                                const OptionalTensor&, const at::Tensor&, int64_t,
                                                                int64_t, double, double, double, bool, int64_t,
                                                                std::array<bool, 3>);

const c10::TypedOperatorHandle<Forward>& forward_operator() {
  static const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow("trainopt::linear_cross_entropy_forward", "").typed<Forward>();
  return handle;
}

const c10::TypedOperatorHandle<Backward>& backward_operator() {
  static const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow("trainopt::linear_cross_entropy_backward", "").typed<Backward>();
  return handle;
}

// What backward must know of the call, in one piece, and the gradients that it may hand over once.
struct Call : torch::CustomClassHolder {
  int64_t reduction, ignore_index, chunk;
  double label_smoothing, z_loss, softcap;
  bool empty_is_zero;
  torch::autograd::variable_list gradients;  // of input, weight and bias; empty when they are not there (any more)
};

// The loss of input, weight and bias with all logits stored: its gradients can be differentiated again.
at::Tensor by_logits(const torch::autograd::variable_list& operands, const at::Tensor& target,
                     const OptionalTensor& class_weight, const Call& call) {
  static const auto cross_entropy = c10::Dispatcher::singleton()
                                        .findSchemaOrThrow("trainopt::cross_entropy", "")
                                        .typed<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
                                            const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t,
                                            int64_t, double, double, double, bool, bool)>();
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const c10::ScalarType dtype = operands[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor bias = operands[2].defined() ? operands[2].to(dtype) : at::Tensor();
  const at::Tensor logits = at::linear(operands[0].to(dtype), operands[1].to(dtype), bias);
  const auto as_logits = [&](const at::Tensor& t) { return t.is_floating_point() ? t.to(dtype) : t; };
  return std::get<0>(cross_entropy.call(
      logits, as_logits(target), class_weight.has_value() ? OptionalTensor(as_logits(*class_weight)) : std::nullopt,
      call.reduction, call.ignore_index, call.label_smoothing, call.z_loss, call.softcap, false, call.empty_is_zero));
}

struct LinearCrossEntropyFunction : torch::autograd::Function<LinearCrossEntropyFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const at::Tensor& input,
                                                const at::Tensor& weight, const at::Tensor& target,
                                                const OptionalTensor& bias, const OptionalTensor& class_weight,
                                                int64_t reduction, int64_t ignore_index, double label_smoothing,
                                                double z_loss, double softcap, bool empty_is_zero, int64_t chunk,
                                                bool with_graph) {
    std::array<bool, 3> wanted{with_graph && input.requires_grad(), with_graph && weight.requires_grad(),
                               with_graph && bias.has_value() && bias->requires_grad()};
    // Gradients for an upstream gradient of 1 may be too small for float16: GradScaler's scale is in the upstream one.
    const bool now = reduction != kNone && weight.scalar_type() != at::kHalf;
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, z, lse, of_input, of_weight, of_bias] =
        forward_operator().call(input, weight, target, bias, class_weight, reduction, ignore_index, label_smoothing,
                                z_loss, softcap, empty_is_zero, chunk, now ? wanted : std::array<bool, 3>{});
    auto call = c10::make_intrusive<Call>();
    call->reduction = reduction;
    call->ignore_index = ignore_index;
    call->chunk = chunk;
    call->label_smoothing = label_smoothing;
    call->z_loss = z_loss;
    call->softcap = softcap;
    call->empty_is_zero = empty_is_zero;
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
    torch::autograd::variable_list gradients(13);
    if (!upstream[0].defined()) return gradients;
    const auto saved = context->get_saved_variables();
    Call& call = static_cast<Call&>(*context->saved_data["call"].toCapsule());
    const auto present = [](const at::Tensor& tensor) {
      return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
    };
    // Edges count the tensors that were given: input, weight, target, then bias.
    const bool has_bias = saved[3].defined();
    const std::array<bool, 3> wanted{context->needs_input_grad(0), context->needs_input_grad(1),
                                     has_bias && context->needs_input_grad(3)};
    if (at::GradMode::is_enabled()) {
      const auto found = differentiable_gradients(
          {saved[0], saved[1], saved[3]}, upstream[0],
          [&](const auto& operands) { return by_logits(operands, saved[2], present(saved[4]), call); });
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
      auto [of_input, of_weight, of_bias] = backward_operator().call(
          upstream[0], saved[0], saved[1], saved[2], present(saved[3]), present(saved[4]), saved[5], call.reduction,
          call.ignore_index, call.label_smoothing, call.z_loss, call.softcap, call.empty_is_zero, call.chunk, wanted);
      found = {of_input, of_weight, of_bias};
    }
    const size_t places[] = {0, 1, 3};
    for (size_t i = 0; i < 3; ++i)
      if (wanted[i]) gradients[places[i]] = found[i];
    return gradients;
  }
};

using Two = std::tuple<at::Tensor, at::Tensor>;

Two linear_cross_entropy(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
                         const OptionalTensor& bias, const OptionalTensor& class_weight, int64_t reduction,
                         int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                         bool empty_is_zero, int64_t chunk) {
  auto outputs = LinearCrossEntropyFunction::apply(input, weight, target, bias, class_weight, reduction, ignore_index,
                                                   label_smoothing, z_loss, softcap, empty_is_zero, chunk,
                                                   at::GradMode::is_enabled());
  return {std::move(outputs[0]), std::move(outputs[1])};
}

Two without_gradient(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
                     const OptionalTensor& bias, const OptionalTensor& class_weight, int64_t reduction,
                     int64_t ignore_index, double label_smoothing, double z_loss, double softcap, bool empty_is_zero,
                     int64_t chunk) {
  auto all = forward_operator().call(input, weight, target, bias, class_weight, reduction, ignore_index,
                                     label_smoothing, z_loss, softcap, empty_is_zero, chunk, std::array<bool, 3>{});
  return {std::move(std::get<0>(all)), std::move(std::get<1>(all))};
}

const c10::TypedOperatorHandle<decltype(linear_cross_entropy)>& whole_operator() {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("trainopt::linear_cross_entropy", "")
                                 .typed<decltype(linear_cross_entropy)>();
  return handle;
}

// On the CPU the products are taken in float32 whatever the operands are, so there is nothing to lower; the loss is
// float32.
Two in_single(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target, const OptionalTensor& bias,
              const OptionalTensor& class_weight, int64_t reduction, int64_t ignore_index, double label_smoothing,
              double z_loss, double softcap, bool empty_is_zero, int64_t chunk) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return whole_operator().call(to_single(input), to_single(weight), to_single(target), to_single(bias),
                               to_single(class_weight), reduction, ignore_index, label_smoothing, z_loss, softcap,
                               empty_is_zero, chunk);
}

#if defined(TRAINOPT_WITH_CUDA)
// On CUDA the products are taken in the type of the weight: autocast's, as those of a linear layer. The loss has the
// type of the input: float32.
Two in_lower(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target, const OptionalTensor& bias,
             const OptionalTensor& class_weight, int64_t reduction, int64_t ignore_index, double label_smoothing,
             double z_loss, double softcap, bool empty_is_zero, int64_t chunk) {
  const c10::DeviceType device = input.device().type();
  const at::Tensor lower = at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), weight, device);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return whole_operator().call(to_single(input), lower, to_single(target), to_single(bias), to_single(class_weight),
                               reduction, ignore_index, label_smoothing, z_loss, softcap, empty_is_zero, chunk);
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(trainopt, m) {
  m.def(
      "linear_cross_entropy(Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, "
      "int reduction, int ignore_index, float label_smoothing, float z_loss, float softcap, bool empty_is_zero, "
      "int chunk) -> (Tensor loss, Tensor z_loss)");
  m.def(
      "linear_cross_entropy_forward(Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, "
      "int reduction, int ignore_index, float label_smoothing, float z_loss, float softcap, bool empty_is_zero, "
      "int chunk, bool[3] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_cross_entropy_backward(Tensor upstream, Tensor input, Tensor weight, Tensor target, Tensor? bias, "
      "Tensor? class_weight, Tensor lse, int reduction, int ignore_index, float label_smoothing, float z_loss, "
      "float softcap, bool empty_is_zero, int chunk, bool[3] wanted) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(trainopt, CPU, m) {
  m.impl("linear_cross_entropy", without_gradient);
  m.impl("linear_cross_entropy_forward", forward);
  m.impl("linear_cross_entropy_backward", backward);
}
TORCH_LIBRARY_IMPL(trainopt, Autograd, m) { m.impl("linear_cross_entropy", linear_cross_entropy); }
TORCH_LIBRARY_IMPL(trainopt, AutocastCPU, m) { m.impl("linear_cross_entropy", in_single); }

#if defined(TRAINOPT_WITH_CUDA)
TORCH_LIBRARY_IMPL(trainopt, TRAINOPT_CUDA_KEY, m) { m.impl("linear_cross_entropy", without_gradient); }
TORCH_LIBRARY_IMPL(trainopt, TRAINOPT_AUTOCAST_CUDA_KEY, m) { m.impl("linear_cross_entropy", in_lower); }
#endif

}  // namespace trainopt::aten
