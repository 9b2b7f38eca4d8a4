// RAdam, Adam whose second moment has a say only once enough gradients are in it: Liu et al. 2020, arXiv:1908.03265.
// Conventions are torch.optim's: epsilon is added before the bias correction, and the threshold is 5.
#pragma once

#include "core/math.h"
#include "rules/moments.h"
#include "rules/rule.h"

namespace trainopt {

struct RAdam {
  static constexpr const char* kName = "radam";
  enum Option { kBeta1, kBeta2, kEps, kDecoupled };
  static constexpr const char* kOptions[] = {"betas.0", "betas.1", "eps", "decoupled_weight_decay"};
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr StateSet kStateSets[] = {0b11};
  static constexpr StateSet kUnsigned = 0b10;
  static constexpr bool kCountsSteps = true;

  TRAINOPT_INLINE static StateSet states_needed(const double*) { return 0b11; }
  TRAINOPT_INLINE static bool takes(const double* options) { return are_betas(options, kBeta1, kBeta2); }
  TRAINOPT_INLINE static Decay decay(const double* options) {
    return options[kDecoupled] != 0 ? Decay::kParameter : Decay::kGradient;
  }

  template <class S>
  struct Scalars {
    AverageWeights<S> first, second;  // of the two moments
    S step_size, eps;
    bool adapts;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    const double beta1 = options[kBeta1], beta2 = options[kBeta2];
    // The length of a simple average with as much in it as the second moment has, in the end and now.
    const double rest = __builtin_pow(beta2, info.step), correction2 = 1 - rest;
    const double in_the_end = 2 / (1 - beta2) - 1;
    const double now = averaged_length(beta2, info.step, rest);
    double step_size = info.lr / bias_correction(beta1, info.step);
    Scalars<S> k;
    k.adapts = now > 5;
    if (k.adapts) {
      const double share = (now - 4) * (now - 2) * in_the_end / ((in_the_end - 4) * (in_the_end - 2) * now);
      step_size *= __builtin_sqrt(share) * __builtin_sqrt(correction2);
    }
    k.first = weights_of<S>(beta1);
    k.second = weights_of<S>(beta2);
    k.step_size = static_cast<S>(step_size);
    k.eps = static_cast<S>(options[kEps]);
    return k;
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T, T g, T* state) {
    T& m = state[0];
    T& v = state[1];
    m = averaged(k.first, m, g);
    v = averaged_square(k.second, v, g);
    const T change = m * T(k.step_size);
    return k.adapts ? change / (square_root(v) + T(k.eps)) : change;
  }
};

}  // namespace trainopt
