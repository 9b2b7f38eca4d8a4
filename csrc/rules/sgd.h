// Stochastic gradient descent with momentum, dampening and Nesterov's form, as torch.optim.SGD documents them.
#pragma once

#include "rules/rule.h"

namespace trainopt {

struct Sgd {
  static constexpr const char* kName = "sgd";
  enum Option { kMomentum, kDampening, kNesterov };
  static constexpr const char* kOptions[] = {"momentum", "dampening", "nesterov"};
  static constexpr const char* kStates[] = {"momentum_buffer"};
  static constexpr StateSet kStateSets[] = {0b0, 0b1};
  static constexpr bool kCountsSteps = false;

  TRAINOPT_INLINE static StateSet states_needed(const double* options) { return options[kMomentum] != 0 ? 0b1 : 0b0; }
  TRAINOPT_INLINE static bool takes(const double*) { return true; }
  TRAINOPT_INLINE static Decay decay(const double*) { return Decay::kGradient; }

  template <class S>
  struct Scalars {
    S lr, momentum, one_minus_dampening;
    bool has_momentum, nesterov, first;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    Scalars<S> k;
    k.lr = static_cast<S>(info.lr);
    k.momentum = static_cast<S>(options[kMomentum]);
    k.one_minus_dampening = static_cast<S>(1 - options[kDampening]);
    k.has_momentum = options[kMomentum] != 0;
    k.nesterov = options[kNesterov] != 0;
    k.first = info.first;
    return k;
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T, T g, T* state) {
    if (k.has_momentum) {
      T& buffer = state[0];
      // torch's first momentum step takes the gradient whole, dampening or not.
      buffer = k.first ? g : buffer * T(k.momentum) + g * T(k.one_minus_dampening);
      g = k.nesterov ? g + buffer * T(k.momentum) : buffer;
    }
    return g * T(k.lr);
  }
};

}  // namespace trainopt
