// Adadelta: Zeiler 2012, arXiv:1212.5701. Conventions are torch.optim's: epsilon is added under both roots.
#pragma once

#include "core/math.h"
#include "rules/moments.h"
#include "rules/rule.h"

namespace trainopt {

struct Adadelta {
  static constexpr const char* kName = "adadelta";
  enum Option { kRho, kEps };
  static constexpr const char* kOptions[] = {"rho", "eps"};
  static constexpr const char* kStates[] = {"square_avg", "acc_delta"};
  static constexpr StateSet kStateSets[] = {0b11};
  static constexpr StateSet kUnsigned = 0b11;
  static constexpr bool kCountsSteps = true;

  TRAINOPT_INLINE static StateSet states_needed(const double*) { return 0b11; }
  TRAINOPT_INLINE static bool takes(const double*) { return true; }
  TRAINOPT_INLINE static Decay decay(const double*) { return Decay::kGradient; }

  template <class S>
  struct Scalars {
    AverageWeights<S> averages;
    S lr, eps;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    return {weights_of<S>(options[kRho]), static_cast<S>(info.lr), static_cast<S>(options[kEps])};
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T, T g, T* state) {
    T& squares = state[0];
    T& deltas = state[1];
    squares = averaged_square(k.averages, squares, g);
    const T delta = square_root(deltas + T(k.eps)) / square_root(squares + T(k.eps)) * g;
    deltas = averaged_square(k.averages, deltas, delta);
    return delta * T(k.lr);
  }
};

}  // namespace trainopt
