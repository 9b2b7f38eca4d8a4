// exp, log and their kin as the device has them, for losses in float32: a few instructions each where the CPU engine's
// bits (core/elementary.h) take 30. Errors are in units in the last place, the largest of all floats on an H200; the
// SIMT machine of the tests makes errors of that size on purpose, so that what is judged there has room for the
// hardware's.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/elementary.h"
#include "cuda/launch.h"

namespace trainopt::cuda {

using trainopt::multiply_add;

#if !defined(__CUDA_ARCH__)
// Up to `most` units in the last place away from a correctly rounded result, and mostly less, by the bits of what it is
// the result of; where that is exact, so is the hardware's.
inline float as_the_device_rounds(double exact, float of, int most) {
  const auto rounded = static_cast<float>(exact);
  if (static_cast<double>(rounded) == exact || !std::isnormal(rounded)) return rounded;
  const uint32_t mixed = (bits_of(of) ^ 0x9e3779b9u) * 0x85ebca6bu;
  const double at = static_cast<double>(mixed >> 8) * 0x1p-23 - 1;  // from -1 to 1
  const auto units = static_cast<int>(std::lround(at * at * at * at * at * most));
  return float_of(bits_of(rounded) + static_cast<uint32_t>(units));
}
#endif

// 2^x within 2.1 units; 0 where it is below the normal numbers. 2^0 is 1.
__device__ __forceinline__ float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float result = as_the_device_rounds(std::exp2(static_cast<double>(x)), x, 2);
  return std::fabs(result) < 1.17549435e-38f ? 0.0f : result;
#endif
}

// log2(x) within 2.3 units up to x = 1/2. Nearer to 1 it is off by 2^-22, whatever its size.
__device__ __forceinline__ float fast_log2(float x) {
#if defined(__CUDA_ARCH__)
  return __log2f(x);
#else
  return as_the_device_rounds(std::log2(static_cast<double>(x)), x, 3);
#endif
}

// 1 / x for |x| from 2^-126 to 2^126, within 1 unit.
__device__ __forceinline__ float fast_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return as_the_device_rounds(1 / static_cast<double>(x), x, 1);
#endif
}

// For double: the C library's.
using trainopt::exponential;
using trainopt::exponential_of_negative;
using trainopt::logarithm;

// A float in the formulas of csrc/losses.
struct Real {
  float value;

  Real() = default;
  __device__ __forceinline__ explicit Real(float x) : value(x) {}
};

__device__ __forceinline__ Real operator-(Real a) { return Real(-a.value); }
__device__ __forceinline__ Real operator+(Real a, Real b) { return Real(a.value + b.value); }
__device__ __forceinline__ Real operator-(Real a, Real b) { return Real(a.value - b.value); }
__device__ __forceinline__ Real operator*(Real a, Real b) { return Real(a.value * b.value); }
__device__ __forceinline__ Real operator/(Real a, Real b) { return Real(a.value / b.value); }

__device__ __forceinline__ Real select_less(Real a, Real b, Real if_so, Real if_not) {
  return a.value < b.value ? if_so : if_not;
}

// a / b for a size of b from 2^-100 to 2^100, within 1 unit; a may be anything.
__device__ __forceinline__ Real quotient(Real a, Real b) {
  const float r = fast_reciprocal(b.value);
  return Real(a.value * multiply_add(multiply_add(-b.value, r, 1.0f), r, r));
}

// Within 2 units.
__device__ __forceinline__ Real exponential(Real x) {
#if defined(__CUDA_ARCH__)
  return Real(expf(x.value));
#else
  return Real(as_the_device_rounds(std::exp(static_cast<double>(x.value)), x.value, 2));
#endif
}

__device__ __forceinline__ Real exponential_of_negative(Real x) { return exponential(x); }

// Within 1 unit.
__device__ __forceinline__ Real logarithm(Real x) {
#if defined(__CUDA_ARCH__)
  return Real(logf(x.value));
#else
  return Real(as_the_device_rounds(std::log(static_cast<double>(x.value)), x.value, 1));
#endif
}

// Within 2 units.
__device__ __forceinline__ Real hyperbolic_tangent(Real x) {
#if defined(__CUDA_ARCH__)
  return Real(tanhf(x.value));
#else
  return Real(as_the_device_rounds(std::tanh(static_cast<double>(x.value)), x.value, 2));
#endif
}

// log(1 + f) for -1/2 <= f <= 1, within 1.6 units: trainopt::log_near_one, whose quotient may be a
// little off, since the leading term is f itself.
__device__ __forceinline__ float log_near_one_of(float f) {
  const float s = f * fast_reciprocal(2.0f + f), s2 = s * s, half_square = 0.5f * f * f;
  float series = multiply_add(s2, 0.24308321f, 0.21425852f);
  series = multiply_add(s2, series, 0.286170352f);
  series = multiply_add(s2, series, 0.399988729f);
  series = multiply_add(s2, series, 0.666666757f);
  return f - multiply_add(-s, multiply_add(s2, series, half_square), half_square);
}

__device__ __forceinline__ Real log_one_plus(Real u) { return Real(log_near_one_of(u.value)); }

// log(x) and log(1 - x) for x from 0 to 1, but no less than `low`, which is below log(1/2). Of the smaller of x and
// 1 - x, which is exact, the instruction is as good as any: its logarithm is no smaller than log(2); for the larger it
// is not.
__device__ __forceinline__ void logarithms(Real x, Real low, Real* of_x, Real* of_rest) {
  const bool is_small = x.value <= 0.5f;
  const float smaller = is_small ? x.value : 1.0f - x.value;
  const Real of_smaller = at_least(Real(fast_log2(smaller) * 0.693147182f), low);
  const Real of_larger(log_near_one_of(-smaller));
  *of_x = is_small ? of_smaller : of_larger;
  *of_rest = is_small ? of_larger : of_smaller;
}

__device__ __forceinline__ Real log_one_minus(Real x) {
  return x.value < 0.5f ? Real(log_near_one_of(-x.value)) : logarithm(Real(1.0f - x.value));
}

// The type that formulas are computed in, for arithmetic in S.
template <class S>
using Formula = std::conditional_t<std::is_same_v<S, float>, Real, S>;

__device__ __forceinline__ float value_of(Real x) { return x.value; }
__device__ __forceinline__ double value_of(double x) { return x; }

}  // namespace trainopt::cuda
