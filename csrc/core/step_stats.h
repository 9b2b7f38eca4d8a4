// What a step finds out about a parameter on its way through it.
#pragma once

#include <cstdint>

namespace trainopt {

struct StepStats {
  double gradient, param, update;  // sums of squares: of the gradient as it came, of the parameter before, of its move
  double largest;                  // absolute element of the gradient, NaN apart
  int64_t nonfinite;               // elements of the gradient that are infinite or NaN
};

// The chunks of a tensor are added in their order, whoever has found them.
inline void add(StepStats& to, const StepStats& more) {
  to.gradient += more.gradient;
  to.param += more.param;
  to.update += more.update;
  if (more.largest > to.largest) to.largest = more.largest;
  to.nonfinite += more.nonfinite;
}

}  // namespace trainopt
