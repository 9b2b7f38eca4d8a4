// The losses that compare input and target element by element.
//
// Each is a struct with
//   kName                                    its name in the engine's table
//   value(x, t, positive, k)                 the loss of one element
//   slope(x, t, positive, k)                 its derivative by x
//   target_slope(x, t, positive, k)          its derivative by t
// T is float or double, or a vector of these. `positive` is the weight of the positive class, 1 where there is none;
// `k` is the loss's own number (beta, delta), if it has one. Formulas are torch.nn.functional's; where several forms
// are equal, the one that cancels least.
#pragma once

#include "core/elementary.h"

namespace trainopt {

// -1, 0 or 1; `otherwise` for 0 and NaN.
template <class T>
TRAINOPT_FUNCTION T sign_or(T x, T otherwise) {
  const T zero(0.0f);
  return select_less(zero, x, T(1.0f), select_less(x, zero, T(-1.0f), otherwise));
}

struct SquaredError {
  static constexpr const char* kName = "mse_loss";
  template <class T>
  static TRAINOPT_INLINE T value(T x, T t, T, T) {
    return (x - t) * (x - t);
  }
  template <class T>
  static TRAINOPT_INLINE T slope(T x, T t, T, T) {
    return T(2.0f) * (x - t);
  }
  template <class T>
  static TRAINOPT_INLINE T target_slope(T x, T t, T, T) {
    return T(2.0f) * (t - x);
  }
};

// A loss of the difference alone falls with the target as it rises with the input.
template <class Loss>
struct OfDifference {
  template <class T>
  static TRAINOPT_INLINE T target_slope(T x, T t, T positive, T k) {
    return -Loss::slope(x, t, positive, k);
  }
};

struct AbsoluteError : OfDifference<AbsoluteError> {
  static constexpr const char* kName = "l1_loss";
  template <class T>
  static TRAINOPT_INLINE T value(T x, T t, T, T) {
    return magnitude(x - t);
  }
  template <class T>
  static TRAINOPT_INLINE T slope(T x, T t, T, T) {
    return sign_or(x - t, T(0.0f));  // 0 for NaN, as torch
  }
};

// Girshick 2015, arXiv:1504.08083; k is beta, above 0.
struct SmoothAbsoluteError : OfDifference<SmoothAbsoluteError> {
  static constexpr const char* kName = "smooth_l1_loss";
  template <class T>
  static TRAINOPT_INLINE T value(T x, T t, T, T k) {
    const T d = magnitude(x - t);
    return select_less(d, k, T(0.5f) * d * (d / k), d - T(0.5f) * k);  // d * d may be no number where the loss is one
  }
  template <class T>
  static TRAINOPT_INLINE T slope(T x, T t, T, T k) {
    const T d = x - t;
    return select_less(magnitude(d), k, d / k, sign_or(d, d));
  }
};

// Huber 1964; k is delta, above 0.
struct Huber : OfDifference<Huber> {
  static constexpr const char* kName = "huber_loss";
  template <class T>
  static TRAINOPT_INLINE T value(T x, T t, T, T k) {
    const T d = magnitude(x - t);
    return select_less(d, k, T(0.5f) * d * d, k * (d - T(0.5f) * k));
  }
  template <class T>
  static TRAINOPT_INLINE T slope(T x, T t, T, T k) {
    const T d = x - t;
    return select_less(magnitude(d), k, d, k * sign_or(d, d));
  }
};

// x and t are probabilities; the loss is NaN where one of them is none. The loss takes no logarithm below -100, and the
// slope's denominator is not below 1e-12, as in torch.
struct BinaryCrossEntropy {
  static constexpr const char* kName = "binary_cross_entropy";
  template <class T>
  static TRAINOPT_INLINE T value(T x, T t, T, T) {
    T of_x, of_rest;
    logarithms(x, T(-100.0f), &of_x, &of_rest);
    const T none(__builtin_nanf("")), loss = (t - T(1.0f)) * of_rest - t * of_x;
    return select_less(t, T(0.0f), none, select_less(T(1.0f), t, none, loss));
  }
  template <class T>
  static TRAINOPT_INLINE T slope(T x, T t, T, T) {
    return quotient(x - t, at_least((T(1.0f) - x) * x, T(1e-12f)));
  }
  template <class T>
  static TRAINOPT_INLINE T target_slope(T x, T, T, T) {
    return log_one_minus(x) - logarithm(x);
  }
};

// x is a logit: (1 - t) softplus(x) + positive t softplus(-x), where softplus(x) = max(x, 0) + log(1 + e^-|x|).
struct BinaryCrossEntropyWithLogits {
  static constexpr const char* kName = "binary_cross_entropy_with_logits";
  template <class T>
  static TRAINOPT_INLINE T value(T x, T t, T positive, T) {
    const T zero(0.0f);
    const T tail = log_one_plus(exponential_of_negative(-magnitude(x)));
    const T above = select_less(x, zero, zero, x), below = select_less(x, zero, -x, zero);
    const T of_one = positive * t, of_zero = T(1.0f) - t;
    return (of_zero + of_one) * tail + (of_zero * above + of_one * below);
  }
  template <class T>
  static TRAINOPT_INLINE T slope(T x, T t, T positive, T) {
    const T e = exponential_of_negative(-magnitude(x));
    const T larger = quotient(T(1.0f), T(1.0f) + e), smaller = e * larger;  // the logistic function of |x| and of -|x|
    const T of_x = select_less(x, T(0.0f), smaller, larger), of_minus_x = select_less(x, T(0.0f), larger, smaller);
    return (T(1.0f) - t) * of_x - positive * t * of_minus_x;
  }
  template <class T>
  static TRAINOPT_INLINE T target_slope(T x, T, T positive, T) {
    const T zero(0.0f);
    const T tail = log_one_plus(exponential_of_negative(-magnitude(x)));
    const T above = select_less(x, zero, zero, x), below = select_less(x, zero, -x, zero);
    return (positive - T(1.0f)) * tail + (positive * below - above);
  }
};

// Kullback & Leibler 1951; x is a logarithm of a probability, t a probability.
struct Divergence {
  static constexpr const char* kName = "kl_div";
  template <class T>
  static TRAINOPT_INLINE T value(T x, T t, T, T) {
    const T zero(0.0f), log_t = logarithm(t);
    return t * (select_less(zero, t, log_t, select_less(t, zero, log_t, t)) - x);  // 0 log 0 is 0
  }
  template <class T>
  static TRAINOPT_INLINE T slope(T, T t, T, T) {
    return -t;
  }
  template <class T>
  static TRAINOPT_INLINE T target_slope(T x, T t, T, T) {
    return logarithm(t) + t / t - x;  // no derivative at 0: NaN, as torch
  }
};

// The same, with t a logarithm too.
struct DivergenceOfLogs {
  static constexpr const char* kName = "kl_div_log_target";
  template <class T>
  static TRAINOPT_INLINE T value(T x, T t, T, T) {
    return exponential(t) * (t - x);
  }
  template <class T>
  static TRAINOPT_INLINE T slope(T, T t, T, T) {
    return -exponential(t);
  }
  template <class T>
  static TRAINOPT_INLINE T target_slope(T x, T t, T, T) {
    return exponential(t) * (t - x + T(1.0f));
  }
};

// Every pointwise loss: the one list that a new one is added to.
#define TRAINOPT_FOR_EACH_POINTWISE_LOSS(DO) \
  DO(SquaredError)                           \
  DO(AbsoluteError)                          \
  DO(SmoothAbsoluteError)                    \
  DO(Huber)                                  \
  DO(BinaryCrossEntropy)                     \
  DO(BinaryCrossEntropyWithLogits)           \
  DO(Divergence)                             \
  DO(DivergenceOfLogs)

}  // namespace trainopt
