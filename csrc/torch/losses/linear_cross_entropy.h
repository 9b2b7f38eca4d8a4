// Linear cross-entropy below its operators, for any device: hidden states times the output layer, into cross-entropy, a
// chunk of tokens at a time, so that the logits of all tokens never exist together.
//
// A Backend says how a device does it:
//   Guard                                      made from a tensor: its device is the current one while it lives
//   Target, make_target(...)                   the target of all tokens
//   types_of(input, weight)                    the types of the arithmetic
//   plan_of(problem, chunk, with_gradient)     how the tokens are gone through
//   empty(sizes, dtype, like)                  memory for a gradient
//   empty_logits(rows, classes, dtype, like)   memory for the logits of some tokens
//   make_logits(out, rows, weight, bias)
//   Loss                                       the rows of logits: start, count, forward and finish, or backward
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "torch/losses/arguments.h"
#include "torch/losses/cross_entropy_target.h"

namespace trainopt::aten {

using OptionalTensor = std::optional<at::Tensor>;

// Loss, z-loss, log-sum-exp, and the gradients of input, weight and bias.
using LinearOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using LinearGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
// Which of the gradients of input, weight and bias are wanted.
using Wanted = std::array<bool, 3>;

// RuntimeError or ValueError for what no engine may see (arguments.h), ValueError for operands that do not fit
// together; and for what backward is given beside them.
void check_operands(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
                    const OptionalTensor& bias, const OptionalTensor& class_weight);
void check_backward(const at::Tensor& upstream, const at::Tensor& input, const at::Tensor& lse, Reduction reduction);

// The shape that the logits would have.
c10::DimVector logit_sizes(const at::Tensor& input, const at::Tensor& weight);

// a @ b, and out + a @ b, in the type of `out`.
void product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);
void add_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

struct LinearTypes {
  c10::ScalarType operand;  // of the products' factors, the logits' gradient among them
  c10::ScalarType logits;
  c10::ScalarType result;  // of the loss and of sums over chunks
};

struct LinearPlan {
  int64_t rows;           // tokens whose logits exist at one time
  int64_t gradient_rows;  // tokens whose logits' gradient is kept: the same where it takes the logits' memory
  bool one_product;       // makes the weight's gradient
};

// One call: its operands with all leading dimensions in one, in the types of the arithmetic.
template <class Backend>
struct LinearProblem {
  const LinearTypes types;
  at::Tensor input, weight, bias;  // (tokens, width), (classes, width); (classes), in the type of the logits
  typename Backend::Target target;
  LinearPlan plan;

  LinearProblem(const CrossEntropyOptions& options, const at::Tensor& hidden, const at::Tensor& layer,
                const at::Tensor& classes, const OptionalTensor& layer_bias, const OptionalTensor& class_weight,
                int64_t chunk, bool with_gradient)
      : types(Backend::types_of(hidden, layer)),
        input(hidden.reshape({-1, layer.size(1)}).to(types.operand)),
        weight(layer.to(types.operand)),
        bias(layer_bias.has_value() ? layer_bias->to(types.logits) : at::Tensor()),
        target(Backend::make_target(options, logit_sizes(hidden, layer), hidden.dim() - 1, classes, class_weight,
                                    types.result)),
        plan(Backend::plan_of(*this, chunk, with_gradient)) {}

  int64_t tokens() const { return input.size(0); }
  int64_t classes() const { return weight.size(0); }
  int64_t at_most_all(int64_t count) const {
    return std::min(std::max<int64_t>(count, 1), std::max<int64_t>(tokens(), 1));
  }
  bool is_lower() const { return types.operand != types.result; }
  bool is_in_place() const { return types.logits == types.operand; }
  // Gradients of logits for an upstream gradient of 1, or whose division is still to come, are what float16 holds.
  bool scales_late() const { return types.operand == at::kHalf; }

  at::Tensor empty_logits(int64_t rows, c10::ScalarType dtype) const {
    return Backend::empty_logits(std::min(rows, tokens()), classes(), dtype, input);
  }
};

// The gradients of the operands as they grow. Each is made when the first product fills it: until then its memory is
// for the logits.
template <class Backend>
class LinearGradientSums {
 public:
  LinearGradientSums(const LinearProblem<Backend>& problem, Wanted wanted, c10::ScalarType input_dtype)
      : problem_(problem), wanted_(wanted), input_dtype_(input_dtype) {
    wanted_[2] = wanted[2] && problem.bias.defined();
  }

  bool any() const { return wanted_[0] || wanted_[1] || wanted_[2]; }

  // Runs over all tokens: use(logits, first, gradient) is to fill the gradient of a chunk's logits, in their own memory
  // or beside it; without gradients, `gradient` is undefined.
  template <class Use>
  void for_each_chunk(Use use) {
    const LinearPlan& plan = problem_.plan;
    const int64_t tokens = problem_.tokens();
    const bool is_apart = any() && !problem_.is_in_place();
    at::Tensor buffer, all;
    if (is_apart && tokens > 0) all = problem_.empty_logits(plan.gradient_rows, problem_.types.operand);
    for (int64_t first = 0; first < tokens; first += plan.rows) {
      if (!buffer.defined()) buffer = problem_.empty_logits(plan.rows, problem_.types.logits);
      const int64_t count = std::min(plan.rows, tokens - first);
      const int64_t begin = first / plan.gradient_rows * plan.gradient_rows;
      const at::Tensor logits = buffer.narrow(0, 0, count);
      Backend::make_logits(logits, problem_.input.narrow(0, first, count), problem_.weight, problem_.bias);
      const at::Tensor gradient = is_apart ? all.narrow(0, first - begin, count) : any() ? logits : at::Tensor();
      use(logits, first, gradient);
      const int64_t next = first + count;
      if (!any() || (next < tokens && next % plan.gradient_rows != 0)) continue;
      if (is_apart) buffer = at::Tensor();  // its memory is for the products' results now
      add(is_apart ? all.narrow(0, 0, next - begin) : gradient, begin);
    }
  }

