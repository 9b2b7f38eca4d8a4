// Adagrad: Duchi, Hazan & Singer 2011. Conventions are torch.optim's: epsilon is added to the root, and the first step
// has the learning rate undecayed.
#pragma once

#include "core/math.h"
#include "rules/rule.h"

namespace trainopt {

struct Adagrad {
  static constexpr const char* kName = "adagrad";
  enum Option { kLrDecay, kEps };
  static constexpr const char* kOptions[] = {"lr_decay", "eps"};
  static constexpr const char* kStates[] = {"sum"};
  static constexpr StateSet kStateSets[] = {0b1};
  static constexpr StateSet kUnsigned = 0b1;
  static constexpr bool kCountsSteps = true;

  TRAINOPT_INLINE static StateSet states_needed(const double*) { return 0b1; }
  TRAINOPT_INLINE static bool takes(const double*) { return true; }
  TRAINOPT_INLINE static Decay decay(const double*) { return Decay::kGradient; }

  template <class S>
  struct Scalars {
    S lr, eps;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    const double decay = info.rounded(1 + (info.step - 1) * options[kLrDecay]);
    return {static_cast<S>(info.rounded(info.lr / decay)), static_cast<S>(options[kEps])};
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T, T g, T* state) {
    T& sum = state[0];
    sum = sum + g * g;
    return g * T(k.lr) / (square_root(sum) + T(k.eps));
  }
};

}  // namespace trainopt
