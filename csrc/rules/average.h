// The moving average of a parameter, free of bias, whatever the rule: trainopt/training/average.py has the formula.
#pragma once

#include "core/macros.h"

namespace trainopt {

// How far the average goes towards the parameter in step t = 1, 2, …: (1 - d_t) / (1 - D_t), where d_t is the decay, or
// with warm-up the smaller of it and t / (9 + t), and D_t = d_1 · … · d_t. 1 in the first step.
TRAINOPT_INLINE double average_weight(double decay, bool warmup, double t) {
  // The steps in which the warm-up decides: the product of i / (9 + i) over i = 1 … n is that of j / (n + j) over the
  // nine j.
  double n = 0, decay_now = decay;
  if (warmup) {
    const double most = __builtin_floor(9 * decay / (1 - decay));
    n = t < most ? t : most;
    if (t / (9 + t) < decay) decay_now = t / (9 + t);
  }
  double log_product = t > n ? (t - n) * __builtin_log(decay) : 0;  // D_t itself is soon too near 0
  for (int j = 1; warmup && j <= 9; ++j) log_product += __builtin_log(j / (n + j));
  return (1 - decay_now) / -__builtin_expm1(log_product);
}

// One element, or a register of them. From the nearer end: with a weight of 1 the average is the parameter exactly.
template <class T, class S>
TRAINOPT_INLINE void move_average(S weight, T p, T& average) {
  average = weight >= S(0.5) ? p - (p - average) * T(1 - weight) : average + (p - average) * T(weight);
}

}  // namespace trainopt
