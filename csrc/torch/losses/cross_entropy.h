// Cross-entropy over rows of logits on the CPU, below the operators.
#pragma once

#include <vector>

#include "cpu/losses.h"
#include "torch/losses/cross_entropy_target.h"

namespace trainopt::aten {

// A target whose numbers the host reads.
class HostTarget : public CrossEntropyTarget {
 public:
  // IndexError with value and position for a class out of range, beside CrossEntropyTarget's errors.
  HostTarget(c10::IntArrayRef input_sizes, int64_t class_dim, const at::Tensor& target,
             const std::optional<at::Tensor>& class_weight, const CrossEntropyOptions& options);

  // The task of all rows, and that of a chunk of them.
  cpu::CrossEntropyTask task(const Logits& logits) const { return complete(batch(logits)); }
  cpu::CrossEntropyTask chunk_task(const at::Tensor& logits, int64_t first) const {
    return complete(chunk(logits, first));
  }

  // The factors of the loss and the lse of rows [first, first + count) in the gradient, for upstream gradients of the
  // loss.
  void scales(const at::Tensor& upstream, const LogSumExp& lse, int64_t first, int64_t count,
              std::vector<double>* loss_scale, std::vector<double>* lse_scale) const;

  // The loss and the z-loss of all rows, reduced.
  std::pair<at::Tensor, at::Tensor> reduce(const std::vector<double>& loss, const LogSumExp& lse,
                                           c10::IntArrayRef shape, const at::TensorOptions& options) const;

 private:
  double total_weight_;
  double denominator_, row_count_;  // what each row's loss and each row's z-loss are divided by in the mean

  cpu::CrossEntropyTask complete(const CrossEntropyBatch& batch) const;
  bool is_counted(int64_t row) const {
    return !labels_.defined() || labels_.const_data_ptr<int64_t>()[row] != options_.ignore_index;
  }
};

// Runs `use(first, last)` over rows, in parallel.
void for_each_row(int64_t rows, int64_t classes, const std::function<void(int64_t, int64_t)>& use);

}  // namespace trainopt::aten
