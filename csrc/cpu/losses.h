// The CPU engine for losses. Work is cut by size, never by thread, and every sum is taken in one order: per lane in
// tiles of 256 elements, then in double, so the same bits come out for any number of threads and on every SIMD variant.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"
#include "losses/cross_entropy_batch.h"
#include "losses/pointwise_task.h"

namespace trainopt::cpu {

// Bytes from which on a result is written past the caches, where it would not be found again: an ordinary store reads
// the line that it writes first, which was a sixth of a pointwise loss's traffic. Not one that is written over its
// operand.
constexpr int64_t kStreamFrom = int64_t(16) << 20;

// Pointwise losses
// -----------------------------------------------------------------------------------------------------

struct PointwiseLoss {
  const char* name;
  int index;  // in the kernel tables
};
const PointwiseLoss* find_pointwise_loss(const char* name);

// Elements [begin, end), begin a multiple of 256. Forward returns the sum of their losses. `is_float64` selects the
// arithmetic.
double pointwise_forward(const PointwiseLoss&, bool is_float64, const PointwiseTask&, int64_t begin, int64_t end);
void pointwise_backward(const PointwiseLoss&, bool is_float64, const PointwiseTask&, int64_t begin, int64_t end);

// Cross-entropy
// --------------------------------------------------------------------------------------------------------

struct CrossEntropyTask : CrossEntropyBatch {  // with labels that are classes, or ignored
  const double* weight;                        // of each class; or absent
  double total_weight;                         // of all classes

  LogSumExp lse;  // for each row: written by forward, read by backward
  double* loss;   // forward: the loss of each row, without z-loss

  Rows gradient;            // backward; may be the logits themselves
  const double* scale;      // the upstream gradient of each row's loss
  const double* lse_scale;  // that of each row's lse
  bool streams;             // whether the gradient is written past the caches: see kStreamFrom
};

void cross_entropy_forward(bool is_float64, const CrossEntropyTask&, int64_t first_row, int64_t last_row);
void cross_entropy_backward(bool is_float64, const CrossEntropyTask&, int64_t first_row, int64_t last_row);

}  // namespace trainopt::cpu
