// One parameter in a step, as both engines take it.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"
#include "rules/rule.h"

namespace trainopt {

struct Task {
  int64_t numel;
  TensorView param, gradient;
  TensorView state[kMaxStates];  // without data where the rule needs none
  uint32_t tensor;               // its index in the optimizer, for the random numbers
};

}  // namespace trainopt
