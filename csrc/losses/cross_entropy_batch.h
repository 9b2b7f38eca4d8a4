// What cross-entropy is computed of, on every device: rows of logits, their target, and the options.
#pragma once

#include <cstdint>
#include <limits>

#include "core/dtype.h"
#include "core/macros.h"

namespace trainopt {

// Rows of one element a class; without data, absent. `inner` rows (of the batch) lie side by side, class by class:
// class c of row r is the element r / inner * stride + c * class_stride + r % inner. Where inner is 1, class_stride is
// 1 too.
struct Rows {
  void* data;
  int64_t stride, class_stride;
  DType dtype;
};

struct CrossEntropyBatch {
  int64_t classes, inner;
  Rows logits;
  const int64_t* labels;  // a class for each row; or absent:
  Rows probabilities;     // then these are the target
  int64_t ignore_index;   // for labels: rows of this label have no loss
  double smoothing;
  double softcap;  // 0: none
};

// The log-sum-exp of each row, peak + log_sum: what is kept from forward to backward. It stays in two parts, for their
// sum has no digits left for log_sum where logits are large: of 1,000 logits that are all 1e17 it is 1e17, and
// log(1000), which is their loss, is lost.
struct LogSumExp {
  double* peak;     // the largest logit, after the soft cap; -infinity where all are
  double* log_sum;  // log sum_c e^(x_c - peak)

  TRAINOPT_INLINE double of(int64_t row) const { return peak[row] + log_sum[row]; }
  LogSumExp from(int64_t row) const { return {peak + row, log_sum + row}; }
};

// A soft cap in the type of the arithmetic; 0: none. One that is larger than all numbers of S leaves every logit as it
// is. One that is smaller takes all but 0 to what is 0 in S, as the smallest number of S does.
template <class S>
TRAINOPT_FUNCTION S softcap_in(double softcap) {
  constexpr S kLargest = std::numeric_limits<S>::max(), kSmallest = std::numeric_limits<S>::min();
  if (softcap == 0 || softcap > static_cast<double>(kLargest)) return S(0);
  return softcap < static_cast<double>(kSmallest) ? kSmallest : static_cast<S>(softcap);
}

TRAINOPT_FUNCTION bool is_ignored(const CrossEntropyBatch& batch, int64_t row) {
  return batch.labels != nullptr && batch.labels[row] == batch.ignore_index;
}

// Whether classes have a mass beside the spike.
TRAINOPT_FUNCTION bool has_mass(const CrossEntropyBatch& batch) {
  return batch.labels == nullptr || batch.smoothing != 0;
}

// The mass that smoothing gives to each class, before weights.
TRAINOPT_FUNCTION double spread_of(const CrossEntropyBatch& batch) {
  return batch.smoothing / static_cast<double>(batch.classes);
}

}  // namespace trainopt
