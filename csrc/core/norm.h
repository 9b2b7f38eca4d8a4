// Norms over lists of tensors, on every device: each tensor's elements are cut into chunks from its own element 0, a
// chunk is summed in an order of its own, and the sums are combined in the order of the chunks, in double. So the
// result has the same bits in every run, and for any number of threads.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace trainopt {

// The sum of sizes (p = 1), of squares (p = 2), or the largest size (p = infinity), NaN if any is.
enum class Norm : uint8_t { kSizes, kSquares, kLargest };

constexpr int64_t kNormChunk = 16384;

// At least one, so that every tensor has a sum.
TRAINOPT_FUNCTION int64_t norm_chunks(int64_t numel) { return numel == 0 ? 1 : (numel - 1) / kNormChunk + 1; }

TRAINOPT_FUNCTION double combine(Norm norm, double a, double b) {
  if (norm == Norm::kLargest) return b > a || b != b ? b : a;
  return a + b;
}

// The norm from the sum of all chunks.
TRAINOPT_FUNCTION double root(Norm norm, double sum) { return norm == Norm::kSquares ? __builtin_sqrt(sum) : sum; }

// What gradients of norm `total` are multiplied by, so that their norm is at most `max_norm`: as torch's
// clip_grad_norm_ has it, 1e-6 included. NaN stays NaN.
TRAINOPT_FUNCTION double clip_coefficient(double total, double max_norm) {
  const double wanted = max_norm / (total + 1e-6);
  return wanted > 1 ? 1 : wanted;
}

}  // namespace trainopt
