// What cross-entropy is computed of, on every device: rows of logits, their target, and the options.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"
#include "losses/cross_entropy_options.h"

namespace trainopt {

// Rows of one element a class; without data, absent. `inner` rows (of the batch) lie side by side, class by class:
// class c of row r is the element r / inner * stride + c * class_stride + r % inner. Where inner is 1, class_stride is
// 1 too.
struct Rows {
  void* data;
  int64_t stride, class_stride;
  DType dtype;
};

struct CrossEntropyBatch : CrossEntropyOptions {
  int64_t classes, inner;
  Rows logits;
  const int64_t* labels;  // a class for each row; or absent:
  Rows probabilities;     // then these are the target
};

// The log-sum-exp of each row, peak + log_sum: what is kept from forward to backward. It stays in two parts, for their
// sum has no digits left for log_sum where logits are large: of 1,000 logits that are all 1e17 it is 1e17, and
// log(1000), which is their loss, is lost.
struct LogSumExp {
  double* peak;     // the largest logit, after soft cap and temperature; -infinity where all are
  double* log_sum;  // log sum_c e^(x_c - peak)

  TRAINOPT_INLINE double of(int64_t row) const { return peak[row] + log_sum[row]; }
  LogSumExp from(int64_t row) const { return {peak + row, log_sum + row}; }
};

TRAINOPT_FUNCTION bool is_ignored(const CrossEntropyBatch& batch, int64_t row) {
  return batch.labels != nullptr && batch.labels[row] == batch.ignore_index;
}

// Whether every class has a mass, and not the label alone.
TRAINOPT_FUNCTION bool has_mass(const CrossEntropyBatch& batch) {
  return batch.labels == nullptr || batch.smoothing != 0;
}

// The mass that smoothing gives to each class, before weights.
TRAINOPT_FUNCTION double spread_of(const CrossEntropyBatch& batch) {
  return batch.smoothing / static_cast<double>(batch.classes);
}

// That of all classes, with the sum of their weights. Without smoothing there is none, though a class that no row has
// may have a weight that is infinite or NaN.
TRAINOPT_FUNCTION double spread_mass_of(const CrossEntropyBatch& batch, double total_weight) {
  return batch.smoothing == 0 ? 0 : spread_of(batch) * total_weight;
}

}  // namespace trainopt
