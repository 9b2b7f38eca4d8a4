// Linear cross-entropy on CUDA devices: the products are cuBLAS's, by way of torch, and what lies between them is ours.
//
// Where the weight is of 16 bits, so are the products' operands, the logits' gradient among them, and tensor cores take
// the products; their results are float32, and so is the sum of the weight's gradient over chunks. A mean's division is
// left to the end then, so that the logits' gradient is neither too small nor too large for 16 bits. Otherwise all is
// float32 (torch's setting for TF32 holds) or float64. Nothing waits for the device.
#if defined(TRAINOPT_WITH_CUDA)

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "python/cross_entropy_cuda.h"
#include "python/linear_cross_entropy.h"

namespace trainopt::python {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// a @ b, and out + a @ b, in the type of `out`.
void product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  at::Tensor result = out;
  out.scalar_type() == a.scalar_type() ? at::mm_out(result, a, b) : at::mm_out(result, a, b, out.scalar_type());
}
void add_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  at::Tensor result = out;
  out.scalar_type() == a.scalar_type() ? at::addmm_out(result, out, a, b)
                                       : at::addmm_out(result, out, a, b, out.scalar_type());
}

// One call: its operands with all leading dimensions in one, in the types of the arithmetic.
struct Problem {
  at::Tensor input, weight, bias;  // (tokens, width), (classes, width); (classes), in the type of the results
  c10::ScalarType operand, result;
  CrossEntropyTarget target;
  int64_t chunk;  // tokens

  Problem(const at::Tensor& hidden, const at::Tensor& layer, const at::Tensor& classes,
          const OptionalTensor& layer_bias, const OptionalTensor& class_weight, const CrossEntropyOptions& options,
          int64_t most_tokens)
      : operand(layer.scalar_type()),
        result(operand == at::kDouble ? at::kDouble : at::kFloat),
        target(logit_sizes(hidden, layer), hidden.dim() - 1, classes, class_weight, result, options) {
    input = hidden.reshape({-1, layer.size(1)}).to(operand);
    weight = layer;
    if (layer_bias.has_value()) bias = layer_bias->to(result);
    chunk = std::max<int64_t>(std::min(most_tokens, input.size(0)), 1);
  }

  int64_t tokens() const { return input.size(0); }
  bool is_lower() const { return operand != result; }

  at::Tensor memory(int64_t rows, c10::ScalarType dtype) const {
    return at::empty({rows, weight.size(0)}, input.options().dtype(dtype));
  }

  // Runs over the tokens by chunks: use(batch, first, count, logits).
  template <class Use>
  void for_each_chunk(Use use) const {
    if (tokens() == 0) return;
    const at::Tensor buffer = memory(chunk, result);
    for (int64_t first = 0; first < tokens(); first += chunk) {
      const int64_t count = std::min(chunk, tokens() - first);
      const at::Tensor logits = buffer.narrow(0, 0, count), rows = input.narrow(0, first, count);
      if (bias.defined()) {
        logits.copy_(bias.expand_as(logits));
        add_product(logits, rows, weight.t());
      } else {
        product(logits, rows, weight.t());
      }
      use(target.chunk(logits, first), first, count, logits);
    }
  }
};

// The gradients of the operands as they grow, in the type of the results; those that are not wanted are undefined.
class Gradients {
 public:
  Gradients(const Problem& problem, std::array<bool, 3> wanted) : problem_(problem) {
    const auto memory = [&](const at::Tensor& like) {
      const at::TensorOptions options = like.options().dtype(problem.result);
      // The first chunk fills it.
      return problem.tokens() == 0 ? at::zeros(like.sizes(), options) : at::empty(like.sizes(), options);
    };
    if (wanted[0]) input_ = memory(problem.input);
    if (wanted[1]) weight_ = memory(problem.weight);
    if (wanted[2] && problem.bias.defined()) bias_ = memory(problem.bias);
    if (any() && problem.is_lower()) lower_ = problem.memory(problem.chunk, problem.operand);
  }

  bool any() const { return input_.defined() || weight_.defined() || bias_.defined(); }

  // Where the gradient of a chunk's logits goes: over the logits, or into the products' own type.
  at::Tensor of_logits(const at::Tensor& logits) const {
    return lower_.defined() ? lower_.narrow(0, 0, logits.size(0)) : logits;
  }

  void add(const at::Tensor& of_logits, int64_t first) {
    const int64_t count = of_logits.size(0);
    if (input_.defined()) product(input_.narrow(0, first, count), of_logits, problem_.weight);
    if (weight_.defined()) {
      const at::Tensor rows = problem_.input.narrow(0, first, count);
      first == 0 ? product(weight_, of_logits.t(), rows) : add_product(weight_, of_logits.t(), rows);
    }
    if (bias_.defined()) {
      first == 0 ? at::sum_out(bias_, of_logits, 0, false, problem_.result)
                 : bias_.add_(of_logits.sum(0, false, problem_.result));
    }
  }

