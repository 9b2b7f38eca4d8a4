// The functions of one number that rules and stages use beside + - * /. An engine's vector type brings its own
// overloads.
#pragma once

#include "core/macros.h"

namespace trainopt {

TRAINOPT_FUNCTION float square_root(float x) { return __builtin_sqrtf(x); }
TRAINOPT_FUNCTION double square_root(double x) { return __builtin_sqrt(x); }

// The larger of two numbers; NaN if either is, as torch.maximum.
TRAINOPT_FUNCTION float maximum(float a, float b) { return b > a || b != b ? b : a; }
TRAINOPT_FUNCTION double maximum(double a, double b) { return b > a || b != b ? b : a; }
// The smaller, likewise; of vectors of them too.
template <class T>
TRAINOPT_FUNCTION T minimum(T a, T b) {
  return -maximum(-a, -b);
}

// 1, -1 or 0 with the sign of x; 0 for NaN.
TRAINOPT_FUNCTION float sign_of(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }
TRAINOPT_FUNCTION double sign_of(double x) { return x > 0 ? 1.0 : x < 0 ? -1.0 : 0.0; }

// Likewise, but NaN for NaN: an update that is a sign must not hide it.
TRAINOPT_FUNCTION float sign_or_nan(float x) { return x != x ? x : sign_of(x); }
TRAINOPT_FUNCTION double sign_or_nan(double x) { return x != x ? x : sign_of(x); }

// `value` where a * b >= 0, as it is in exact arithmetic; else 0.
TRAINOPT_FUNCTION float where_signs_agree(float a, float b, float value) {
  return (a > 0 && b < 0) || (a < 0 && b > 0) ? 0.0f : value;
}
TRAINOPT_FUNCTION double where_signs_agree(double a, double b, double value) {
  return (a > 0 && b < 0) || (a < 0 && b > 0) ? 0.0 : value;
}

// `value` where a * b > 0, as it is in exact arithmetic; else 0.
TRAINOPT_FUNCTION float where_same_sign(float a, float b, float value) {
  return (a > 0 && b > 0) || (a < 0 && b < 0) ? value : 0.0f;
}
TRAINOPT_FUNCTION double where_same_sign(double a, double b, double value) {
  return (a > 0 && b > 0) || (a < 0 && b < 0) ? value : 0.0;
}

// x moved towards 0 by `threshold`, and to exactly 0 if it is nearer than that; NaN stays NaN.
TRAINOPT_FUNCTION float soft_threshold(float x, float threshold) {
  return x - (x > threshold ? threshold : x < -threshold ? -threshold : x);
}
TRAINOPT_FUNCTION double soft_threshold(double x, double threshold) {
  return x - (x > threshold ? threshold : x < -threshold ? -threshold : x);
}

}  // namespace trainopt
