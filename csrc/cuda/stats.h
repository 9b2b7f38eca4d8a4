// What the threads of a step's block find out about a parameter. In double, element by element: that costs three
// conversions and three multiply-adds, for which a step has the time while it waits for memory, and needs no care for
// what float32 cannot hold.
#pragma once

#include "core/step_stats.h"
#include "cuda/reduce.h"
#include "cuda/step_table.h"
#include "cuda/table.h"
#include "cuda/two_parts.h"

namespace trainopt::cuda {
namespace {

// Adds elements of a parameter before its step, and of the gradient as it came.
template <class S, int kCount>
__device__ __forceinline__ void see(const S (&param)[kCount], const S (&gradient)[kCount], StepStats& stats) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const double p = param[i], g = gradient[i], magnitude = g < 0 ? -g : g;
    stats.param += p * p;
    stats.gradient += g * g;
    if (magnitude > stats.largest) stats.largest = magnitude;
    stats.nonfinite += !(g - g == 0);
  }
}

// Adds how far elements have moved, from what was loaded to what is stored as this dtype.
template <class S, int kCount>
__device__ __forceinline__ void see_move(const S (&before)[kCount], const S (&after)[kCount], DType dtype,
                                         StepStats& stats) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    // tests break this: a move that is not stored
    const double move = static_cast<double>(as_stored(after[i], dtype)) - static_cast<double>(before[i]);
    stats.update += move * move;
  }
}

// Sees elements [at, end) of a parameter whose step is left out.
template <class S, class Row>
__device__ __forceinline__ void see_run(const Row& row, int64_t at, int64_t end, StepStats& stats) {
  for (at += threadIdx.x; at < end; at += kThreads) {
    const S param[1] = {load_one<S>(row.data[0], row.beside[0], row.dtype[0], place_of(row, 0, at))};
    const S gradient[1] = {load_one<S>(row.data[1], row.dtype[1], place_of(row, 1, at))};
    see(param, gradient, stats);
  }
}

// Writes what all threads of the block have seen. Every thread calls it.
__device__ __forceinline__ void store_of_block(const StepStats& of_thread, StepStats* out) {
  TRAINOPT_SHARED(StepStats, of_warp, kThreads / 32);
  const auto both = [](const StepStats& a, const StepStats& b) { return add(a, b); };
  const StepStats all = combine_block<kThreads / 32>(of_thread, of_warp, both);
  if (threadIdx.x == 0) *out = all;
}

}  // namespace
}  // namespace trainopt::cuda
