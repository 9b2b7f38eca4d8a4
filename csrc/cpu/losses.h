// The CPU engine for losses. Work is cut by size, never by thread, and every sum is taken in one order: per lane in
// tiles of 256 elements, then in double, so the same bits come out for any number of threads and on every SIMD variant.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"
#include "losses/cross_entropy_batch.h"

namespace trainopt::cpu {

// Pointwise losses
// -----------------------------------------------------------------------------------------------------

// A pass over `numel` elements, which all tensors hold in one order. A view without data is absent.
struct PointwiseTask {
  int64_t numel;
  TensorView input, target;
  TensorView weight;    // factor of each element's loss
  TensorView positive;  // weight of the positive class
  double parameter;     // beta or delta

  TensorView value;  // forward: each element's loss, where it is wanted

  TensorView upstream;  // backward: the gradient of each element's loss, or absent:
  double scale;         // then this is that of all of them
  TensorView input_gradient, target_gradient;
};

struct PointwiseLoss {
  const char* name;
  int index;  // in the kernel tables
};
const PointwiseLoss* find_pointwise_loss(const char* name);

// Elements [begin, end), begin a multiple of 256. Forward returns the sum of their losses. `wide` selects float64.
double pointwise_forward(const PointwiseLoss&, bool wide, const PointwiseTask&, int64_t begin, int64_t end);
void pointwise_backward(const PointwiseLoss&, bool wide, const PointwiseTask&, int64_t begin, int64_t end);

// Cross-entropy
// --------------------------------------------------------------------------------------------------------

struct CrossEntropyTask : CrossEntropyBatch {  // with labels that are classes, or ignored
  const double* weight;                        // of each class; or absent
  double total_weight;                         // of all classes

  double* lse;   // for each row: written by forward, read by backward
  double* loss;  // forward: the loss of each row, without z-loss

  Rows gradient;            // backward; may be the logits themselves
  const double* scale;      // the upstream gradient of each row's loss
  const double* lse_scale;  // that of each row's lse
};

void cross_entropy_forward(bool wide, const CrossEntropyTask&, int64_t first_row, int64_t last_row);
void cross_entropy_backward(bool wide, const CrossEntropyTask&, int64_t first_row, int64_t last_row);

}  // namespace trainopt::cpu
