// exp, log and their kin, for losses. Written once for a float and for an engine's vector of floats, with nothing but
// + - * / and moves of bits (no fused multiply-add), so that the same bits come out on every instruction set and
// device. For double, and for vectors of double lane by lane, they are the C library's.
//
// An engine's vector type brings its own overloads of the primitives: select_less, power_of_two, split_power_of_two.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"
#include "core/math.h"

namespace trainopt {

// a < b ? if_so : if_not, element by element; if_not where a or b is NaN.
TRAINOPT_FUNCTION float select_less(float a, float b, float if_so, float if_not) { return a < b ? if_so : if_not; }
TRAINOPT_FUNCTION double select_less(double a, double b, double if_so, double if_not) { return a < b ? if_so : if_not; }

// 2^n for a whole n from -126 to 127, taken modulo 512 else. Adding 1.5 * 2^23 leaves n at the end of the fraction.
TRAINOPT_FUNCTION float power_of_two(float n) { return float_of((bits_of(n + 12582912.0f) << 23) + 0x3f800000u); }

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

// e^x within 1 ulp; 0 where the result is below 1.8e-38, infinite above 88.72, NaN for NaN.
// e^x = 2^n * e^r with |r| <= log(2)/2, and e^r by a minimax polynomial.
template <class T>
TRAINOPT_FUNCTION T exponential(T x) {
  const T low(-86.9f), high(88.72284f), magic(12582912.0f);
  const T n = (x * T(1.44269504f) + magic) - magic;
  // log(2) in two parts, of which n times the first is exact.
  const T r = (x - n * T(0.693359375f)) - n * T(-2.12194440e-4f);
  const T series = T(0.499999934f) +
                   r * (T(0.166665204f) + r * (T(0.0416683908f) + r * (T(0.00836874513f) + r * T(0.00138145399f))));
  const T y = (T(1.0f) + (r + r * r * series)) * power_of_two(n - T(1.0f)) * T(2.0f);
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
  const T series = s2 * (T(0.666666757f) +
                         s2 * (T(0.399988729f) + s2 * (T(0.286170352f) + s2 * (T(0.21425852f) + s2 * T(0.24308321f)))));
  return f - (half_square - s * (half_square + series));
}

// log(x) within 1 ulp; -infinity for 0, NaN below it.
template <class T>
TRAINOPT_FUNCTION T logarithm(T x) {
  const T smallest_normal(1.17549435e-38f), zero(0.0f);
  const T scaled = select_less(x, smallest_normal, x * T(8388608.0f), x);
  T e;
  const T m = split_power_of_two(scaled, &e);
  e = e - select_less(x, smallest_normal, T(23.0f), zero);
  const T y = e * T(0.693359375f) + (log_near_one(m - T(1.0f)) + e * T(-2.12194440e-4f));
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

// The larger of two numbers; x where it is NaN.
template <class T>
TRAINOPT_FUNCTION T at_least(T x, T low) {
  return select_less(x, low, low, x);
}

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
  const T series =
      T(-0.333332993f) +
      x2 * (T(0.133319582f) + x2 * (T(-0.0537866834f) + x2 * (T(0.0208053842f) + x2 * T(-0.00590586795f))));
  const T near_zero = x + x * x2 * series;
  const T far = T(1.0f) - T(2.0f) / (exponential(size + size) + T(1.0f));
  return select_less(size, T(0.6f), near_zero, select_less(x, T(0.0f), -far, far));
}
TRAINOPT_FUNCTION double hyperbolic_tangent(double x) { return __builtin_tanh(x); }

}  // namespace trainopt
