// The running averages that most rules have as states, to the bits of torch's.
#pragma once

#include "core/macros.h"

namespace trainopt {

// Whether these options, the last one included, can be the weights of averages. Beyond this range torch's bias
// corrections are negative, or complex numbers, which it refuses.
TRAINOPT_FUNCTION bool are_betas(const double* options, int first, int last) {
  for (int beta = first; beta <= last; ++beta)
    if (!(options[beta] >= 0 && options[beta] < 1)) return false;
  return true;
}

// The weights of an average that keeps beta of what it was.
template <class S>
struct AverageWeights {
  S beta, one_minus_beta;
  bool beta_is_small;
};

// `one_minus_beta` where it is known to more digits than 1 - beta has.
template <class S>
TRAINOPT_FUNCTION AverageWeights<S> weights_of(double beta, double one_minus_beta) {
  return {static_cast<S>(beta), static_cast<S>(one_minus_beta), beta <= 0.5};
}
template <class S>
TRAINOPT_FUNCTION AverageWeights<S> weights_of(double beta) {
  return weights_of<S>(beta, 1 - beta);
}

// The average m with x in it, interpolated from the nearer end: with a beta of 0 it is x exactly.
template <class T, class S>
TRAINOPT_FUNCTION T averaged(const AverageWeights<S>& k, T m, T x) {
  return k.beta_is_small ? x - (x - m) * T(k.beta) : m + (x - m) * T(k.one_minus_beta);
}

// Likewise as a sum, which is what the authors of LAMB, Lion, Adan and AdEMAMix write.
template <class T, class S>
TRAINOPT_FUNCTION T averaged_sum(const AverageWeights<S>& k, T m, T x) {
  return m * T(k.beta) + x * T(k.one_minus_beta);
}

// Likewise with the square of x. The weight times x first: x * x alone overflows where the product does not.
template <class T, class S>
TRAINOPT_FUNCTION T averaged_square(const AverageWeights<S>& k, T v, T x) {
  return v * T(k.beta) + x * T(k.one_minus_beta) * x;
}

// The length of a simple average with as much in it as one of beta has after so many steps, of which `rest`, beta to
// the power of the steps, is still to come: by torch's own operations (RAdam), whose rounding errors the difference
// enlarges.
TRAINOPT_FUNCTION double averaged_length(double beta, double steps, double rest) {
  return 2 / (1 - beta) - 1 - 2 * steps * rest / (1 - rest);
}

}  // namespace trainopt
