// LARS: You, Gitman, Ginsburg 2017, arXiv:1708.03888. Gradient descent with momentum, of a gradient that is scaled for
// each tensor by trust_coeff |p| / (|g| + weight_decay |p| + eps), as timm has it; by 1 where either norm is 0.
#pragma once

#include "rules/rule.h"

namespace trainopt {

struct Lars {
  static constexpr const char* kName = "lars";
  enum Option { kMomentum, kDampening, kNesterov, kTrustCoeff, kEps, kTrustClip, kAlwaysAdapt };
  static constexpr const char* kOptions[] = {"momentum", "dampening",  "nesterov",    "trust_coeff",
                                             "eps",      "trust_clip", "always_adapt"};
  static constexpr const char* kStates[] = {"momentum_buffer"};
  static constexpr StateSet kStateSets[] = {0b0, 0b1};
  static constexpr const char* kSums[] = {"squares of the parameter", "squares of the gradient"};
  static constexpr uint32_t kSquares = 0b11;
  static constexpr StateSet kSumsOfStates = 0;
  static constexpr bool kCountsSteps = false;

  TRAINOPT_INLINE static StateSet states_needed(const double* options) { return options[kMomentum] != 0 ? 0b1 : 0b0; }
  TRAINOPT_INLINE static bool takes(const double*) { return true; }
  TRAINOPT_INLINE static Decay decay(const double*) { return Decay::kUpdate; }

  template <class S>
  struct Scalars {
    S lr, momentum, one_minus_dampening, weight_decay;
    S ratio;  // from `finish` on
    bool has_momentum, nesterov, first, decays, adapts, clips;
    double trust_coeff, eps, exact_weight_decay, exact_lr;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    Scalars<S> k;
    k.lr = static_cast<S>(info.lr);
    k.momentum = static_cast<S>(options[kMomentum]);
    k.one_minus_dampening = static_cast<S>(1 - options[kDampening]);
    k.weight_decay = static_cast<S>(info.weight_decay);
    k.ratio = 1;
    k.has_momentum = options[kMomentum] != 0;
    k.nesterov = options[kNesterov] != 0;
    k.first = info.first;
    k.decays = info.weight_decay != 0;
    k.adapts = k.decays || options[kAlwaysAdapt] != 0;
    k.clips = options[kTrustClip] != 0;
    k.trust_coeff = options[kTrustCoeff];
    k.eps = options[kEps];
    k.exact_weight_decay = info.weight_decay;
    k.exact_lr = info.lr;
    return k;
  }

  template <class T, class S>
  TRAINOPT_INLINE static void gather(const Scalars<S>&, T p, T g, T*, Term<T>* terms) {
    terms[0] = {p, p};
    terms[1] = {g, g};
  }

  template <class S>
  TRAINOPT_INLINE static void finish(Scalars<S>& k, const double* sums) {
    if (!k.adapts) return;
    double ratio = 1;
    const double param = __builtin_sqrt(sums[0]), gradient = __builtin_sqrt(sums[1]);
    if (param != 0 && gradient != 0) ratio = k.trust_coeff * param / (gradient + param * k.exact_weight_decay + k.eps);
    if (k.clips) ratio = ratio >= k.exact_lr ? 1 : ratio / k.exact_lr;
    k.ratio = static_cast<S>(ratio);
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T p, T g, T* state) {
    if (k.decays) g = g + p * T(k.weight_decay);  // 0 times an infinite p would be NaN
    g = g * T(k.ratio);
    if (k.has_momentum) {
      T& buffer = state[0];
      // As SGD's: the first step takes the gradient whole, dampening or not.
      buffer = k.first ? g : buffer * T(k.momentum) + g * T(k.one_minus_dampening);
      g = k.nesterov ? g + buffer * T(k.momentum) : buffer;
    }
    return g * T(k.lr);
  }
};

}  // namespace trainopt
