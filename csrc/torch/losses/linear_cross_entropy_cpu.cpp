// Linear cross-entropy on the CPU: all is float32, or float64 for float64 operands.
#include <torch/library.h>

#include "torch/losses/cross_entropy.h"
#include "torch/losses/cross_entropy_options.h"
#include "torch/losses/fresh_memory.h"
#include "torch/losses/linear_cross_entropy.h"

namespace trainopt::aten {
namespace {

struct Host {
  using Target = HostTarget;
  using Problem = LinearProblem<Host>;

  struct Guard {
    explicit Guard(const at::Tensor&) {}
  };

  static LinearTypes types_of(const at::Tensor& input, const at::Tensor&) {
    const c10::ScalarType dtype = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    return {dtype, dtype, dtype};
  }

  static HostTarget make_target(const CrossEntropyOptions& options, c10::IntArrayRef sizes, int64_t class_dim,
                                const at::Tensor& target, const OptionalTensor& class_weight, c10::ScalarType) {
    return HostTarget(sizes, class_dim, target, class_weight, options);
  }

  static LinearPlan plan_of(const Problem& problem, int64_t chunk, bool) {
    const int64_t rows = problem.at_most_all(chunk);
    return {rows, rows, false};
  }

  static at::Tensor empty(c10::IntArrayRef sizes, c10::ScalarType dtype, const at::Tensor&) {
    return fresh(sizes, dtype);
  }
  static at::Tensor empty_logits(int64_t rows, int64_t classes, c10::ScalarType dtype, const at::Tensor&) {
    return fresh({rows, classes}, dtype);
  }

  static void make_logits(at::Tensor out, const at::Tensor& rows, const at::Tensor& weight, const at::Tensor& bias) {
    bias.defined() ? at::addmm_out(out, bias, rows, weight.t()) : at::mm_out(out, rows, weight.t());
  }

  class Loss {
   public:
    Loss(const Problem& problem, const Guard&) : problem_(problem) {}

    void start() {
      resume(empty_lse(problem_.tokens(), problem_.input.options()));
      losses_.resize(problem_.tokens());
    }
    void resume(const at::Tensor& lse) {
      lse_ = lse;
      of_rows_ = lse_in(lse, problem_.tokens());
    }
    void count(bool) {}  // HostTarget has done it
    at::Tensor lse() const { return lse_; }
    at::Tensor rest() const { return {}; }

    void forward(const at::Tensor& logits, int64_t first, const at::Tensor& gradient) {
      cpu::CrossEntropyTask task = problem_.target.chunk_task(logits, first);
      task.lse = of_rows_.from(first);
      task.loss = losses_.data() + first;
      run(cpu::cross_entropy_forward, task, logits.size(0));
      if (gradient.defined()) backward(logits, first, one_, gradient);
    }

    void backward(const at::Tensor& logits, int64_t first, const at::Tensor& upstream, const at::Tensor&) {
      cpu::CrossEntropyTask task = problem_.target.chunk_task(logits, first);
      std::vector<double> scale, lse_scale;
      problem_.target.scales(upstream, of_rows_, first, logits.size(0), &scale, &lse_scale);
      task.lse = of_rows_.from(first);
      task.scale = scale.data();
      task.lse_scale = lse_scale.data();
      task.gradient = task.logits;
      run(cpu::cross_entropy_backward, task, logits.size(0));
    }

    std::pair<at::Tensor, at::Tensor> finish() const {
      return problem_.target.reduce(losses_, of_rows_, problem_.target.row_sizes(), problem_.input.options());
    }

   private:
    const Problem& problem_;
    const at::Tensor one_ = at::ones({}, at::kDouble);
    at::Tensor lse_;
    LogSumExp of_rows_{};
    std::vector<double> losses_;

    template <class Kernel>
    void run(Kernel kernel, const cpu::CrossEntropyTask& task, int64_t rows) const {
      for_each_row(rows, problem_.classes(),
                   [&](int64_t begin, int64_t end) { kernel(problem_.types.result == at::kDouble, task, begin, end); });
    }
  };
};

}  // namespace

TORCH_LIBRARY_IMPL(trainopt, CPU, m) {
  m.impl("linear_cross_entropy_forward", TRAINOPT_UNPACK_OPTIONS(linear_forward<Host>));
  m.impl("linear_cross_entropy_backward", TRAINOPT_UNPACK_OPTIONS(linear_backward<Host>));
}

}  // namespace trainopt::aten
