// Cross-entropy over rows of logits, below the operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "cpu/losses.h"
#include "python/losses.h"

namespace trainopt::python {

// Logits, or what has their shape, as the engine walks them.
struct Logits {
  at::Tensor tensor;  // holds the memory: what was given, or a copy in an order that the engine knows
  cpu::Rows rows;
  int64_t inner;

  static Logits of(const at::Tensor& input, int64_t class_dim);
  // With this very `inner`.
  static Logits of(const at::Tensor& input, int64_t class_dim, int64_t inner);
};

struct CrossEntropyOptions {
  int64_t reduction, ignore_index;
  double label_smoothing, z_loss, softcap;
  bool empty_is_zero;
};

// The target of a batch: a class or a distribution for each row, and weights of the classes.
class CrossEntropyTarget {
 public:
  // `rows` x `classes` logits. IndexError with value and position for a class out of range; ValueError for shapes that
  // do not match. `input_sizes` and `class_dim` are those of the logits that the caller was given.
  CrossEntropyTarget(c10::IntArrayRef input_sizes, int64_t class_dim, const at::Tensor& target,
                     const std::optional<at::Tensor>& class_weight, const CrossEntropyOptions& options);

  int64_t rows() const { return rows_; }
  // What each row's loss and each row's z-loss are divided by under the reduction.
  double denominator() const { return denominator_; }
  double row_count() const { return row_count_; }

  // The task of all rows.
  cpu::CrossEntropyTask task(const Logits& logits);
  // That of rows [first, first + logits.size(0)) of a target whose logits are given by rows, a chunk at a time.
  cpu::CrossEntropyTask chunk_task(const at::Tensor& logits, int64_t first) const;

  // The factors of the loss and the lse of rows [first, first + count) in the gradient, for upstream gradients of the
  // loss.
  void scales(const at::Tensor& upstream, const double* lse, int64_t first, int64_t count,
              std::vector<double>* loss_scale, std::vector<double>* lse_scale) const;

  // The loss and the z-loss of all rows, reduced.
  std::pair<at::Tensor, at::Tensor> reduce(const std::vector<double>& loss, const double* lse, c10::IntArrayRef shape,
                                           const at::TensorOptions& options) const;

 private:
  CrossEntropyOptions options_;
  int64_t rows_, classes_;
  int64_t class_dim_;
  at::Tensor labels_, probabilities_, weight_;  // int64, any floating type, float64
  at::Tensor alike_;                            // the probabilities in the order of the logits
  double total_weight_, denominator_, row_count_;

  cpu::CrossEntropyTask bare_task() const;
  bool is_counted(int64_t row) const {
    return !labels_.defined() || labels_.const_data_ptr<int64_t>()[row] != options_.ignore_index;
  }
};

// Runs `use(first, last)` over rows, in parallel.
void for_each_row(int64_t rows, int64_t classes, const std::function<void(int64_t, int64_t)>& use);

}  // namespace trainopt::python
