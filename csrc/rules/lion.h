// Lion: Chen et al. 2023, arXiv:2302.06675, with the paper's conventions: decoupled decay, no bias correction.
#pragma once

#include "core/math.h"
#include "rules/rule.h"

namespace trainopt {

struct Lion {
  static constexpr const char* kName = "lion";
  enum Option { kBeta1, kBeta2 };
  static constexpr const char* kOptions[] = {"betas.0", "betas.1"};
  static constexpr const char* kStates[] = {"exp_avg"};
  static constexpr StateSet kStateSets[] = {0b1};
  static constexpr bool kCountsSteps = false;

  TRAINOPT_INLINE static StateSet states_needed(const double*) { return 0b1; }
  TRAINOPT_INLINE static bool takes(const double*) { return true; }
  TRAINOPT_INLINE static Decay decay(const double*) { return Decay::kParameter; }

  template <class S>
  struct Scalars {
    S lr, beta1, one_minus_beta1, beta2, one_minus_beta2;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    const double beta1 = options[kBeta1], beta2 = options[kBeta2];
    return {static_cast<S>(info.lr), static_cast<S>(beta1), static_cast<S>(1 - beta1), static_cast<S>(beta2),
            static_cast<S>(1 - beta2)};
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T, T g, T* state) {
    T& m = state[0];
    const T change = sign_or_nan(m * T(k.beta1) + g * T(k.one_minus_beta1)) * T(k.lr);
    m = m * T(k.beta2) + g * T(k.one_minus_beta2);
    return change;
  }
};

}  // namespace trainopt