  // In the operands' shapes and types, multiplied by a number on the device, if there is one; empty where not wanted.
  std::tuple<at::Tensor, at::Tensor, at::Tensor> finish(const at::Tensor& factor, const at::Tensor& input,
                                                        const at::Tensor& weight, const OptionalTensor& bias) const {
    const auto as = [&](const at::Tensor& gradient, const at::Tensor& operand) {
      if (!gradient.defined()) return at::empty({0}, input.options());
      at::Tensor result = gradient;
      if (factor.defined()) {
        result = at::empty(gradient.sizes(), operand.options());
        at::mul_out(result, gradient, factor);
      }
      return result.reshape(operand.sizes()).to(operand.scalar_type());
    };
    return {as(input_, input), as(weight_, weight),
            bias.has_value() ? as(bias_, *bias) : at::empty({0}, input.options())};
  }

 private:
  const Problem& problem_;
  at::Tensor input_, weight_, bias_, lower_;
};

// Loss, z-loss, lse, and the gradients for an upstream gradient of 1, as far as they are wanted.
Six forward(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target, const OptionalTensor& bias,
            const OptionalTensor& class_weight, int64_t reduction, int64_t ignore_index, double label_smoothing,
            double z_loss, double softcap, bool empty_is_zero, int64_t chunk, std::array<bool, 3> wanted) {
  check_operands(input, weight, target, bias, class_weight, reduction);
  const OnDevice on(input.device());
  const bool with_gradient = wanted[0] || wanted[1] || wanted[2];
  TORCH_CHECK(reduction != kNone || !with_gradient,
              "gradients come with the forward pass only for a loss that is reduced");
  const Problem problem(input, weight, target, bias, class_weight,
                        {reduction, ignore_index, label_smoothing, z_loss, softcap, empty_is_zero}, chunk);
  DeviceCrossEntropy work(problem.target, input.device(), problem.result, problem.chunk, on.stream);
  Gradients gradients(problem, wanted);
  const bool defer = gradients.any() && problem.is_lower() && reduction == kMean;
  work.start(problem.result);
  if (gradients.any()) work.count(defer);
  problem.for_each_chunk([&](const CrossEntropyBatch& batch, int64_t first, int64_t count, const at::Tensor& logits) {
    work.forward(batch, first, count);
    if (!gradients.any()) return;
    const at::Tensor of_logits = gradients.of_logits(logits);
    work.backward(batch, first, count, at::Tensor(), Logits::of_matrix(of_logits).rows);
    gradients.add(of_logits, first);
  });
  auto [loss, z] = work.finish();
  auto [of_input, of_weight, of_bias] =
      gradients.finish(defer ? work.rest().to(problem.result) : at::Tensor(), input, weight, bias);
  return {std::move(loss),     std::move(z),         std::move(work.lse),
          std::move(of_input), std::move(of_weight), std::move(of_bias)};
}

// The gradients for any upstream gradient, with the logits computed again.
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& upstream, const at::Tensor& input,
                                                        const at::Tensor& weight, const at::Tensor& target,
                                                        const OptionalTensor& bias, const OptionalTensor& class_weight,
                                                        const at::Tensor& lse, int64_t reduction, int64_t ignore_index,
                                                        double label_smoothing, double z_loss, double softcap,
                                                        bool empty_is_zero, int64_t chunk, std::array<bool, 3> wanted) {
  check_operands(input, weight, target, bias, class_weight, reduction);
  check_backward(upstream, input, lse, reduction);
  const OnDevice on(input.device());
  const Problem problem(input, weight, target, bias, class_weight,
                        {reduction, ignore_index, label_smoothing, z_loss, softcap, empty_is_zero}, chunk);
  DeviceCrossEntropy work(problem.target, input.device(), problem.result, problem.chunk, on.stream);
  work.lse = lse;
  Gradients gradients(problem, wanted);
  // One upstream gradient is multiplied at the end, where that is left to do for a mean anyway.
  const bool at_end = problem.is_lower() && reduction != kNone, defer = at_end && reduction == kMean;
  work.count(defer);
  const at::Tensor each = reduction == kNone ? upstream.reshape({-1}) : upstream;
  problem.for_each_chunk([&](const CrossEntropyBatch& batch, int64_t first, int64_t count, const at::Tensor& logits) {
    const at::Tensor of_logits = gradients.of_logits(logits);
    const at::Tensor above = at_end ? at::Tensor() : reduction == kNone ? each.narrow(0, first, count) : each;
    work.backward(batch, first, count, above, Logits::of_matrix(of_logits).rows);
    gradients.add(of_logits, first);
  });
  at::Tensor factor;
  if (at_end) factor = defer ? upstream.to(problem.result) * work.rest() : upstream;
  return gradients.finish(factor.defined() ? factor.to(problem.result) : factor, input, weight, bias);
}

}  // namespace

TORCH_LIBRARY_IMPL(trainopt, TRAINOPT_CUDA_KEY, m) {
  m.impl("linear_cross_entropy_forward", forward);
  m.impl("linear_cross_entropy_backward", backward);
}

}  // namespace trainopt::python

#endif
