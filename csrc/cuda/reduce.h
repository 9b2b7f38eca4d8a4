// How the threads of a warp, and those of a block, combine their values: always in one order, so that sums have the
// same bits in every run.
#pragma once

#include "core/step_stats.h"
#include "core/sum.h"
#include "cuda/launch.h"

namespace trainopt::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;  // tests break this: half a warp's mask

// The value of the lane whose number differs by these bits.
template <class T>
__device__ __forceinline__ T of_lane(T value, int distance) {
  return __shfl_xor_sync(kAllLanes, value, distance);
}
__device__ __forceinline__ Sum of_lane(Sum value, int distance) {
  return {of_lane(value.high, distance), of_lane(value.low, distance)};
}
__device__ __forceinline__ StepStats of_lane(StepStats value, int distance) {
  return {of_lane(value.gradient, distance), of_lane(value.param, distance), of_lane(value.update, distance),
          of_lane(value.largest, distance), of_lane(value.nonfinite, distance)};
}

// The lanes' values by a tree; every lane has the result. combine(a, b) must have the bits of combine(b, a).
template <class T, class Combine>
__device__ __forceinline__ T combine_warp(T value, Combine combine) {
  for (int distance = 16; distance > 0; distance /= 2) value = combine(value, of_lane(value, distance));
  return value;
}

// The threads' values, a warp's by its tree, then the warps' in order; thread 0 has the result, the others do not.
// `of_warp` is shared memory of kWarps values, which nothing else uses until the next barrier after this one.
template <int kWarps, class T, class Slots, class Combine>
__device__ __forceinline__ T combine_block(T value, Slots&& of_warp, Combine combine) {
  value = combine_warp(value, combine);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;  // tests break this: unset shared slots
  __syncthreads();                                               // tests break this: a missing barrier
  if (threadIdx.x != 0) return value;
  T result = of_warp[0];
  for (int w = 1; w < kWarps; ++w) result = combine(result, static_cast<T>(of_warp[w]));
  return result;
}

}  // namespace trainopt::cuda
