// RMSprop: Tieleman & Hinton 2012; centered: Graves 2013, arXiv:1308.0850. Conventions are torch.optim's: epsilon is
// added to the root, and momentum is of the update.
#pragma once

#include "core/math.h"
#include "rules/moments.h"
#include "rules/rule.h"

namespace trainopt {

struct RmsProp {
  static constexpr const char* kName = "rmsprop";
  enum Option { kAlpha, kEps, kMomentum, kCentered };
  static constexpr const char* kOptions[] = {"alpha", "eps", "momentum", "centered"};
  static constexpr const char* kStates[] = {"square_avg", "momentum_buffer", "grad_avg"};
  static constexpr StateSet kStateSets[] = {0b001, 0b011, 0b101, 0b111};
  static constexpr StateSet kUnsigned = 0b001;
  static constexpr bool kCountsSteps = true;

  TRAINOPT_INLINE static StateSet states_needed(const double* options) {
    return static_cast<StateSet>(0b001 | (options[kMomentum] > 0 ? 0b010 : 0) | (options[kCentered] != 0 ? 0b100 : 0));
  }
  TRAINOPT_INLINE static bool takes(const double*) { return true; }
  TRAINOPT_INLINE static Decay decay(const double*) { return Decay::kGradient; }

  template <class S>
  struct Scalars {
    AverageWeights<S> averages;
    S lr, eps, momentum;
    bool has_momentum, centered;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    Scalars<S> k;
    k.averages = weights_of<S>(options[kAlpha]);
    k.lr = static_cast<S>(info.lr);
    k.eps = static_cast<S>(options[kEps]);
    k.momentum = static_cast<S>(options[kMomentum]);
    k.has_momentum = options[kMomentum] > 0;
    k.centered = options[kCentered] != 0;
    return k;
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T, T g, T* state) {
    T& v = state[0];
    v = averaged_square(k.averages, v, g);
    T variance = v;
    if (k.centered) {
      T& m = state[2];
      m = averaged(k.averages, m, g);
      variance = v - m * m;
    }
    const T deviation = square_root(variance) + T(k.eps);
    if (!k.has_momentum) return g * T(k.lr) / deviation;
    T& buffer = state[1];
    buffer = buffer * T(k.momentum) + g / deviation;
    return buffer * T(k.lr);
  }
};

}  // namespace trainopt
