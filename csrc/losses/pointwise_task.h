// What every engine is given for a pass of a pointwise loss over its elements.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace trainopt {

// A pass over `numel` elements, which all tensors hold in one order. A view without data is absent.
struct PointwiseTask {
  int64_t numel;
  TensorView input, target;
  TensorView weight;    // factor of each element's loss
  TensorView positive;  // weight of the positive class
  double parameter;     // beta or delta

  TensorView value;  // forward: each element's loss, where it is wanted

  TensorView upstream;  // backward: the gradient of each element's loss, or absent:
  double scale;         // then this is that of all of them
  TensorView input_gradient, target_gradient;
};

}  // namespace trainopt