  // In the operands' shapes and types, multiplied by a number on the device, if there is one; empty where not wanted.
  LinearGradients finish(const at::Tensor& factor, const at::Tensor& input, const at::Tensor& weight,
                         const OptionalTensor& bias) const {
    const auto as = [&](int which, const at::Tensor& operand) {
      if (!wanted_[which]) return at::empty({0}, input.options());
      at::Tensor result = sums_[which];
      if (!result.defined()) return at::zeros(operand.sizes(), operand.options());  // of no tokens
      if (factor.defined()) {
        result = at::empty(result.sizes(), operand.options());
        at::mul_out(result, sums_[which], factor);
      }
      return result.reshape(operand.sizes()).to(operand.scalar_type());
    };
    return {as(0, input), as(1, weight), bias.has_value() ? as(2, *bias) : at::empty({0}, input.options())};
  }

 private:
  const LinearProblem<Backend>& problem_;
  Wanted wanted_;
  const c10::ScalarType input_dtype_;
  at::Tensor sums_[3];  // of input, weight and bias

  void add(const at::Tensor& gradient, int64_t first) {
    const LinearTypes& types = problem_.types;
    const int64_t count = gradient.size(0);
    const auto sum_of = [&](int which, const at::Tensor& like, c10::ScalarType dtype) {
      if (!sums_[which].defined()) sums_[which] = Backend::empty(like.sizes(), dtype, like);
      return sums_[which];
    };
    if (wanted_[0]) {
      // No sum over chunks: rounded once.
      const bool is_final = !problem_.scales_late() && (input_dtype_ == types.operand || input_dtype_ == types.result);
      const at::Tensor all = sum_of(0, problem_.input, is_final ? input_dtype_ : types.result);
      product(all.narrow(0, first, count), gradient, problem_.weight);
    }
    if (wanted_[1]) {
      const at::Tensor sum = sum_of(1, problem_.weight, problem_.plan.one_product ? types.operand : types.result);
      const at::Tensor rows = problem_.input.narrow(0, first, count);
      first == 0 ? product(sum, gradient.t(), rows) : add_product(sum, gradient.t(), rows);
    }
    if (wanted_[2]) {
      at::Tensor sum = sum_of(2, problem_.bias, types.result);
      first == 0 ? at::sum_out(sum, gradient, 0, false, types.result) : sum.add_(gradient.sum(0, false, types.result));
    }
  }
};

// Loss, z-loss, log-sum-exp, and the gradients for an upstream gradient of 1, as far as they are wanted.
template <class Backend>
LinearOutputs linear_forward(const CrossEntropyOptions& options, const at::Tensor& input, const at::Tensor& weight,
                             const at::Tensor& target, const OptionalTensor& bias, const OptionalTensor& class_weight,
                             int64_t chunk, Wanted wanted) {
  check_operands(input, weight, target, bias, class_weight);
  const typename Backend::Guard on(input);
  const bool with_gradient = wanted[0] || wanted[1] || wanted[2];
  TORCH_CHECK(options.reduction != Reduction::kNone || !with_gradient,
              "gradients come with the forward pass only for a loss that is reduced");
  const LinearProblem<Backend> problem(options, input, weight, target, bias, class_weight, chunk, with_gradient);
  LinearGradientSums<Backend> gradients(problem, wanted, input.scalar_type());
  const bool defer = gradients.any() && problem.scales_late() && options.reduction == Reduction::kMean;
  typename Backend::Loss loss(problem, on);
  loss.start();
  if (gradients.any()) loss.count(defer);
  gradients.for_each_chunk([&](const at::Tensor& logits, int64_t first, const at::Tensor& gradient) {
    loss.forward(logits, first, gradient);
  });
  auto [reduced, z] = loss.finish();
  auto [of_input, of_weight, of_bias] =
      gradients.finish(defer ? loss.rest().to(problem.types.result) : at::Tensor(), input, weight, bias);
  return {std::move(reduced), std::move(z), loss.lse(), std::move(of_input), std::move(of_weight), std::move(of_bias)};
}

// The gradients for any upstream gradient, with the logits computed again.
template <class Backend>
LinearGradients linear_backward(const CrossEntropyOptions& options, const at::Tensor& upstream, const at::Tensor& input,
                                const at::Tensor& weight, const at::Tensor& target, const OptionalTensor& bias,
                                const OptionalTensor& class_weight, const at::Tensor& lse, int64_t chunk,
                                Wanted wanted) {
  check_operands(input, weight, target, bias, class_weight);
  check_backward(upstream, input, lse, options.reduction);
  const typename Backend::Guard on(input);
  const LinearProblem<Backend> problem(options, input, weight, target, bias, class_weight, chunk, true);
  LinearGradientSums<Backend> gradients(problem, wanted, input.scalar_type());
  const bool at_end = problem.scales_late() && options.reduction != Reduction::kNone;
  const bool defer = at_end && options.reduction == Reduction::kMean;
  typename Backend::Loss loss(problem, on);
  loss.resume(lse);
  loss.count(defer);
  gradients.for_each_chunk([&](const at::Tensor& logits, int64_t first, const at::Tensor& gradient) {
    if (gradient.defined()) loss.backward(logits, first, at_end ? at::Tensor() : upstream, gradient);
  });
  at::Tensor factor;
  if (at_end) factor = (defer ? upstream.to(problem.types.result) * loss.rest() : upstream).to(problem.types.result);
  return gradients.finish(factor, input, weight, bias);
}

}  // namespace trainopt::aten
