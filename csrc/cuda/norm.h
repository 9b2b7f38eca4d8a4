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
  double* partials;    // norm_partials of them
  double* total;       // the norm of all
  TensorView rounded;  // the same, rounded to a dtype of its own; or without data
};

// How many partial sums these tensors have.
int64_t norm_partials(const NormTensor* tensors, size_t count);

// One launch for each list that fits in a kernel's parameters, and one that combines.
void norm(const NormWork&, Stream);

// Multiplies all tensors by clip_factors(*total, max_norm), `total` on the device. Where they are 1, nothing is read or
// written.
void clip(const NormTensor* tensors, size_t count, const double* total, double max_norm, Stream);

// Brings every element of all tensors into [-limit, limit], and writes only where one lies beyond.
void clamp(const NormTensor* tensors, size_t count, double limit, Stream);

}  // namespace trainopt::cuda
