// The norm of many tensors on the device, and the scaling of gradients by what follows from it. Nothing here waits for
// the device: the norm stays there, and so does the coefficient. See core/norm.h for the order of the sums.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/norm.h"
#include "core/tensor_view.h"
#include "cuda/stream.h"

namespace trainopt::cuda {

struct NormTensor {
  TensorView view;
  int64_t numel;
};

struct NormWork {
  Norm norm;
  const NormTensor* tensors;
  size_t count;
  // On the device:
  double* partials;      // one for each chunk: norm_chunks of all tensors
  int64_t* first_chunk;  // one for each tensor
  double* of_tensor;     // one for each tensor: its norm
  double* total;         // the norm of all
  TensorView rounded;    // the same, rounded to a dtype of its own; or without data
};

// One launch for each list that fits in a kernel's parameters, and one that combines.
void norm(const NormWork&, Stream);

// Multiplies all tensors by clip_factors(*total, max_norm), `total` on the device. Where they are 1, nothing is read or
// written.
void clip(const NormTensor* tensors, size_t count, const double* total, double max_norm, Stream);

}  // namespace trainopt::cuda
