// The options of cross-entropy in one struct, which goes from the operators' registration down to the kernels.
//
// A new option is a member here, and a name in the operators' schemas (torch/losses/cross_entropy_options.h). See
// docs/adding-a-loss.md.
#pragma once

#include <cfloat>
#include <cstdint>

#include "core/macros.h"
#include "losses/reduction.h"

namespace trainopt {

struct CrossEntropyOptions {
  Reduction reduction = Reduction::kMean;
  int64_t ignore_index = -100;  // of classes: rows of this class have no loss
  double smoothing = 0;
  double z_loss = 0;
  double softcap = 0;          // 0: none
  bool empty_is_zero = false;  // the mean of no rows is 0, and not NaN
  double temperature = 1;
};

// A positive number in the type of the arithmetic; the nearest one that is there for one beyond all numbers of S.
template <class S>
TRAINOPT_FUNCTION S nearest_in(double value) {
  // No std::numeric_limits, whose functions nvcc takes for the host's alone.
  constexpr bool kIsSingle = sizeof(S) == sizeof(float);
  constexpr double kLargest = kIsSingle ? double{FLT_MAX} : DBL_MAX, kSmallest = kIsSingle ? double{FLT_MIN} : DBL_MIN;
  return static_cast<S>(value > kLargest ? kLargest : value < kSmallest ? kSmallest : value);
}

// A soft cap in the type of the arithmetic; 0: none. One that is larger than all numbers of S leaves every logit as it
// is. One that is smaller takes all but 0 to what is 0 in S, as the smallest number of S does.
template <class S>
TRAINOPT_FUNCTION S softcap_in(double softcap) {
  constexpr double kLargest = sizeof(S) == sizeof(float) ? double{FLT_MAX} : DBL_MAX;
  return softcap == 0 || softcap > kLargest ? S(0) : nearest_in<S>(softcap);
}

}  // namespace trainopt
