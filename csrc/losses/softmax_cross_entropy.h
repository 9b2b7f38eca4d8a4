// Cross-entropy of a row of logits with a target that gives each class a mass a_c (Szegedy et al. 2016,
// arXiv:1512.00567, for smoothing; the z-loss of Chowdhery et al. 2022, arXiv:2204.02311; the soft cap of Gemma 2,
// arXiv:2408.00118; the temperature of Hinton et al. 2015, arXiv:1503.02531).
//
// With x_c the logit as it is given, capped softly and divided by the temperature T, in this order:
//
//   y_c = x_c, or cap tanh(x_c / cap)             d y_c / d x_c = 1 - (y_c / cap)^2
//   z_c = y_c / T
//   loss = A lse - sum_c a_c z_c                  with lse = log sum_c e^z_c and A = sum_c a_c
//   d loss / d z_c = A p_c - a_c                  with p_c = e^(z_c - lse)
//   z-loss = k lse^2, d / d z_c = 2 k lse p_c
//
// where lse is kept as peak + log_sum (LogSumExp), and loss and p_c are taken of (peak - z_c) + log_sum. The 1/T of
// d z_c / d y_c is the same for all classes: the engines take it into the row's upstream gradients.
//
// The mass of a class index y under smoothing e with class weights w is (1 - e) w_y at y and, beside that, e/C w_c
// everywhere; that of probabilities t_c is w_c ((1 - e) t_c + e/C). All of a row that is kept from forward to backward
// is lse, in its two parts.
#pragma once

#include "core/elementary.h"
#include "losses/cross_entropy_options.h"

namespace trainopt {

// From the logits as they are given to those of the softmax, in the type of the arithmetic: z = map(x).
//
// Soft cap and temperature are one formula, (cap / T) tanh(x / cap), so that a temperature costs a capped logit
// nothing.
template <class S>
struct LogitMap {
  S cap;         // 0: none
  S scaled_cap;  // cap / T
  S divisor;     // of x: the cap, or without one T
  S inverse;     // 1 / T
  bool is_identity;

  TRAINOPT_INLINE explicit LogitMap(const CrossEntropyOptions& options)
      : cap(softcap_in<S>(options.softcap)),
        scaled_cap(cap == S(0) ? S(0) : nearest_in<S>(static_cast<double>(cap) / options.temperature)),
        divisor(cap == S(0) ? nearest_in<S>(options.temperature) : cap),
        inverse(nearest_in<S>(1 / options.temperature)),
        is_identity(cap == S(0) && divisor == S(1)) {}

  // T is a number or a vector of numbers.
  template <class T>
  TRAINOPT_INLINE T operator()(T x) const {
    const T u = x / T(divisor);  // the one division: float64 on a GPU has no registers left for a second one
    if (cap == S(0)) return u;
    // Far below the cap x stays as it is; x / cap may have lost its digits there.
    return select_less(magnitude(x), T(cap) * T(0x1p-28f), x * T(inverse), T(scaled_cap) * hyperbolic_tangent(u));
  }

  // T dz/dx, for z = map(x): what the soft cap leaves of a gradient.
  template <class T>
  TRAINOPT_INLINE T derivative(T z) const {
    const T u = z / T(scaled_cap);
    return T(1.0f) - u * u;
  }
};

struct SoftmaxCrossEntropy {
  // The derivative by z, but for the mass at the label, of z - peak, which is not above 0; `factor` is that of
  // e^(z - peak). log_sum is in one of the two: taken from z - peak, or, where a row is long, as e^-log_sum in the
  // factor.
  template <class T>
  static TRAINOPT_INLINE T derivative(T below_peak, T factor, T mass) {
    return exponential_of_negative(below_peak) * factor - mass;
  }

  // What the factor of a row's probabilities is multiplied by where log_sum is taken from z - peak, for its digits that
  // T does not have: all probabilities would be off by these alike.
  template <class T>
  static TRAINOPT_INLINE double rounding_of(double log_sum) {
    return 1 - (log_sum - static_cast<double>(static_cast<T>(log_sum)));
  }
};

}  // namespace trainopt
