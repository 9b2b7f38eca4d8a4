// The functions of one number that rules use beside + - * /. An engine's vector type brings its own overloads.
#pragma once

#include "core/macros.h"

namespace trainopt {

TRAINOPT_FUNCTION float square_root(float x) { return __builtin_sqrtf(x); }
TRAINOPT_FUNCTION double square_root(double x) { return __builtin_sqrt(x); }

// The larger of two numbers; NaN if either is, as torch.maximum.
TRAINOPT_FUNCTION float maximum(float a, float b) { return b > a || b != b ? b : a; }
TRAINOPT_FUNCTION double maximum(double a, double b) { return b > a || b != b ? b : a; }

}  // namespace trainopt
