// exp, log and their kin, for losses. Written once for a float and for an engine's vector of floats, with nothing but
// + - * /, fused multiply-add where it is written as such, and moves of bits, so that the same bits come out on every
// instruction set and device. For double, and for vectors of double lane by lane, they are the C library's.
//
// An engine's vector type brings its own overloads of the primitives: select_less, multiply_add, power_of_two,
// split_power_of_two.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"
#include "core/math.h"

namespace trainopt {

// a < b ? if_so : if_not, element by element; if_not where a or b is NaN.
TRAINOPT_FUNCTION float select_less(float a, float b, float if_so, float if_not) { return a < b ? if_so : if_not; }
TRAINOPT_FUNCTION double select_less(double a, double b, double if_so, double if_not) { return a < b ? if_so : if_not; }

// a * b + c, rounded once.
TRAINOPT_FUNCTION float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// 2^n, for a whole n from -126 to 127 that is given as n + 1.5 * 2^23: n is the end of that number's fraction then. 0
// for n = -127.
constexpr float kWholeNumbers = 12582912.0f;
TRAINOPT_FUNCTION float power_of_two(float n_shifted) { return float_of((bits_of(n_shifted) << 23) + 0x3f800000u); }

// x = m * 2^e with m in [sqrt(1/2), sqrt(2)), for a positive normal x; returns m.
TRAINOPT_FUNCTION float split_power_of_two(float x, float* e) {
  const uint32_t bits = bits_of(x) - 0x3f3504f3u;  // the bits of sqrt(1/2)
  *e = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  return float_of((bits & 0x007fffffu) + 0x3f3504f3u);
}

template <class T>
TRAINOPT_FUNCTION T magnitude(T x) {
  return select_less(x, T(0.0f), -x, x);
}

// The larger of two numbers; x where it is NaN.
template <class T>
TRAINOPT_FUNCTION T at_least(T x, T low) {
  return select_less(x, low, low, x);
}

// e^x = 2^n * e^r with |r| <= log(2)/2, where e^r = 1 + r * series(r), by a minimax polynomial. `n_shifted` is n as
// power_of_two takes it.
template <class T>
TRAINOPT_FUNCTION T reduced(T x, T n_shifted, T* series) {
  const T n = n_shifted - T(kWholeNumbers);
  // log(2) in two parts, the nearest float and what it lacks.
  const T r = multiply_add(n, T(1.90465421e-9f), multiply_add(n, T(-0.693147182f), x));
  T sum = multiply_add(r, T(0.00138145399f), T(0.00836874513f));
  sum = multiply_add(r, sum, T(0.0416683908f));
  sum = multiply_add(r, sum, T(0.166665204f));
  sum = multiply_add(r, sum, T(0.499999934f));
  *series = multiply_add(r, sum, T(1.0f));
  return r;
}

// e^x within 1 ulp, for x no larger than 0; 0 where the result is below 8.3e-39, NaN for NaN. There is no comparison
// but that of the first line: what is small becomes 2^-127, which is 0 as power_of_two makes it.
template <class T>
TRAINOPT_FUNCTION T exponential_of_negative(T x) {
  const T y = at_least(x, T(-88.0f)), n_shifted = multiply_add(y, T(1.44269504f), T(kWholeNumbers));
  T series;
  const T r = reduced(y, n_shifted, &series), power = power_of_two(n_shifted);
  return multiply_add(power * r, series, power);
}
TRAINOPT_FUNCTION double exponential_of_negative(double x) { return __builtin_exp(x); }

// e^x within 1 ulp; 0 where the result is below 1.8e-38, infinite above 88.72, NaN for NaN.
template <class T>
TRAINOPT_FUNCTION T exponential(T x) {
  const T low(-86.9f), high(88.72284f), n_shifted = multiply_add(x, T(1.44269504f), T(kWholeNumbers));
  T series;
  const T r = reduced(x, n_shifted, &series);
  // 2^128 is no float.
  const T y = multiply_add(r, series, T(1.0f)) * power_of_two(n_shifted - T(1.0f)) * T(2.0f);
  return select_less(x, low, T(0.0f), select_less(high, x, T(__builtin_inff()), y));
}
TRAINOPT_FUNCTION double exponential(double x) { return __builtin_exp(x); }

// log(1 + f) for -1/2 <= f <= 1, within 1 ulp: with s = f / (2 + f), it is 2 atanh(s), written so that f, which is
// exact, is the leading term (the form of FreeBSD's e_log.c).
template <class T>
TRAINOPT_FUNCTION T log_near_one(T f) {
  const T s = f / (T(2.0f) + f);
  const T s2 = s * s;
  const T half_square = T(0.5f) * f * f;
  T series = multiply_add(s2, T(0.24308321f), T(0.21425852f));
  series = multiply_add(s2, series, T(0.286170352f));
  series = multiply_add(s2, series, T(0.399988729f));
  series = multiply_add(s2, series, T(0.666666757f));
  return f - multiply_add(-s, multiply_add(s2, series, half_square), half_square);
}

// log(x) within 1 ulp; -infinity for 0, NaN below it.
template <class T>
TRAINOPT_FUNCTION T logarithm(T x) {
  const T smallest_normal(1.17549435e-38f), zero(0.0f);
  const T scaled = select_less(x, smallest_normal, x * T(8388608.0f), x);
  T e;
  const T m = split_power_of_two(scaled, &e);
  e = e - select_less(x, smallest_normal, T(23.0f), zero);
  const T y = multiply_add(e, T(0.693147182f), multiply_add(e, T(-1.90465421e-9f), log_near_one(m - T(1.0f))));
  // Infinity is its own logarithm; x - infinity is -infinity for 0 and NaN for NaN.
  const T positive = select_less(x, T(__builtin_inff()), y, x);
  const T rest = select_less(x, zero, T(__builtin_nanf("")), x - T(__builtin_inff()));
  return select_less(zero, x, positive, rest);
}
TRAINOPT_FUNCTION double logarithm(double x) { return __builtin_log(x); }

// log(1 + u) for 0 <= u <= 1.
template <class T>
TRAINOPT_FUNCTION T log_one_plus(T u) {
  return log_near_one(u);
}
TRAINOPT_FUNCTION double log_one_plus(double u) { return __builtin_log1p(u); }

// log(1 - x) for x <= 1; -infinity for 1.
template <class T>
TRAINOPT_FUNCTION T log_one_minus(T x) {
  // 1 - x is exact from 1/2 on.
  return select_less(x, T(0.5f), log_near_one(-x), logarithm(T(1.0f) - x));
}
TRAINOPT_FUNCTION double log_one_minus(double x) { return __builtin_log1p(-x); }

// log(x) and log(1 - x), but no less than `low`, which an engine may compute together.
template <class T>
TRAINOPT_FUNCTION void logarithms(T x, T low, T* of_x, T* of_rest) {
  *of_x = at_least(logarithm(x), low);
  *of_rest = at_least(log_one_minus(x), low);
}

// a / b, where b is neither very small nor very large.
template <class T>
TRAINOPT_FUNCTION T quotient(T a, T b) {
  return a / b;
}

// tanh(x) within 2 ulp.
template <class T>
TRAINOPT_FUNCTION T hyperbolic_tangent(T x) {
  const T size = magnitude(x);
  const T x2 = x * x;
  T series = multiply_add(x2, T(-0.00590586795f), T(0.0208053842f));
  series = multiply_add(x2, series, T(-0.0537866834f));
  series = multiply_add(x2, series, T(0.133319582f));
  series = multiply_add(x2, series, T(-0.333332993f));
  const T near_zero = multiply_add(x * x2, series, x);
  const T far = T(1.0f) - T(2.0f) / (exponential(size + size) + T(1.0f));
  return select_less(size, T(0.6f), near_zero, select_less(x, T(0.0f), -far, far));
}
TRAINOPT_FUNCTION double hyperbolic_tangent(double x) { return __builtin_tanh(x); }

}  // namespace trainopt
