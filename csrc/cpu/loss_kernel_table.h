// What one SIMD variant offers the losses.
#pragma once

#include "cpu/losses.h"
#include "losses/pointwise.h"

namespace trainopt::cpu {

#define TRAINOPT_COUNT(loss) +1
constexpr int kPointwiseLosses = TRAINOPT_FOR_EACH_POINTWISE_LOSS(TRAINOPT_COUNT);
#undef TRAINOPT_COUNT

// [..][0] float arithmetic, [..][1] double.
struct LossKernelTable {
  double (*pointwise_forward[kPointwiseLosses][2])(const PointwiseTask&, int64_t begin, int64_t end);
  void (*pointwise_backward[kPointwiseLosses][2])(const PointwiseTask&, int64_t begin, int64_t end);
  void (*cross_entropy_forward[2])(const CrossEntropyTask&, int64_t first_row, int64_t last_row);
  void (*cross_entropy_backward[2])(const CrossEntropyTask&, int64_t first_row, int64_t last_row);
};

extern const LossKernelTable kBaselineLossKernels;
#if defined(TRAINOPT_X86)
extern const LossKernelTable kAvx2LossKernels;
extern const LossKernelTable kAvx512LossKernels;
#endif

}  // namespace trainopt::cpu
