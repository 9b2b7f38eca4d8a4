// Norms over tensors on the CPU, and clipping. See core/norm.h for the order of the sums.
#pragma once

#include <cstdint>

#include "core/norm.h"
#include "core/tensor_view.h"

namespace trainopt::cpu {

// The sum of elements [begin, end) for a norm; begin is a multiple of kNormChunk. The same bits for every SIMD variant.
double norm_of_chunk(Norm, const TensorView&, int64_t begin, int64_t end);

// Multiplies elements [begin, end) by the factors, rounded to the arithmetic's type; begin is a multiple of kNormChunk.
void scale(const TensorView&, int64_t begin, int64_t end, const ClipFactors&);

// Brings elements [begin, end) into [-limit, limit]; writes to no block of 256 that lies there already.
void clamp(const TensorView&, int64_t begin, int64_t end, double limit);

}  // namespace trainopt::cpu
