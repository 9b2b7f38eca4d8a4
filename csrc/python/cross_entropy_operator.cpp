// The operator trainopt::cross_entropy.
#include <ATen/ATen.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <tuple>

#include "python/cross_entropy.h"
#include "python/cross_entropy_cuda.h"
#include "python/fresh_memory.h"

namespace trainopt::python {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

int64_t class_dim_of(const at::Tensor& input) {
  TORCH_CHECK_VALUE(input.dim() > 0, "input must have a dimension of classes, and has shape ", input.sizes());
  return input.dim() == 1 ? 0 : 1;
}

Three forward(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
              int64_t ignore_index, double label_smoothing, double z_loss, double softcap, bool, bool empty_is_zero) {
  const int64_t class_dim = class_dim_of(input);
  HostTarget targets(input.sizes(), class_dim, target, weight,
                     {reduction, ignore_index, label_smoothing, z_loss, softcap, empty_is_zero});
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
Three forward_on_cuda(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                      int64_t reduction, int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                      bool, bool empty_is_zero) {
  const OnDevice on(input.device());
  const int64_t class_dim = class_dim_of(input);
  const c10::ScalarType dtype = input.scalar_type();
  CrossEntropyTarget targets(input.sizes(), class_dim, target, weight, DeviceCrossEntropy::weight_dtype(dtype),
                             {reduction, ignore_index, label_smoothing, z_loss, softcap, empty_is_zero});
  const Logits logits = Logits::of(input, class_dim);
  DeviceCrossEntropy work(targets, input.device(), dtype, targets.rows(), on.stream);
  work.start(dtype);
  work.forward(targets.batch(logits), 0, targets.rows());
  auto [loss, z] = work.finish();
  return {std::move(loss), std::move(z), std::move(work.lse)};
}
#endif

// What backward is given beside logits and gradient, which may be copies of the caller's.
struct Given {
  const at::Tensor& upstream;
  c10::IntArrayRef input_sizes;
  int64_t class_dim;
  const at::Tensor& target;
  const OptionalTensor& weight;
  const at::Tensor& lse;
  CrossEntropyOptions options;
};

// Writes the gradient into `gradient`, which lies in memory as the logits do.
void write_gradient(const Given& given, const Logits& logits, const Logits& gradient) {
  const c10::ScalarType dtype = logits.tensor.scalar_type();
#if defined(TRAINOPT_WITH_CUDA)
  if (!logits.tensor.is_cpu()) {
    const OnDevice on(logits.tensor.device());
    CrossEntropyTarget targets(given.input_sizes, given.class_dim, given.target, given.weight,
                               DeviceCrossEntropy::weight_dtype(dtype), given.options);
    DeviceCrossEntropy work(targets, logits.tensor.device(), dtype, targets.rows(), on.stream);
    work.lse = given.lse;
    work.count(false);
    return work.backward(targets.batch(logits), 0, targets.rows(), given.upstream, gradient.rows);
  }
#endif
  HostTarget targets(given.input_sizes, given.class_dim, given.target, given.weight, given.options);
  std::vector<double> scale, lse_scale;
  cpu::CrossEntropyTask task = targets.task(logits);
  task.lse = lse_in(given.lse, targets.rows());
  targets.scales(given.upstream, task.lse, 0, targets.rows(), &scale, &lse_scale);
  task.scale = scale.data();
  task.lse_scale = lse_scale.data();
  task.gradient = gradient.rows;
  for_each_row(targets.rows(), task.classes, [&](int64_t first, int64_t last) {
    cpu::cross_entropy_backward(dtype == at::kDouble, task, first, last);
  });
}

at::Tensor backward(const at::Tensor& upstream, const at::Tensor& input, const at::Tensor& target,
                    const OptionalTensor& weight, const at::Tensor& lse, int64_t reduction, int64_t ignore_index,
                    double label_smoothing, double z_loss, double softcap, bool empty_is_zero) {
  const int64_t class_dim = class_dim_of(input);
  at::Tensor result = input.is_cpu() ? fresh_like(input, input.scalar_type()) : at::empty_like(input);
  const Logits gradient = Logits::of(result, class_dim);
  if (gradient.tensor.is_alias_of(result)) {
    write_gradient({upstream,
                    input.sizes(),
                    class_dim,
                    target,
                    weight,
                    lse,
                    {reduction, ignore_index, label_smoothing, z_loss, softcap, empty_is_zero}},
                   Logits::of(input, class_dim, gradient.inner), gradient);
    return result;
  }
  // An order in memory that the engine does not know: by way of one that it does.
  return result.copy_(backward(upstream, input.contiguous(), target, weight, lse, reduction, ignore_index,
                               label_smoothing, z_loss, softcap, empty_is_zero));
}

// The same, over the logits' own memory, if they lie in memory as the engine walks them.
at::Tensor backward_in_place(const at::Tensor& upstream, const at::Tensor& input, const at::Tensor& target,
                             const OptionalTensor& weight, const at::Tensor& lse, int64_t reduction,
                             int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                             bool empty_is_zero) {
  const int64_t class_dim = class_dim_of(input);
  const Logits logits = Logits::of(input, class_dim);
  if (!input.is_non_overlapping_and_dense() || !logits.tensor.is_alias_of(input))
    return backward(upstream, input, target, weight, lse, reduction, ignore_index, label_smoothing, z_loss, softcap,
                    empty_is_zero);
  write_gradient({upstream,
                  input.sizes(),
                  class_dim,
                  target,
                  weight,
                  lse,
                  {reduction, ignore_index, label_smoothing, z_loss, softcap, empty_is_zero}},
                 logits, logits);
  return input.detach();
}

// at::logsumexp over the classes, with a gradient that has all its digits: torch's is e^(x - lse), and where logits are
// large lse has none left for what is beyond the largest one.
at::Tensor log_sum_exp(const at::Tensor& x, int64_t class_dim) {
  if (x.size(class_dim) == 0) return at::logsumexp(x, class_dim);
  at::Tensor peak = x.detach().amax(class_dim, true);
  peak = peak.masked_fill(~peak.isfinite(), 0);
  return peak.squeeze(class_dim) + at::logsumexp(x - peak, class_dim);
}

// torch's own, with what trainopt adds, for the second derivative.
at::Tensor torchs(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
                  int64_t ignore_index, double label_smoothing, double z_loss, double softcap) {
  const at::Tensor x = softcap == 0 ? input : softcap * at::tanh(input / softcap);
  at::Tensor loss = at::cross_entropy_loss(x, target, weight, reduction, ignore_index, label_smoothing);
  if (z_loss == 0) return loss;
  at::Tensor z = z_loss * log_sum_exp(x, class_dim_of(x)).square();
  if (!target.is_floating_point()) {
    const at::Tensor counted = target.ne(ignore_index);
    z = z.masked_fill(~counted, 0);
    return loss + (reduction == kNone ? z : reduction == kSum ? z.sum() : z.sum() / counted.sum());
  }
  return loss + (reduction == kNone ? z : reduction == kSum ? z.sum() : z.mean());
}

using Forward = Three(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t, int64_t, double, double,
                      double, bool, bool);
using Backward = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                            const at::Tensor&, int64_t, int64_t, double, double, double, bool);

const c10::TypedOperatorHandle<Forward>& forward_operator() {
  static const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow("trainopt::cross_entropy", "").typed<Forward>();
  return handle;
}

const c10::TypedOperatorHandle<Backward>& backward_operator() {
  static const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow("trainopt::cross_entropy_backward", "").typed<Backward>();
  return handle;
}

// What backward must know of the call, in one piece.
struct Call : torch::CustomClassHolder {
  int64_t reduction, ignore_index;
  double label_smoothing, z_loss, softcap;
  bool inplace_backward, empty_is_zero;
};

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const at::Tensor& input,
                                                const at::Tensor& target, const OptionalTensor& weight,
                                                int64_t reduction, int64_t ignore_index, double label_smoothing,
                                                double z_loss, double softcap, bool inplace_backward,
                                                bool empty_is_zero) {
    auto call = c10::make_intrusive<Call>();
    call->reduction = reduction;
    call->ignore_index = ignore_index;
    call->label_smoothing = label_smoothing;
    call->z_loss = z_loss;
    call->softcap = softcap;
    call->inplace_backward = inplace_backward;
    call->empty_is_zero = empty_is_zero;
    context->saved_data["call"] = c10::IValue::make_capsule(std::move(call));
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, z, lse] = forward_operator().call(input, target, weight, reduction, ignore_index, label_smoothing,
                                                  z_loss, softcap, inplace_backward, empty_is_zero);
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
    const Call& call = static_cast<const Call&>(*context->saved_data["call"].toCapsule());
    torch::autograd::variable_list gradients(10);
    if (!upstream[0].defined()) return gradients;
    if (at::GradMode::is_enabled()) {
      gradients[0] = differentiable_gradients({input}, upstream[0], [&](const auto& inputs) {
        return torchs(inputs[0], target, weight, call.reduction, call.ignore_index, call.label_smoothing, call.z_loss,
                      call.softcap);
      })[0];
    } else if (call.inplace_backward) {
      gradients[0] =
          backward_in_place(upstream[0], input.detach(), target, weight, lse, call.reduction, call.ignore_index,
                            call.label_smoothing, call.z_loss, call.softcap, call.empty_is_zero);
      if (gradients[0].is_alias_of(input)) input.unsafeGetTensorImpl()->bump_version();
    } else {
      gradients[0] =
          backward_operator().call(upstream[0], input, target, weight, lse, call.reduction, call.ignore_index,
                                   call.label_smoothing, call.z_loss, call.softcap, call.empty_is_zero);
    }
    return gradients;
  }
};

