// The pointwise losses on the device: one pass forward, one backward. The formulas are csrc/losses/pointwise.h's.
//
// Nothing here waits for the device. All memory is the caller's, and so is the stream; the caller has made the tensors'
// device the current one. A launch that CUDA refuses throws std::runtime_error.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"
#include "cuda/stream.h"
#include "losses/pointwise_task.h"

namespace trainopt::cuda {

// The sum of all elements' losses, divided by `divisor`, in a dtype of its own.
struct Reduced {
  TensorView result;  // one number on the device; without data, there is no sum
  double divisor;
  double* partials;  // on the device: pointwise_partials(numel) of them
};

// How many partial sums a pass needs memory for; 0 where one block does it all.
int64_t pointwise_partials(int64_t numel);

// The upstream gradient of a sum, one number on the device: each element's is that divided by `divisor`. Without data,
// the task has an upstream gradient for each element.
struct Upstream {
  TensorView number;
  double divisor;
};

// `loss` is its place in TRAINOPT_FOR_EACH_POINTWISE_LOSS; `is_float64` selects the arithmetic. Of the task, `scale` is
// not read.
//
// Where an input or a target of binary_cross_entropy is no probability, the element's loss is NaN, and 1 for an input,
// 2 for a target or 3 for both is written to `bad_probability`, which may be the host's memory, or null.
void pointwise_forward(int loss, bool is_float64, const PointwiseTask&, const Reduced&, int64_t* bad_probability,
                       Stream);
void pointwise_backward(int loss, bool is_float64, const PointwiseTask&, const Upstream&, Stream);

}  // namespace trainopt::cuda
