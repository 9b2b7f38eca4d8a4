// What cross-entropy's operators have in common on every device: rows of logits as the engines walk them, and the
// target of a batch with all that can be said of it by its shape.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "losses/cross_entropy_batch.h"
#include "torch/losses/support.h"

namespace trainopt::aten {

// Logits, or what has their shape, as the engines walk them.
struct Logits {
  at::Tensor tensor;  // holds the memory: what was given, or a copy in an order that the engines know
  Rows rows;
  int64_t inner;

  static Logits of(const at::Tensor& input, int64_t class_dim);
  // With this very `inner`.
  static Logits of(const at::Tensor& input, int64_t class_dim, int64_t inner);
  // A matrix, row by row.
  static Logits of_matrix(const at::Tensor& matrix);
};

// The log-sum-exp of `rows` rows, (2, rows): memory for it, and what the engines see of it. ValueError for a tensor
// that is not such.
at::Tensor empty_lse(int64_t rows, const at::TensorOptions& options);
LogSumExp lse_in(const at::Tensor& tensor, int64_t rows);

// A class or a distribution for each row, and weights of the classes.
class CrossEntropyTarget {
 public:
  // ValueError for shapes that do not match. `input_sizes` and `class_dim` are those of the logits that the caller was
  // given; the weights are read as `weight_dtype`.
  CrossEntropyTarget(c10::IntArrayRef input_sizes, int64_t class_dim, const at::Tensor& target,
                     const std::optional<at::Tensor>& class_weight, c10::ScalarType weight_dtype,
                     const CrossEntropyOptions& options);

  int64_t rows() const { return rows_; }
  int64_t classes() const { return classes_; }
  const CrossEntropyOptions& options() const { return options_; }
  // The target's shape, without classes.
  const c10::DimVector& row_sizes() const { return row_sizes_; }

  // Of all rows; null without labels, and without weights.
  const int64_t* label_data() const { return labels_.defined() ? labels_.const_data_ptr<int64_t>() : nullptr; }
  const void* weight_data() const { return weight_.defined() ? weight_.const_data_ptr() : nullptr; }

  // With logits of all rows.
  CrossEntropyBatch batch(const Logits& logits) const;
  // Rows [first, first + logits.size(0)) of a target whose logits are given by rows, a chunk at a time.
  CrossEntropyBatch chunk(const at::Tensor& logits, int64_t first) const;

 protected:
  CrossEntropyOptions options_;
  c10::DimVector row_sizes_;
  int64_t rows_, classes_, class_dim_;
  at::Tensor labels_, probabilities_, weight_;  // contiguous int64; any floating type; contiguous. Undefined: none

 private:
  mutable at::Tensor alike_;  // holds the probabilities in the order of the last logits

  CrossEntropyBatch without_rows() const;
};

// "(1, 2)"
std::string position(c10::IntArrayRef indices);

}  // namespace trainopt::aten