Three with_gradient(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
                    int64_t ignore_index, double label_smoothing, double z_loss, double softcap, bool inplace_backward,
                    bool empty_is_zero) {
  auto outputs = CrossEntropyFunction::apply(input, target, weight, reduction, ignore_index, label_smoothing, z_loss,
                                             softcap, inplace_backward, empty_is_zero);
  return {std::move(outputs[0]), std::move(outputs[1]), std::move(outputs[2])};
}

Three in_single(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
                int64_t ignore_index, double label_smoothing, double z_loss, double softcap, bool inplace_backward,
                bool empty_is_zero) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return forward_operator().call(to_single(input), to_single(target), to_single(weight), reduction, ignore_index,
                                 label_smoothing, z_loss, softcap, inplace_backward, empty_is_zero);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trainopt, m) {
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap, bool inplace_backward, bool empty_is_zero) -> "
      "(Tensor loss, Tensor z_loss, Tensor lse)");
  m.def(
      "cross_entropy_backward(Tensor upstream, Tensor input, Tensor target, Tensor? weight, Tensor lse, int reduction, "
      "int ignore_index, float label_smoothing, float z_loss, float softcap, bool empty_is_zero) -> Tensor");
}

TORCH_LIBRARY_IMPL(trainopt, CPU, m) {
  m.impl("cross_entropy", forward);
  m.impl("cross_entropy_backward", backward);
}
TORCH_LIBRARY_IMPL(trainopt, Autograd, m) { m.impl("cross_entropy", with_gradient); }
TORCH_LIBRARY_IMPL(trainopt, AutocastCPU, m) { m.impl("cross_entropy", in_single); }

#if defined(TRAINOPT_WITH_CUDA)
TORCH_LIBRARY_IMPL(trainopt, TRAINOPT_CUDA_KEY, m) {
  m.impl("cross_entropy", forward_on_cuda);
  m.impl("cross_entropy_backward", backward);
}
TORCH_LIBRARY_IMPL(trainopt, TRAINOPT_AUTOCAST_CUDA_KEY, m) { m.impl("cross_entropy", in_single); }
#endif

}  // namespace trainopt::python
