// Linear cross-entropy on CUDA devices: the products are cuBLAS's, by way of torch, and what lies between them is ours.
//
// Where the weight is of 16 bits, so are the products' operands, the logits' gradient among them, and tensor cores take
// the products, which add in float32. The logits are bfloat16 where hidden states and weight are, as those of a linear
// layer, and their gradient takes their memory; under autocast and in float16 they are float32. The weight's gradient
// is made in the weight's own type where one product makes it, and summed in float32 where several do. In float16 a
// mean's division is left to the end, so that the logits' gradient is neither too small nor too large for it. Otherwise
// all is float32 (torch's setting for TF32 holds) or float64. Nothing waits for the device.
#if defined(TRAINOPT_WITH_CUDA)

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "torch/losses/cross_entropy_cuda.h"
#include "torch/losses/linear_cross_entropy.h"

namespace trainopt::aten {
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

constexpr int64_t ceiling(int64_t a, int64_t b) { return a / b + (a % b != 0); }

int64_t bytes_of(c10::ScalarType type) { return static_cast<int64_t>(c10::elementSize(type)); }

// How the tokens are gone through.
struct Plan {
  c10::ScalarType logits;  // the type that they are made in
  int64_t rows;            // tokens whose logits exist at one time
  int64_t slopes;          // tokens whose logits' gradient is kept: the same where it takes the logits' memory
  bool one_product;        // makes the weight's gradient
};

// One call: its operands with all leading dimensions in one, in the types of the arithmetic.
struct Problem {
  at::Tensor input, weight, bias;  // (tokens, width), (classes, width); (classes), in the type of the logits
  c10::ScalarType operand, result;
  CrossEntropyTarget target;
  Plan plan;

  Problem(const at::Tensor& hidden, const at::Tensor& layer, const at::Tensor& classes,
          const OptionalTensor& layer_bias, const OptionalTensor& class_weight, const CrossEntropyOptions& options,
          int64_t chunk, bool with_gradient)
      : operand(layer.scalar_type()),
        result(operand == at::kDouble ? at::kDouble : at::kFloat),
        target(logit_sizes(hidden, layer), hidden.dim() - 1, classes, class_weight, result, options) {
    input = hidden.reshape({-1, layer.size(1)}).to(operand);
    weight = layer;
    plan.logits = operand == at::kBFloat16 && hidden.scalar_type() == operand ? operand : result;
    if (layer_bias.has_value()) bias = layer_bias->to(plan.logits);
    make_plan(chunk, with_gradient);
  }

  int64_t tokens() const { return input.size(0); }
  bool is_lower() const { return operand != result; }
  bool is_in_place() const { return plan.logits == operand; }
  // Gradients of logits for an upstream gradient of 1, or whose division is still to come, are what float16 holds.
  bool scales_late() const { return operand == at::kHalf; }

  // Rows begin where products are fast, at multiples of 16 bytes: a vocabulary such as GPT-2's is odd.
  at::Tensor memory(int64_t rows, c10::ScalarType dtype) const {
    const int64_t classes = weight.size(0), multiple = 16 / bytes_of(dtype);
    return at::empty({rows, ceiling(classes, multiple) * multiple}, input.options().dtype(dtype)).narrow(1, 0, classes);
  }

  // Fills the logits of tokens [first, first + logits.size(0)).
  void make_logits(const at::Tensor& logits, int64_t first) const {
    const at::Tensor rows = input.narrow(0, first, logits.size(0));
    if (bias.defined()) {
      logits.copy_(bias.expand_as(logits));
      add_product(logits, rows, weight.t());
    } else {
      product(logits, rows, weight.t());
    }
  }

 private:
  // `chunk`: tokens whose logits exist at one time; 0: as many as make the products fast.
  //
  // The gradient of the logits of all tokens is kept as long as that is no more memory than a sum in float32 of the
  // weight's gradient takes, beside the gradient itself: as the logits of three times as many tokens as it is wide.
  void make_plan(int64_t chunk, bool with_gradient) {
    constexpr int64_t kLogitBytes = int64_t{128} << 20, kFast = 4096, kMultiple = 256;
    const int64_t classes = weight.size(0), width = weight.size(1);
    const auto at_most_all = [&](int64_t count) {
      return std::min(std::max<int64_t>(count, 1), std::max<int64_t>(tokens(), 1));
    };
    if (chunk > 0) {
      plan.rows = plan.slopes = at_most_all(chunk);
    } else {
      plan.rows = kLogitBytes / std::max<int64_t>(classes * bytes_of(plan.logits), 1);
      if (plan.rows > kMultiple) plan.rows = plan.rows / kMultiple * kMultiple;
      plan.rows = plan.slopes = at_most_all(plan.rows);
      if (is_lower() && with_gradient) {
        const bool keeps_all = !scales_late() && tokens() <= std::max(2 * kFast, 3 * width);
        plan.slopes = at_most_all(keeps_all ? tokens() : std::max(kFast, width));
        if (is_in_place()) plan.rows = plan.slopes;
        plan.slopes = at_most_all(ceiling(plan.slopes, plan.rows) * plan.rows);  // so that no chunk is broken off
      }
    }
    plan.one_product = is_lower() && !scales_late() && plan.slopes >= tokens();
  }
};

// The gradients of the operands as they grow. Each is made when the first product fills it: until then its memory is
// for the logits.
class Gradients {
 public:
  Gradients(const Problem& problem, std::array<bool, 3> wanted, c10::ScalarType input_dtype)
      : problem_(problem), wanted_(wanted), input_dtype_(input_dtype) {
    wanted_[2] = wanted[2] && problem.bias.defined();
  }

