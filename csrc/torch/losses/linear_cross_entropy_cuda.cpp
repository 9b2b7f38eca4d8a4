// Linear cross-entropy on CUDA devices: the products are cuBLAS's, by way of torch, and what lies between them is ours.
//
// Where the weight is of 16 bits, so are the products' operands, the logits' gradient among them, and tensor cores take
// the products, which add in float32. The logits are bfloat16 where hidden states and weight are, as those of a linear
// layer, and their gradient takes their memory; under autocast and in float16 they are float32. The weight's gradient
// is made in the weight's own type where one product makes it, and summed in float32 where several do. In float16 a
// mean's division is left to the end, so that the logits' gradient is neither too small nor too large for it. Otherwise
// all is float32 (torch's setting for TF32 holds) or float64. Nothing waits for the device.
#if defined(TRAINOPT_WITH_CUDA)

#include <torch/library.h>

#include "torch/losses/cross_entropy_cuda.h"
#include "torch/losses/cross_entropy_options.h"
#include "torch/losses/linear_cross_entropy.h"

namespace trainopt::aten {
namespace {

constexpr int64_t ceiling(int64_t a, int64_t b) { return a / b + (a % b != 0); }

int64_t bytes_of(c10::ScalarType type) { return static_cast<int64_t>(c10::elementSize(type)); }

struct Device {
  using Target = CrossEntropyTarget;
  using Problem = LinearProblem<Device>;

  struct Guard : OnDevice {
    explicit Guard(const at::Tensor& tensor) : OnDevice(tensor.device()) {}
  };

  static LinearTypes types_of(const at::Tensor& input, const at::Tensor& weight) {
    const c10::ScalarType operand = weight.scalar_type(), result = operand == at::kDouble ? at::kDouble : at::kFloat;
    return {operand, operand == at::kBFloat16 && input.scalar_type() == operand ? operand : result, result};
  }

  static CrossEntropyTarget make_target(const CrossEntropyOptions& options, c10::IntArrayRef sizes, int64_t class_dim,
                                        const at::Tensor& target, const OptionalTensor& class_weight,
                                        c10::ScalarType weight_dtype) {
    return CrossEntropyTarget(sizes, class_dim, target, class_weight, weight_dtype, options);
  }

  // `chunk`: tokens whose logits exist at one time; 0: as many as make the products fast.
  //
  // The gradient of the logits of all tokens is kept as long as that is no more memory than a sum in float32 of the
  // weight's gradient takes, beside the gradient itself: as the logits of three times as many tokens as it is wide.
  static LinearPlan plan_of(const Problem& problem, int64_t chunk, bool with_gradient) {
    constexpr int64_t kLogitBytes = int64_t{128} << 20, kFast = 4096, kMultiple = 256;
    const int64_t width = problem.weight.size(1), tokens = problem.tokens();
    LinearPlan plan{};
    if (chunk > 0) {
      plan.rows = plan.gradient_rows = problem.at_most_all(chunk);
    } else {
      plan.rows = kLogitBytes / std::max<int64_t>(problem.classes() * bytes_of(problem.types.logits), 1);
      if (plan.rows > kMultiple) plan.rows = plan.rows / kMultiple * kMultiple;
      plan.rows = plan.gradient_rows = problem.at_most_all(plan.rows);
      if (problem.is_lower() && with_gradient) {
        const bool keeps_all = !problem.scales_late() && tokens <= std::max(2 * kFast, 3 * width);
        plan.gradient_rows = problem.at_most_all(keeps_all ? tokens : std::max(kFast, width));
        if (problem.is_in_place()) plan.rows = plan.gradient_rows;
        // A whole number of chunks, so that none is broken off.
        plan.gradient_rows = problem.at_most_all(ceiling(plan.gradient_rows, plan.rows) * plan.rows);
      }
    }
    plan.one_product = problem.is_lower() && !problem.scales_late() && plan.gradient_rows >= tokens;
    return plan;
  }

  static at::Tensor empty(c10::IntArrayRef sizes, c10::ScalarType dtype, const at::Tensor& like) {
    return at::empty(sizes, like.options().dtype(dtype));
  }
  // Rows begin where products are fast, at multiples of 16 bytes: a vocabulary such as GPT-2's is odd.
  static at::Tensor empty_logits(int64_t rows, int64_t classes, c10::ScalarType dtype, const at::Tensor& like) {
    const int64_t multiple = 16 / bytes_of(dtype);
    return empty({rows, ceiling(classes, multiple) * multiple}, dtype, like).narrow(1, 0, classes);
  }

  static void make_logits(const at::Tensor& out, const at::Tensor& rows, const at::Tensor& weight,
                          const at::Tensor& bias) {
    if (!bias.defined()) return product(out, rows, weight.t());
    out.copy_(bias.expand_as(out));
    add_product(out, rows, weight.t());
  }

  class Loss {
   public:
    Loss(const Problem& problem, const Guard& on)
        : target_(problem.target),
          dtype_(problem.types.result),
          work_(target_, problem.input.device(), dtype_, problem.plan.rows, on.stream) {}

    void start() { work_.start(dtype_); }
    void resume(const at::Tensor& lse) { work_.lse = lse; }
    void count(bool defer) { work_.count(defer); }
    at::Tensor lse() const { return work_.lse; }
    at::Tensor rest() const { return work_.rest(); }

    void forward(const at::Tensor& logits, int64_t first, const at::Tensor& gradient) {
      const CrossEntropyBatch batch = target_.chunk(logits, first);
      if (!gradient.defined()) return work_.forward(batch, first, logits.size(0));
      const Rows rows = Logits::of_matrix(gradient).rows;
      work_.forward(batch, first, logits.size(0), &rows);
    }

    void backward(const at::Tensor& logits, int64_t first, const at::Tensor& upstream, const at::Tensor& gradient) {
      const int64_t count = logits.size(0);
      const bool by_row = upstream.defined() && target_.options().reduction == Reduction::kNone;
      const at::Tensor of_chunk = by_row ? upstream.reshape({-1}).narrow(0, first, count) : upstream;
      work_.backward(target_.chunk(logits, first), first, count, of_chunk, Logits::of_matrix(gradient).rows);
    }

    std::pair<at::Tensor, at::Tensor> finish() { return work_.finish(); }

   private:
    const CrossEntropyTarget& target_;
    const c10::ScalarType dtype_;
    DeviceCrossEntropy work_;
  };
};

}  // namespace

TORCH_LIBRARY_IMPL(trainopt, TRAINOPT_CUDA_KEY, m) {
  m.impl("linear_cross_entropy_forward", TRAINOPT_UNPACK_OPTIONS(linear_forward<Device>));
  m.impl("linear_cross_entropy_backward", TRAINOPT_UNPACK_OPTIONS(linear_backward<Device>));
}

}  // namespace trainopt::aten

#endif
