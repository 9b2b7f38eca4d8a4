// What one SIMD variant offers the engine.
#pragma once

#include "core/factored.h"
#include "cpu/engine.h"
#include "cpu/norm.h"
#include "rules/rules.h"

namespace trainopt::cpu {

#define TRAINOPT_COUNT(rule) +1
constexpr int kRules = TRAINOPT_FOR_EACH_RULE(TRAINOPT_COUNT);
#undef TRAINOPT_COUNT

// Whether it pays to ask for memory that will be written: see prefetch_ahead.
extern const bool kAsksAhead;

// Rows [row, row_end), from a group's first on, and columns [column, column_end), from a piece's first on, of matrices
// [matrix, matrix + matrices), with where the sums of the first of these matrices are put.
struct FactorPart {
  int64_t matrix, matrices, row, row_end, column, column_end;
  double *row_sums, *column_sums;
};

struct KernelTable {
  Kernel rule[kRules][2];                   // [..][0] float arithmetic, [..][1] double
  GatherKernel gather[kRules][kPasses][2];  // null for the sums of a rule that has none
  void (*gaussian)(float* out, int64_t begin, int64_t count, const TensorKey&);
  void (*rounding_bits)(uint16_t* out, int64_t begin, int64_t count, const TensorKey&);
  double (*norm_of_chunk)(Norm, const TensorView&, int64_t begin, int64_t end);
  void (*scale)(const TensorView&, int64_t begin, int64_t end, const ClipFactors&);
  void (*clamp)(const TensorView&, int64_t begin, int64_t end, double limit);
  void (*add_squares[2])(const TensorTask&, const FactoredShape&, const FactorPart&);  // as `rule`
};
const KernelTable& kernels_in_use();

extern const KernelTable kBaselineKernels;
#if defined(TRAINOPT_X86)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#endif

}  // namespace trainopt::cpu
