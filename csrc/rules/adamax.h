// Adamax, Adam with the infinity norm: Kingma & Ba 2015, arXiv:1412.6980. Conventions are torch.optim's: epsilon is
// added to the absolute gradient.
#pragma once

#include "core/math.h"
#include "rules/moments.h"
#include "rules/rule.h"

namespace trainopt {

struct Adamax {
  static constexpr const char* kName = "adamax";
  enum Option { kBeta1, kBeta2, kEps };
  static constexpr const char* kOptions[] = {"betas.0", "betas.1", "eps"};
  static constexpr const char* kStates[] = {"exp_avg", "exp_inf"};
  static constexpr StateSet kStateSets[] = {0b11};
  static constexpr StateSet kUnsigned = 0b10;
  static constexpr bool kCountsSteps = true;

  TRAINOPT_INLINE static StateSet states_needed(const double*) { return 0b11; }
  TRAINOPT_INLINE static bool takes(const double* options) { return are_betas(options, kBeta1, kBeta1); }
  TRAINOPT_INLINE static Decay decay(const double*) { return Decay::kGradient; }

  template <class S>
  struct Scalars {
    AverageWeights<S> first;  // of the moment m
    S beta2, eps, step_size;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    const double beta1 = options[kBeta1];
    Scalars<S> k;
    k.first = weights_of<S>(beta1);
    k.beta2 = static_cast<S>(options[kBeta2]);
    k.eps = static_cast<S>(options[kEps]);
    k.step_size = static_cast<S>(info.rounded(info.lr / info.rounded(bias_correction(beta1, info.step))));
    return k;
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T, T g, T* state) {
    T& m = state[0];
    T& largest = state[1];
    m = averaged(k.first, m, g);
    largest = maximum(largest * T(k.beta2), maximum(g, -g) + T(k.eps));
    return m * T(k.step_size) / largest;
  }
};

}  // namespace trainopt
