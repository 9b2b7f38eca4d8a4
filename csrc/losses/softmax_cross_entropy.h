// Cross-entropy of a row of logits x_c with a target that gives each class a mass a_c (Szegedy et al. 2016,
// arXiv:1512.00567, for smoothing; the z-loss of Chowdhery et al. 2022, arXiv:2204.02311; the soft cap of Gemma 2,
// arXiv:2408.00118):
//
//   loss = A lse - sum_c a_c x_c      with lse = log sum_c e^x_c and A = sum_c a_c
//   d loss / d x_c = A p_c - a_c      with p_c = e^(x_c - lse)
//   z-loss = z lse^2, d / d x_c = 2 z lse p_c
//
// where lse is kept as peak + log_sum (LogSumExp), and loss and p_c are taken of (peak - x_c) + log_sum.
//
// The mass of a class index y under smoothing e with class weights w is (1 - e) w_y at y, its spike, and e/C w_c
// everywhere; that of probabilities t_c is w_c ((1 - e) t_c + e/C). All of a row that is kept from forward to backward
// is lse, in its two parts.
#pragma once

#include "core/elementary.h"

namespace trainopt {

struct SoftmaxCrossEntropy {
  // A logit squeezed into (-cap, cap), and the derivative of that.
  template <class T>
  static TRAINOPT_INLINE T capped(T x, T cap) {
    // Far below the cap x stays as it is; x / cap may have lost its digits there.
    return select_less(magnitude(x), cap * T(0x1p-28f), x, cap * hyperbolic_tangent(x / cap));
  }
  template <class T>
  static TRAINOPT_INLINE T cap_slope(T capped_x, T cap) {
    const T u = capped_x / cap;
    return T(1.0f) - u * u;
  }

  // The gradient but for the spike.
  template <class T>
  static TRAINOPT_INLINE T slope(T x, T peak, T log_sum, T share, T mass) {
    return exponential((x - peak) - log_sum) * share - mass;
  }

  // What a row's share is multiplied by for the digits of log_sum that T does not have: all probabilities of the row
  // would be off by them alike.
  template <class T>
  static TRAINOPT_INLINE double rounding_of(double log_sum) {
    return 1 - (log_sum - static_cast<double>(static_cast<T>(log_sum)));
  }
};

}  // namespace trainopt
