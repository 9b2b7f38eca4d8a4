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

// Float64 gradients of 1e200 or 1e-200 have squares that a double cannot hold. So a sum of squares that is too large or
// too small is kept as minus its root: the sign tells the two apart. Sums of float32 and smaller types are never so.
TRAINOPT_FUNCTION bool holds_squares(double sum) { return 0x1p-900 < sum && sum < 0x1p1000; }

// What elements are multiplied by before they are squared, where the sum of their plain squares is not held.
TRAINOPT_FUNCTION double square_scale(double plain_sum) { return plain_sum < 1 ? 0x1p600 : 0x1p-600; }

// How the squares of elements that were multiplied by `scale` are kept.
TRAINOPT_FUNCTION double keep_scaled_squares(double sum, double scale) {
  const double norm = __builtin_sqrt(sum) / scale;
  return norm == 0 ? 0 : -norm;
}

TRAINOPT_FUNCTION double add_squares(double a, double b) {
  const double sum = (a < 0 ? a * a : a) + (b < 0 ? b * b : b);
  if (holds_squares(sum) || (a == 0 && b == 0)) return sum;
  const double scale = square_scale(sum);
  const double x = (a < 0 ? -a : __builtin_sqrt(a)) * scale, y = (b < 0 ? -b : __builtin_sqrt(b)) * scale;
  return keep_scaled_squares(x * x + y * y, scale);
}

TRAINOPT_FUNCTION double combine(Norm norm, double a, double b) {
  if (norm == Norm::kLargest) return b > a || b != b ? b : a;
  return norm == Norm::kSquares ? add_squares(a, b) : a + b;
}

// The norm from the sum of all chunks.
TRAINOPT_FUNCTION double root(Norm norm, double sum) {
  if (norm != Norm::kSquares) return sum;
  return sum < 0 ? -sum : __builtin_sqrt(sum);
}

// What gradients of norm `total` are multiplied by, so that their norm is at most `max_norm`: as torch's
// clip_grad_norm_ has it, min(1, max_norm / (total + 1e-6)). NaN stays NaN. A coefficient below 2^-100, which would
// lose digits in float32, is the product of two factors, one after the other.
struct ClipFactors {
  double first, second;

  TRAINOPT_INLINE bool change_nothing() const { return first == 1 && second == 1; }
};
TRAINOPT_FUNCTION ClipFactors clip_factors(double total, double max_norm) {
  constexpr double kSmall = 0x1p-100;
  const double coefficient = max_norm / (total + 1e-6);
  if (-kSmall < coefficient && coefficient < kSmall) return {kSmall, max_norm / ((total + 1e-6) * kSmall)};
  return {1, coefficient > 1 ? 1 : coefficient};
}

// An element of a gradient that is clipped by value, as torch's clip_grad_value_ has it; NaN stays NaN.
template <class T>
TRAINOPT_FUNCTION T clamped(T x, T limit) {
  x = x < -limit ? -limit : x;
  return x > limit ? limit : x;
}

}  // namespace trainopt