  bool any() const { return wanted_[0] || wanted_[1] || wanted_[2]; }

  // Runs over all tokens: use(batch, first, count, slopes) is to fill the gradient of a chunk's logits, in their own
  // memory or beside it; without gradients, slopes is undefined.
  template <class Use>
  void for_each_chunk(Use use) {
    const Plan& plan = problem_.plan;
    const int64_t tokens = problem_.tokens();
    const bool is_apart = any() && !problem_.is_in_place();
    at::Tensor buffer, all;
    if (is_apart && tokens > 0) all = problem_.memory(std::min(plan.slopes, tokens), problem_.operand);
    for (int64_t first = 0; first < tokens; first += plan.rows) {
      if (!buffer.defined()) buffer = problem_.memory(std::min(plan.rows, tokens), plan.logits);
      const int64_t count = std::min(plan.rows, tokens - first), begin = first / plan.slopes * plan.slopes;
      const at::Tensor logits = buffer.narrow(0, 0, count);
      problem_.make_logits(logits, first);
      const at::Tensor slopes = is_apart ? all.narrow(0, first - begin, count) : any() ? logits : at::Tensor();
      use(problem_.target.chunk(logits, first), first, count, slopes);
      const int64_t next = first + count;
      if (!any() || (next < tokens && next % plan.slopes != 0)) continue;
      if (is_apart) buffer = at::Tensor();  // its memory is for the products' results now
      add(is_apart ? all.narrow(0, 0, next - begin) : slopes, begin);
    }
  }

  // In the operands' shapes and types, multiplied by a number on the device, if there is one; empty where not wanted.
  std::tuple<at::Tensor, at::Tensor, at::Tensor> finish(const at::Tensor& factor, const at::Tensor& input,
                                                        const at::Tensor& weight, const OptionalTensor& bias) const {
    const auto as = [&](int which, const at::Tensor& operand) {
      if (!wanted_[which]) return at::empty({0}, input.options());
      at::Tensor result = gradients_[which];
      if (!result.defined()) return at::zeros(operand.sizes(), operand.options());  // of no tokens
      if (factor.defined()) {
        result = at::empty(result.sizes(), operand.options());
        at::mul_out(result, gradients_[which], factor);
      }
      return result.reshape(operand.sizes()).to(operand.scalar_type());
    };
    return {as(0, input), as(1, weight), bias.has_value() ? as(2, *bias) : at::empty({0}, input.options())};
  }

 private:
  const Problem& problem_;
  std::array<bool, 3> wanted_;
  const c10::ScalarType input_dtype_;
  at::Tensor gradients_[3];  // of input, weight and bias

  void add(const at::Tensor& slopes, int64_t first) {
    const int64_t count = slopes.size(0);
    const auto of = [&](int which, const at::Tensor& like, c10::ScalarType dtype) {
      at::Tensor& gradient = gradients_[which];
      if (!gradient.defined()) gradient = at::empty(like.sizes(), like.options().dtype(dtype));
      return gradient;
    };
    if (wanted_[0]) {
      // No sum over chunks: rounded once.
      const bool is_final =
          !problem_.scales_late() && (input_dtype_ == problem_.operand || input_dtype_ == problem_.result);
      const at::Tensor all = of(0, problem_.input, is_final ? input_dtype_ : problem_.result);
      product(all.narrow(0, first, count), slopes, problem_.weight);
    }
    if (wanted_[1]) {
      const at::Tensor sum = of(1, problem_.weight, problem_.plan.one_product ? problem_.operand : problem_.result);
      const at::Tensor rows = problem_.input.narrow(0, first, count);
      first == 0 ? product(sum, slopes.t(), rows) : add_product(sum, slopes.t(), rows);
    }
    if (wanted_[2]) {
      at::Tensor sum = of(2, problem_.bias, problem_.result);
      first == 0 ? at::sum_out(sum, slopes, 0, false, problem_.result)
                 : sum.add_(slopes.sum(0, false, problem_.result));
    }
  }
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
                        {reduction, ignore_index, label_smoothing, z_loss, softcap, empty_is_zero}, chunk,
                        with_gradient);
  DeviceCrossEntropy work(problem.target, input.device(), problem.result, problem.plan.rows, on.stream);
  Gradients gradients(problem, wanted, input.scalar_type());
  const bool defer = gradients.any() && problem.scales_late() && reduction == kMean;
  work.start(problem.result);
  if (gradients.any()) work.count(defer);
  gradients.for_each_chunk([&](const CrossEntropyBatch& batch, int64_t first, int64_t count, const at::Tensor& slopes) {
    if (!slopes.defined()) return work.forward(batch, first, count);
    const Rows rows = Logits::of_matrix(slopes).rows;
    work.forward(batch, first, count, &rows);
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
                        {reduction, ignore_index, label_smoothing, z_loss, softcap, empty_is_zero}, chunk, true);
  DeviceCrossEntropy work(problem.target, input.device(), problem.result, problem.plan.rows, on.stream);
  work.lse = lse;
  Gradients gradients(problem, wanted, input.scalar_type());
  const bool at_end = problem.scales_late() && reduction != kNone, defer = at_end && reduction == kMean;
  work.count(defer);
  const at::Tensor each = reduction == kNone ? upstream.reshape({-1}) : upstream;
  gradients.for_each_chunk([&](const CrossEntropyBatch& batch, int64_t first, int64_t count, const at::Tensor& slopes) {
    if (!slopes.defined()) return;
    const at::Tensor above = at_end ? at::Tensor() : reduction == kNone ? each.narrow(0, first, count) : each;
    work.backward(batch, first, count, above, Logits::of_matrix(slopes).rows);
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

}  // namespace trainopt::aten

#endif
