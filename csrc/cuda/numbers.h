// Reading and writing the numbers of a parameter on the device.
#pragma once

#include "cuda/engine.h"
#include "rules/rule.h"

namespace trainopt::cuda {
namespace {

template <int kCount>
__device__ __forceinline__ Numbers load_numbers(const Number* from, bool are_float32, bool are_values = false) {
  Numbers numbers{};
  numbers.are_float32 = are_float32;
#pragma unroll
  for (int n = 0; n < kCount; ++n)
    numbers.at[n] = are_values    ? from[n].value
                    : are_float32 ? static_cast<double>(*static_cast<const float*>(from[n].data))
                                  : *static_cast<const double*>(from[n].data);
  return numbers;
}

template <int kCount>
__device__ __forceinline__ void store_numbers(const Number* to, const Numbers& numbers) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    if (numbers.are_float32) {
      *static_cast<float*>(to[n].data) = static_cast<float>(numbers.at[n]);
    } else {
      *static_cast<double*>(to[n].data) = numbers.at[n];
    }
  }
}

}  // namespace
}  // namespace trainopt::cuda
