// What a step finds out about a parameter on its way through it.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace trainopt {

struct StepStats {
  double gradient, param, update;  // sums of squares: of the gradient as it came, of the parameter before, of its move
  double largest;                  // absolute element of the gradient, NaN apart
  int64_t nonfinite;               // elements of the gradient that are infinite or NaN
};

// The chunks of a tensor are added in their order, whoever has found them.
TRAINOPT_INLINE StepStats add(const StepStats& a, const StepStats& b) {
  return {a.gradient + b.gradient, a.param + b.param, a.update + b.update,
          a.largest > b.largest ? a.largest : b.largest, a.nonfinite + b.nonfinite};
}

}  // namespace trainopt
